"""How much does a pretrained encoder need attention on a task? The study of PAPA (Hassid et al., 2022, arXiv
2211.03495) in one command: average attention matrices, a ranking of the heads, and the papers' probe with a growing
share of constant heads.

    python examples/run_papa.py --model sentence-transformers/all-MiniLM-L6-v2 --output_dir outputs/papa-trec \
        --task sequence --train_file trec/train.parquet --validation_file trec/test.parquet

    python examples/run_papa.py --model sentence-transformers/all-MiniLM-L6-v2 --output_dir outputs/papa-pos \
        --task token --train_file pos/train.parquet --validation_file pos/validation.parquet --label_column pos_tags

Data files are Parquet, CSV or JSON lines with integer labels; a token task has a list of words and a list of labels.
In the output folder: results.json, table.md, scores.png, attention_weights.png, constants.png. A run that was stopped
is taken up where it was: give the same command again. On two CPU cores the default size takes less than 20 minutes for
a 6-layer encoder of width 384.
"""

import dataclasses
import json
import shutil
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

from hf_adaptive.files import identified, write_whole
from hf_adaptive.modeling.architectures import papa_class
from hf_adaptive.modeling.papa_configuration import TRAINABLE_PARTS
from hf_adaptive.modeling.switch import replaced_files, settle
from hf_adaptive.probing import (
    HeadRanking,
    MeanAttention,
    fix_sequence_positions,
    fix_token_positions,
    mean_attention,
    rank_heads,
)
from hf_adaptive.probing.plots import plot_attention_weights, plot_constants, plot_scores

FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
MODEL_SUFFIXES = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}
METRICS = {"sequence": "accuracy", "token": "token accuracy"}
IGNORED = -100


