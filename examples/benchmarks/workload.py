"""What is measured: a real encoder, with exits and without, and real texts."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from hf_adaptive import AutoModelForSequenceClassificationWithExits, evaluate_exits
from hf_adaptive.modeling.criteria import CRITERIA
from hf_adaptive.modeling.switch import replaced_files

sys.path.append(str(Path(__file__).resolve().parent.parent))
from text_data import DataArguments, encoder_path, label_fields, load_splits

BATCH_SIZE = 32
LONGEST = 128
ISSUE_COST = 0.44
# Nobody's softmax is this sure, but the exits have to be asked.
NOBODY_REACHES = 1.0

Example = Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is run.

    Args:
        encoder (`str`): As in `text_data.encoder_path`.
        exit_layers (`list[int]`): Layers run before each exit.
        even_exit_layers (`list[int]`, *optional*): As `exit_layers`, in segments of one size: where SWEET saves most
            memory. None if the segments of `exit_layers` are no longer.
        train_texts (`int`): For the exits.
        texts (`int`): Timed by `prediction`.
        few_texts (`int`): Timed by the other rows.
        step_batches (`int`): Training batches that are timed.
        memory_rows (`int`): Rows of the batch whose memory is measured.
        repeats (`int`): How often everything is timed.
        bert_is_random (`bool`): Whether constant heads are measured on a BERT base with random weights rather than on
            the encoder. Speed does not depend on the weights.
    """

    encoder: str
    exit_layers: list[int]
    even_exit_layers: list[int] | None
    train_texts: int
    texts: int
    few_texts: int
    step_batches: int
    memory_rows: int
    many_rows: int
    repeats: int
    bert_is_random: bool


FULL = Size("mpnet", [1, 4, 6, 12], [3, 6, 9, 12], 1024, 2048, 512, 6, 32, 1_000_000, 5, bert_is_random=True)
QUICK = Size("minilm", [1, 2, 4, 6], None, 512, 512, 128, 2, 16, 50_000, 2, bert_is_random=False)


