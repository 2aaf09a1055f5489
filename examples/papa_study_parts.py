"""One encoder on one task of examples/run_papa.py: averages, ranking, probes. Each step's result is a file; a step
whose file is there is not repeated.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer, Trainer, TrainingArguments
from transformers.modeling_outputs import BaseModelOutput

from hf_adaptive.files import identified, public_name
from hf_adaptive.modeling.architectures import papa_class
from hf_adaptive.probing import (
    HeadRanking,
    MeanAttention,
    fix_sequence_positions,
    fix_token_positions,
    mean_attention,
    rank_heads,
)
from study_files import keep_settings, write_json
from text_data import encoder_path

KINDS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
# Columns that are looked for where a task does not name them.
TEXTS, PAIRS = ("text", "tokens", "sentence1", "sentence"), ("sentence2", "text_pair")
LABELS = ("label", "labels", "pos_tags", "ner_tags")
# What of the arguments changes a part's results, beside its encoder and task.
SETTINGS = (
    *("fixed_positions", "train_examples", "test_examples", "epochs", "learning_rate", "ranking_examples"),
    *("ranking_epochs", "lambda_learning_rate", "exits_epochs", "exits_learning_rate", "max_accuracy_drop"),
    *("batch_size", "bf16"),
)
IGNORED = -100
EVALUATION_BATCH = 32
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Task:
    """What to classify.

    Args:
        name (`str`): In the results.
        folder (`str`): Has the files.
        text, pair, label (`str`, *optional*): Columns.
        length (`int`): In tokens; longer inputs are cut.
    """

    name: str
    folder: str
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    length: int = 64

    @classmethod
    def parse(cls, words: str) -> "Task":
        """A task as it is given on the command line: `name=folder[,field=value...]`."""
        pairs = [word.partition("=") for word in words.split(",")]
        known = [item.name for item in dataclasses.fields(cls)][2:]
        fields: dict[str, Any] = {name: value for name, _, value in pairs[1:]}
        if not pairs[0][2] or not set(fields) <= set(known) or not fields.get("length", "1").isdigit():
            raise ValueError(
                f"a task must be name=folder, followed by any of {', '.join(f',{name}=…' for name in known)}, got "
                f"{words!r}. For example mrpc=data/mrpc,length=96."
            )
        return cls(pairs[0][0], pairs[0][2], **{**fields, "length": int(fields.get("length", cls.length))})


class Part:
    """One encoder on one task.

    Args:
        model (`str`): As in `text_data.encoder_path`.
        task (`Task`): The task.
        arguments (`StudyArguments`): Of the study.
    """

    def __init__(self, model: str, task: Task, arguments: Any) -> None:
        self.encoder = encoder_path(model)
        self.task = task
        self.arguments = arguments
        self.model = public_name(model)
        self.name = f"{self.model}/{task.name}"
        self.folder = Path(arguments.output_dir) / "parts" / self.model / task.name
        self.config = AutoConfig.from_pretrained(self.encoder)
        self._check_settings()

    def _check_settings(self) -> None:
        """Steps of other settings must not be mixed with these."""
        # Where files lie on this machine is nobody's business, and does not change what is in them.
        settings = {name: getattr(self.arguments, name) for name in SETTINGS}
        settings |= {**dataclasses.asdict(self.task), "folder": identified(self.task.folder)}
        settings |= {"model": self.model, "encoder": identified(self.encoder)}
        keep_settings(self.folder, settings)

    # Data

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.encoder, add_prefix_space=True)

    @cached_property
    def splits(self) -> dict[str, datasets.Dataset]:
        """Tokenised `train`, `validation` (as many as in test; none of the others) and `test`."""
        train, test = self._read("train"), self._read("test")
        test = test.select(range(min(self.arguments.test_examples, len(test))))
        size = min(self.arguments.train_examples, len(train) - len(test))
        if size < 1:
            raise ValueError(
                f"{self.task.folder} has {len(train)} training examples, too few for {len(test)} to test."
            )
        splits = {
            "train": train.select(range(size)),
            "validation": train.select(range(size, size + len(test))),
            "test": test,
        }
        return {name: self._tokenized(split) for name, split in splits.items()}

    def _read(self, split: str) -> datasets.Dataset:
        files = [file for file in Path(self.task.folder).glob(f"{split}.*") if file.suffix in KINDS]
        if len(files) != 1:
            raise ValueError(
                f"{self.task.folder} must have one file {split} that ends in one of {', '.join(KINDS)}, got {files}."
            )
        data = datasets.load_dataset(KINDS[files[0].suffix], data_files=str(files[0]), split="train")
        return data.shuffle(seed=0)

    def _tokenized(self, data: datasets.Dataset) -> datasets.Dataset:
        text = _column(data, self.task.text, TEXTS)
        label = _column(data, self.task.label, LABELS)
        pair = self.task.pair or next((name for name in PAIRS if name in data.column_names), None)
        if isinstance(data[0][label], list):
            return data.map(lambda row: self._encode_words(row[text], row[label]), remove_columns=data.column_names)
        return data.map(
            lambda row: self._encode_text(row[text], row[pair] if pair else None, row[label]),
            remove_columns=data.column_names,
        )

    def _encode_text(self, text: str, pair: str | None, label: int) -> dict[str, Any]:
        encoded = self.tokenizer(text, pair, truncation=True, max_length=self.task.length)
        return {**self._placed(dict(encoded), fix_sequence_positions), "labels": label}

    def _encode_words(self, words: list[str], labels: list[int]) -> dict[str, Any]:
        """The first piece of every word has its label, the others none."""
        encoded = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.task.length)
        places = encoded.word_ids()
        of_pieces = [
            labels[place] if place is not None and place != before else IGNORED
            for before, place in zip([None, *places], places)
        ]
        return self._placed({**encoded, "labels": of_pieces}, fix_token_positions)

    def _placed(self, encoded: dict[str, Any], fix: Any) -> dict[str, Any]:
        if not self.arguments.fixed_positions:
            return encoded
        tokenizer = self.tokenizer
        ids = {"sep_token_id": tokenizer.sep_token_id, "pad_token_id": tokenizer.pad_token_id}
        return fix(encoded, max_length=self.task.length, **ids)

    @cached_property
    def is_token_task(self) -> bool:
        return isinstance(self.splits["train"][0]["labels"], list)

    @cached_property
    def num_labels(self) -> int:
        return 1 + max(label for split in self.splits.values() for label in _labels(split))

    @cached_property
    def majority(self) -> float:
        """How often the most frequent training label is right."""
        most_frequent = Counter(_labels(self.splits["train"])).most_common(1)[0][0]
        labels = _labels(self.splits["test"])
        return labels.count(most_frequent) / len(labels)

    def batches(self, split: str, most: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """A split in padded batches of similar length."""
        data = self.splits[split]
        rows = sorted(data.select(range(min(most or len(data), len(data)))), key=lambda row: len(row["input_ids"]))
        for start in range(0, len(rows), EVALUATION_BATCH):
            yield self.collator(rows[start : start + EVALUATION_BATCH])

    @cached_property
    def collator(self) -> Any:
        if self.is_token_task:
            return transformers.DataCollatorForTokenClassification(self.tokenizer)
        return transformers.DataCollatorWithPadding(self.tokenizer)

    # Averages and ranking

    @cached_property
    def averages(self) -> MeanAttention:
        """Average attention over the training texts."""
        path = self.folder / "averages.safetensors"
        # Short texts together: less padding to compute.
        texts = self.splits["train"].map(lambda row: {"length": len(row["input_ids"])}).sort("length")
        model = AutoModel.from_pretrained(self.encoder).to(DEVICE)
        return mean_attention(model, texts, self.task.length, batch_size=32, path=path, save_every=20)

    @cached_property
    def ranking(self) -> HeadRanking:
        """How much attention every head needs, learned on the training texts."""
        path = self.folder / "head_ranking.json"
        if path.exists():
            return HeadRanking.load(path)
        train = self.splits["train"]
        ranking = rank_heads(
            self.papa_model(0, self.arguments.seeds[0]),
            self.averages,
            train.select(range(min(self.arguments.ranking_examples, len(train)))),
            self.training_arguments(
                self.arguments.seeds[0],
                num_train_epochs=self.arguments.ranking_epochs,
                bf16=self.arguments.bf16,
                train_sampling_strategy="group_by_length",
            ),
            data_collator=self.collator,
            lambda_learning_rate=self.arguments.lambda_learning_rate,
        )
        ranking.save(path)
        return ranking

    def papa_model(self, fraction: float, seed: int) -> Any:
        """The probe, untrained, with a share of the heads constant."""
        suffix = "ForTokenClassification" if self.is_token_task else "ForSequenceClassification"
        transformers.set_seed(seed)
        return papa_class(self.config.model_type, suffix).from_pretrained(
            self.encoder,
            constants=self.averages,
            constant_heads=fraction,
            head_ranking=self.ranking.order if 0 < fraction < 1 else None,
            num_labels=self.num_labels,
        )

    def training_arguments(self, seed: int, **fields: Any) -> TrainingArguments:
        """Of any training here; unless said otherwise that of the probe."""
        common = {
            "num_train_epochs": self.arguments.epochs,
            "learning_rate": self.arguments.learning_rate,
            "per_device_train_batch_size": self.arguments.batch_size,
            "per_device_eval_batch_size": EVALUATION_BATCH,
        }
        return TrainingArguments(
            output_dir=str(self.folder / "trainer"),
            seed=seed,
            use_cpu=DEVICE.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            **{**common, **fields},
        )

    # Probes

    def probes(self) -> None:
        """Ranks the heads; trains and scores the probe for every share of constant heads and every seed."""
        self.ranking.save(self.folder / "head_ranking.json")
        write_json(
            self.folder / "part.json",
            {
                "model": self.model,
                "task": self.task.name,
                "metric": "token accuracy" if self.is_token_task else "accuracy",
                "majority": self.majority,
                "examples": {name: len(split) for name, split in self.splits.items()},
                "layers": self.config.num_hidden_layers,
                "heads": self.config.num_attention_heads,
            },
        )
        for fraction in tqdm(self.arguments.fractions, desc=f"{self.name}: shares of constant heads"):
            missing = [seed for seed in self.arguments.seeds if not self._run_file(fraction, seed).exists()]
            if missing:
                self._train_probes(fraction, missing)

    def _run_file(self, fraction: float, seed: int) -> Path:
        return self.folder / "runs" / f"constant-{fraction:.4f}-seed-{seed}.json"

    def _train_probes(self, fraction: float, seeds: list[int]) -> None:
        frozen = self.papa_model(fraction, seeds[0])
        train, test = (self._stored_states(frozen, split) for split in ("train", "test"))
        for seed in seeds:
            model = self.papa_model(fraction, seed)
            setattr(model, model.base_model_prefix, StoredStates(1 + self.config.num_hidden_layers))
            trainer = Trainer(
                model=model,
                args=self.training_arguments(seed, remove_unused_columns=False),
                train_dataset=train,
                data_collator=collate_states,
                compute_metrics=_accuracy,
                preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
            )
            trainer.train()
            run = {
                "fraction": fraction,
                "seed": seed,
                "constant_heads": len(model.config.constant_heads),
                "parameters": frozen.base_model.num_parameters(),
                "score": trainer.evaluate(test)["eval_accuracy"],
            }
            write_json(self._run_file(fraction, seed), run)

    @torch.no_grad()
    def _stored_states(self, model: Any, split: str) -> list[dict[str, torch.Tensor]]:
        """What a frozen backbone gives for every example: its embeddings and the outputs of all layers."""
        backbone = model.base_model.eval().to(DEVICE)
        rows = []
        for batch in self.batches(split):
            labels = batch.pop("labels")
            inputs = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.arguments.bf16):
                states = backbone(**inputs, output_hidden_states=True).hidden_states
            # Half of the memory, and more digits than a frozen encoder's states have meaning.
            states = torch.cat(states, dim=-1).half().cpu()
            for state, mask, label in zip(states, batch["attention_mask"], labels):
                end = int(mask.nonzero().max()) + 1
                label = label[:end] if label.dim() else label
                rows.append({"inputs_embeds": state[:end].clone(), "attention_mask": mask[:end], "labels": label})
        return rows


class StoredStates(nn.Module):
    """Stands for a frozen backbone and hands out what it gave before.

    Args:
        count (`int`): How many states lie side by side in `inputs_embeds`.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, inputs_embeds: torch.Tensor, **others: Any) -> BaseModelOutput:
        return BaseModelOutput(hidden_states=inputs_embeds.chunk(self.count, dim=-1))


def collate_states(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A padded batch of stored states."""
    states, masks, labels = ([row[name] for row in rows] for name in ("inputs_embeds", "attention_mask", "labels"))
    is_token_task = labels[0].dim() > 0
    return {
        "inputs_embeds": pad_sequence(states, batch_first=True).float(),
        "attention_mask": pad_sequence(masks, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        if is_token_task
        else torch.stack(labels),
    }


def _column(data: datasets.Dataset, named: str | None, usual: tuple[str, ...]) -> str:
    found = [name for name in ([named] if named else usual) if name in data.column_names]
    if not found:
        raise ValueError(f"there is no column {named or ' or '.join(usual)}; there are {data.column_names}.")
    return found[0]


def _labels(data: datasets.Dataset) -> list[int]:
    labels = data["labels"][:]
    flat = [label for row in labels for label in row] if isinstance(labels[0], list) else labels
    return [label for label in flat if label != IGNORED]


def _accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    labelled = prediction.label_ids != IGNORED
    return {"accuracy": float(np.mean(prediction.predictions[labelled] == prediction.label_ids[labelled]))}