@dataclass
class StudyArguments:
    """Every field is a flag."""

    model: str = field(metadata={"help": "A plain checkpoint: Hub name or folder."})
    output_dir: str = field(metadata={"help": "Where everything is written."})
    train_file: str = field(metadata={"help": "Parquet, CSV or JSON lines."})
    validation_file: str = field(metadata={"help": "As train_file; used for the scores only."})
    task: str = field(default="sequence", metadata={"help": "Kind of task.", "choices": list(MODEL_SUFFIXES)})
    text_column: str | None = field(default=None, metadata={"help": "Default: 'text', or 'tokens' for a token task."})
    text_pair_column: str | None = field(
        default=None, metadata={"help": "The second text of a pair, if there is one."}
    )
    label_column: str = field(default="label", metadata={"help": "Integers, or lists of them for a token task."})
    max_length: int = field(default=32, metadata={"help": "In tokens; longer inputs are cut."})
    fixed_positions: bool = field(default=False, metadata={"help": "The papers' fixed-position preprocessing."})
    train_examples: int = field(default=3000, metadata={"help": "At most so many, drawn at random."})
    validation_examples: int = field(default=1000, metadata={"help": "At most so many, drawn at random."})
    fractions: list[float] = field(
        default_factory=lambda: [0, 1 / 2, 7 / 8, 15 / 16, 1], metadata={"help": "Shares of constant heads."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One probe is trained with each."})
    trainable_part: str = field(
        default="probe",
        metadata={"help": "Beside the probe, also the constants, or all.", "choices": list(TRAINABLE_PARTS)},
    )
    epochs: float = field(default=3, metadata={"help": "For every probe and for the ranking."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of the probe."})
    lambda_learning_rate: float = field(default=1e-2, metadata={"help": "Of the interpolation weights."})
    batch_size: int = field(default=32, metadata={"help": "For training."})


def main() -> None:
    # Each probe would report anew which weights of the checkpoint it leaves out.
    transformers.logging.set_verbosity_error()
    (arguments,) = HfArgumentParser(StudyArguments).parse_args_into_dataclasses()
    Study(arguments).run()


class Study:
    """The steps of the study. Each one's result is a file; a step whose file is there is not repeated."""

    def __init__(self, arguments: StudyArguments) -> None:
        self.arguments = arguments
        self.folder = Path(arguments.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        settle(self.folder)
        self._check_settings()
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model, add_prefix_space=arguments.task == "token")
        self.train, self.validation = self._data()
        self.num_labels = 1 + max(label for dataset in (self.train, self.validation) for label in _labels(dataset))
        self.model_class = _model_class(arguments)

    def run(self) -> None:
        averages = self.averages()
        ranking = self.ranking(averages)
        steps = [(fraction, seed) for fraction in self.arguments.fractions for seed in self.arguments.seeds]
        runs = [self.probe(averages, ranking, *step) for step in tqdm(steps, desc="probes")]
        shutil.rmtree(self.folder / "trainer", ignore_errors=True)
        self.report(averages, ranking, runs)

    def _check_settings(self) -> None:
        """Steps of other settings must not be mixed with these."""
        settings = {name: value for name, value in self._settings().items() if name not in ("seeds", "fractions")}
        path = self.folder / "settings.json"
        if not path.exists():
            write_json(path, settings)
            return
        stored = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{name}={stored.get(name)!r}" for name in settings if settings[name] != stored.get(name)]
        if changed:
            raise ValueError(
                f"{self.folder} holds a study with other settings: {', '.join(changed)}. Use these, or "
                "another output_dir."
            )

    def _settings(self) -> dict[str, Any]:
        """The arguments; of files and folders their names and checksums, not where they lie on this machine."""
        settings = dataclasses.asdict(self.arguments)
        del settings["output_dir"]
        return {
            **settings,
            **{name: identified(settings[name]) for name in ("model", "train_file", "validation_file")},
        }

    def _data(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        arguments = self.arguments
        train = _read(arguments.train_file, arguments.train_examples)
        validation = _read(arguments.validation_file, arguments.validation_examples)
        return self._tokenized(train), self._tokenized(validation)

    def _tokenized(self, dataset: datasets.Dataset) -> datasets.Dataset:
        tokenize = self._tokenize_words if self.arguments.task == "token" else self._tokenize_text
        return dataset.map(tokenize, remove_columns=dataset.column_names)

    def _tokenize_text(self, example: dict[str, Any]) -> dict[str, Any]:
        pair = self.arguments.text_pair_column
        encoded = self.tokenizer(
            example[self.arguments.text_column or "text"],
            example[pair] if pair else None,
            truncation=True,
            max_length=self.arguments.max_length,
        )
        return {**self._placed(dict(encoded), fix_sequence_positions), "labels": example[self.arguments.label_column]}

    def _tokenize_words(self, example: dict[str, Any]) -> dict[str, Any]:
        """The first piece of every word has its label, the others none."""
        encoded = self.tokenizer(
            example[self.arguments.text_column or "tokens"],
            is_split_into_words=True,
            truncation=True,
            max_length=self.arguments.max_length,
        )
        words = encoded.word_ids()
        labels = [
            example[self.arguments.label_column][word] if word is not None and word != before else IGNORED
            for before, word in zip([None, *words], words)
        ]
        return self._placed({**encoded, "labels": labels}, fix_token_positions)

    def _placed(self, encoded: dict[str, Any], fix: Any) -> dict[str, Any]:
        if not self.arguments.fixed_positions:
            return encoded
        return fix(
            encoded,
            max_length=self.arguments.max_length,
            sep_token_id=self.tokenizer.sep_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def averages(self) -> MeanAttention:
        """Average attention over the training texts."""
        path = self.folder / "averages.safetensors"
        model = AutoModel.from_pretrained(self.arguments.model)
        # Short texts together: less padding to compute.
        texts = self.train.map(lambda example: {"length": len(example["input_ids"])}).sort("length")
        return mean_attention(model, texts, self.arguments.max_length, batch_size=32, path=path, save_every=20)

    def ranking(self, averages: MeanAttention) -> HeadRanking:
        """How much attention every head needs, learned on the training texts."""
        path = self.folder / "head_ranking.json"
        if path.exists():
            return HeadRanking.load(path)
        model = self._model(averages, [], None, self.arguments.seeds[0])
        ranking = rank_heads(
            model,
            averages,
            self.train,
            self._training_arguments(self.arguments.seeds[0]),
            data_collator=self._collator(),
            lambda_learning_rate=self.arguments.lambda_learning_rate,
        )
        ranking.save(path)
        return ranking

    def probe(self, averages: MeanAttention, ranking: HeadRanking, fraction: float, seed: int) -> dict[str, Any]:
        """Trains and scores the probe with a share of the heads constant."""
        path = self.folder / "runs" / f"constant-{fraction:.4f}-seed-{seed}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        started = time.perf_counter()
        model = self._model(averages, fraction, ranking, seed)
        trainer = Trainer(
            model=model,
            args=self._training_arguments(seed),
            train_dataset=self.train,
            data_collator=self._collator(),
            compute_metrics=_accuracy,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )
        trainer.train()
        run = {
            "fraction": fraction,
            "seed": seed,
            "constant_heads": model.config.constant_heads,
            "parameters": model.num_parameters(),
            "score": trainer.evaluate(self.validation)["eval_accuracy"],
            "seconds": time.perf_counter() - started,
        }
        write_json(path, run)
        return run

    def _model(self, averages: MeanAttention, fraction: Any, ranking: HeadRanking | None, seed: int) -> Any:
        transformers.set_seed(seed)
        return self.model_class.from_pretrained(
            self.arguments.model,
            constants=averages,
            constant_heads=fraction,
            head_ranking=ranking.order if ranking else None,
            trainable_part=self.arguments.trainable_part,
            num_labels=self.num_labels,
        )

    def _training_arguments(self, seed: int) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(self.folder / "trainer"),
            num_train_epochs=self.arguments.epochs,
            learning_rate=self.arguments.learning_rate,
            per_device_train_batch_size=self.arguments.batch_size,
            per_device_eval_batch_size=64,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            # The quiet log level of main would hide the progress bars as well.
            disable_tqdm=False,
        )

    def _collator(self) -> Any:
        if self.arguments.task == "token":
            return transformers.DataCollatorForTokenClassification(self.tokenizer)
        return transformers.DataCollatorWithPadding(self.tokenizer)

    def report(self, averages: MeanAttention, ranking: HeadRanking, runs: list[dict[str, Any]]) -> None:
        """Writes results.json, table.md and the pictures."""
        rows = summarise(runs)
        chance = majority_share(self.train, self.validation)
        results = {
            "settings": self._settings(),
            "summary": rows,
            "majority": chance,
            "runs": runs,
            "head_ranking": ranking.order,
        }
        metric = METRICS[self.arguments.task]
        table = markdown_table(rows, metric)
        note = f"\nAlways the most frequent label of the training data: {100 * chance:.1f} %.\n"
        # Together, so that no table stands beside numbers of another run.
        with replaced_files(self.folder, "results.json") as new:
            write_json(new / "results.json", results)
            (new / "table.md").write_text(table + note, encoding="utf-8")
            plot_scores([row["fraction"] for row in rows], [row["scores"] for row in rows], metric, new / "scores.png")
            plot_attention_weights(ranking, new / "attention_weights.png")
            plot_constants(averages, ranking, new / "constants.png")
        print(table + note)


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2)
    write_whole(path, lambda draft: Path(draft).write_text(text + "\n", encoding="utf-8"))


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for every share of constant heads, ascending; drops are relative to no constant heads."""
    fractions = sorted({run["fraction"] for run in runs})
    scores = {fraction: [run["score"] for run in runs if run["fraction"] == fraction] for fraction in fractions}
    baseline = statistics.mean(scores[0]) if 0 in scores else None
    rows = []
    for fraction in fractions:
        mean = statistics.mean(scores[fraction])
        example = next(run for run in runs if run["fraction"] == fraction)
        rows.append(
            {
                "fraction": fraction,
                "heads": len(example["constant_heads"]),
                "parameters": example["parameters"],
                "scores": scores[fraction],
                "mean": mean,
                "deviation": statistics.stdev(scores[fraction]) if len(scores[fraction]) > 1 else 0.0,
                "relative_drop": (baseline - mean) / baseline if baseline else None,
                "seconds": sum(run["seconds"] for run in runs if run["fraction"] == fraction),
            }
        )
    return rows


def markdown_table(rows: list[dict[str, Any]], metric: str) -> str:
    lines = [
        f"| constant heads | parameters | {metric}, % | relative drop, % |",
        "|---:|---:|---:|---:|",
    ]
    for row in rows:
        drop = "–" if row["relative_drop"] is None else f"{100 * row['relative_drop']:.1f}"
        lines.append(
            f"| {row['heads']} ({100 * row['fraction']:.0f} %) | {row['parameters']:,} "
            f"| {100 * row['mean']:.1f} ± {100 * row['deviation']:.1f} | {drop} |"
        )
    return "\n".join(lines) + "\n"


def majority_share(train: datasets.Dataset, validation: datasets.Dataset) -> float:
    """How often the most frequent training label is right."""
    most_frequent = Counter(_labels(train)).most_common(1)[0][0]
    labels = list(_labels(validation))
    return labels.count(most_frequent) / len(labels)


def _labels(dataset: datasets.Dataset) -> list[int]:
    labels = dataset["labels"][:]
    flat = [label for row in labels for label in row] if isinstance(labels[0], list) else labels
    return [label for label in flat if label != IGNORED]


def _read(file: str, size: int) -> datasets.Dataset:
    suffix = Path(file).suffix
    if suffix not in FORMATS:
        raise ValueError(f"{file} must end in one of {', '.join(FORMATS)}, got {suffix!r}.")
    dataset = datasets.load_dataset(FORMATS[suffix], data_files=file, split="train")
    return dataset.shuffle(seed=0).select(range(min(size, len(dataset))))


def _model_class(arguments: StudyArguments) -> type:
    return papa_class(AutoConfig.from_pretrained(arguments.model).model_type, MODEL_SUFFIXES[arguments.task])


def _accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    labelled = prediction.label_ids != IGNORED
    return {"accuracy": float(np.mean(prediction.predictions[labelled] == prediction.label_ids[labelled]))}


if __name__ == "__main__":
    main()