class Workload:
    """Models and texts; each is made when a row asks for it first.

    Args:
        size (`Size`): How much is run.
        data (`DataArguments`): Texts to train on, and to time where no files are named for that.
        texts (`list[str]`): Local files with the texts that are timed.
        checkpoint (`str`, *optional*): A classifier with trained exits on the same encoder; else one is made.
        folder (`Path`): Where models are kept, so that a second run finds them.
    """

    def __init__(self, size: Size, data: DataArguments, texts: list[str], checkpoint: str | None, folder: Path):
        self.size = size
        self.data = data
        self.text_files = texts
        self.folder = folder
        self.given_checkpoint = checkpoint
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = encoder_path(size.encoder)
        self.tokenizer = AutoTokenizer.from_pretrained(self.encoder)
        positions = AutoConfig.from_pretrained(self.encoder).max_position_embeddings
        self.longest = min(LONGEST, self.tokenizer.model_max_length, positions)

    # Texts

    @cached_property
    def _splits(self) -> dict[str, Dataset]:
        """Texts for training and to time, none in both."""
        whole = dataclasses.replace(self.data, max_train_examples=sys.maxsize, max_eval_examples=sys.maxsize)
        splits = load_splits(whole)
        timed = [splits["test"], splits["validation"]]
        if self.text_files:
            timed = [load_splits(dataclasses.replace(whole, test_file=file))["test"] for file in self.text_files]
        train = min(self.size.train_texts, len(splits["train"]))
        return {
            "train": splits["train"].select(range(train)),
            "timed": concatenate_datasets(timed).shuffle(seed=0),
        }

    @cached_property
    def label_names(self) -> list[str]:
        return self._splits["train"].features["label"].names

    def tokenised(self, split: str, most: int) -> list[Example]:
        """Up to so many examples of a split, as the models take them, in data set order."""
        texts = self._splits[split]
        texts = texts.select(range(min(most, len(texts))))
        encoded = self.tokenizer(list(texts["text"]), truncation=True, max_length=self.longest)
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": label}
            for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], texts["label"])
        ]

    @cached_property
    def texts(self) -> list[Example]:
        return self.tokenised("timed", self.size.texts)

    @property
    def few_texts(self) -> list[Example]:
        return self.texts[: self.size.few_texts]

    def batch(self, examples: Sequence[Example], length: int | None = None) -> dict[str, torch.Tensor]:
        """Examples padded to the longest of them, or to `length`; on the device."""
        length = length or max(len(example["input_ids"]) for example in examples)
        return {
            "input_ids": self._padded(examples, "input_ids", self.tokenizer.pad_token_id, length),
            "attention_mask": self._padded(examples, "attention_mask", 0, length),
        }

    def training_batch(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """As `batch`, with labels."""
        labels = torch.tensor([example["labels"] for example in examples], device=self.device)
        return {**self.batch(examples), "labels": labels}

    def _padded(self, examples: Sequence[Example], name: str, value: int, length: int) -> torch.Tensor:
        rows = [[*example[name], *[value] * (length - len(example[name]))] for example in examples]
        return torch.tensor(rows, device=self.device)

    # Models

    @cached_property
    def plain(self) -> Any:
        """The stock classifier on the encoder, without exits."""
        return AutoModelForSequenceClassification.from_pretrained(self.plain_checkpoint).to(self.device).eval()

    @cached_property
    def plain_checkpoint(self) -> Path:
        """A checkpoint of the stock classifier."""
        folder = self.folder / "models" / f"{self._name}-plain"
        if not (folder / "config.json").exists():
            stock = AutoModelForSequenceClassification.from_pretrained(self.encoder, **self._labels)
            with replaced_files(folder, "config.json") as new:
                stock.save_pretrained(new)
        return folder

    @cached_property
    def model(self) -> Any:
        """The encoder with trained exits."""
        model = AutoModelForSequenceClassificationWithExits.from_pretrained(self.exits_checkpoint)
        return model.to(self.device).eval()

    @cached_property
    def exits_checkpoint(self) -> str | Path:
        """A checkpoint with trained exits. Only they are trained: the layers stay the plain model's."""
        if self.given_checkpoint is not None:
            return self.given_checkpoint
        name = "-".join(map(str, self.size.exit_layers))
        folder = self.folder / "models" / f"{self._name}-exits-{name}"
        if not (folder / "config.json").exists():
            self._train_exits(folder)
        return folder

    @cached_property
    def thresholds(self) -> list[float]:
        """One for all exits, with which the timed texts take the issue's fraction of the layers, or just less.

        Speed at that fraction is asked for. What the answers are worth is not, so no other texts are needed.
        """
        config = self.model.config
        useful = CRITERIA[config.exit_criterion].useful_thresholds(config.num_labels, len(config.exit_layers))
        grid = torch.linspace(useful[0], useful[-1], 1001).tolist()
        curve = evaluate_exits(self.model, self.texts, thresholds=grid, timed_examples=0).curve
        within = [point for point in curve if point.cost <= ISSUE_COST]
        if not within:
            raise ValueError(
                f"no thresholds give a cost of {ISSUE_COST}: exits after {config.exit_layers} layers allow "
                f"{config.exit_costs[0]:.2f} to 1. Choose an earlier first exit."
            )
        return same_for_all(max(within, key=lambda point: point.cost).threshold, config)

    @cached_property
    def bert(self) -> str | Path:
        """A checkpoint whose heads can be made constant."""
        if not self.size.bert_is_random:
            return self.encoder
        folder = self.folder / "models" / "bert-base-random"
        if not (folder / "config.json").exists():
            config = BertConfig(vocab_size=len(self.tokenizer), pad_token_id=self.tokenizer.pad_token_id)
            with replaced_files(folder, "config.json") as new:
                BertForSequenceClassification(config).save_pretrained(new)
        return folder

    def untrained(self, **fields: Any) -> Any:
        """The encoder with new exits, to train."""
        return AutoModelForSequenceClassificationWithExits.from_pretrained(
            self.encoder, exit_pooling="mean", **fields, **self._labels
        )

    @property
    def _name(self) -> str:
        return Path(self.encoder).name

    @property
    def _labels(self) -> dict[str, Any]:
        return label_fields(self.label_names)

    def _train_exits(self, folder: Path) -> None:
        model = self.untrained(exit_layers=self.size.exit_layers, exit_routing="disjoint")
        arguments = TrainingArguments(
            output_dir=str(self.folder / "trainer"),
            num_train_epochs=2,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=self.tokenised("train", self.size.train_texts),
            data_collator=DataCollatorWithPadding(self.tokenizer),
        )
        trainer.train()
        model.save_pretrained(folder)


def same_for_all(threshold: float, config: Any) -> list[float]:
    """One threshold for every exit but the last."""
    return [threshold] * (len(config.exit_layers) - 1)
