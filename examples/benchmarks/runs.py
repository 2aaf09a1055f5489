"""What the rows on inference time: one pass over texts with the plain model or with exits, in several ways."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from workload import BATCH_SIZE, Example, Workload

Thresholds = Sequence[float | None]


@dataclass(frozen=True)
class Cost:
    """What a pass over texts should take, in passes through all layers.

    Args:
        layers (`float`): Fraction of the layers run, each text counted once: the cost everywhere else in this project.
        tokens (`float`): The same with each text counted by its tokens. Time follows this one: if short texts leave
            earlier than long ones, less is saved than `layers` says.
    """

    layers: float
    tokens: float

    @classmethod
    def of(cls, exit_index: torch.Tensor, texts: Sequence[Example], exit_costs: list[float]) -> "Cost":
        """Of the exits taken, `exit_index (texts,)`."""
        fractions = torch.tensor(exit_costs, dtype=torch.float64)[exit_index]
        lengths = torch.tensor([len(text["input_ids"]) for text in texts], dtype=torch.float64)
        return cls(float(fractions.mean()), float((fractions * lengths).sum() / lengths.sum()))

    def to_dict(self) -> dict[str, float]:
        """By name, for the table."""
        return {"fraction of layers": self.layers, "weighted by tokens": self.tokens}


def by_length(texts: Sequence[Example]) -> list[Example]:
    """The longest first, as `predict` does it."""
    return sorted(texts, key=lambda text: -len(text["input_ids"]))


def in_batches(texts: Sequence[Example]) -> list[Sequence[Example]]:
    """In the order given."""
    return [texts[start : start + BATCH_SIZE] for start in range(0, len(texts), BATCH_SIZE)]


def ready_batches(workload: Workload, texts: Sequence[Example]) -> list[dict[str, torch.Tensor]]:
    """On the device, each of texts of similar length; the rows are in the order of `by_length`."""
    return [workload.batch(batch) for batch in in_batches(by_length(texts))]


class PlainPass:
    """The plain model on batches of texts, padded to the longest of each; sorting and padding are timed, too.

    Args:
        workload (`Workload`): Has the tokenizer and the device.
        texts (`Sequence[Example]`): In data set order.
        is_sorted (`bool`): Whether batches are of texts of similar length.
        model (*optional*): Instead of the workload's plain model.
    """

    def __init__(self, workload: Workload, texts: Sequence[Example], is_sorted: bool, model: Any = None):
        self.workload = workload
        self.texts = texts
        self.is_sorted = is_sorted
        self.model = workload.plain if model is None else model

    @torch.inference_mode()
    def __call__(self) -> None:
        texts = by_length(self.texts) if self.is_sorted else self.texts
        for batch in in_batches(texts):
            self.model(**self.workload.batch(batch))


class PlainBatches:
    """The plain model on batches that are ready.

    Args:
        workload (`Workload`): Has the model.
        batches (`list[dict[str, torch.Tensor]]`): On the device.
    """

    def __init__(self, workload: Workload, batches: list[dict[str, torch.Tensor]]):
        self.model = workload.plain
        self.batches = batches

    @torch.inference_mode()
    def __call__(self) -> None:
        for batch in self.batches:
            self.model(**batch)


class ExitBatches:
    """`forward` with early exit on batches that are ready.

    Args:
        workload (`Workload`): Has the model.
        batches (`list[dict[str, torch.Tensor]]`): On the device.
        thresholds (`Sequence[float | None]`): Of the exits.

    Attributes:
        exit_index: Of the latest pass, `(texts,)`, in the order of the batches.
    """

    def __init__(self, workload: Workload, batches: list[dict[str, torch.Tensor]], thresholds: Thresholds):
        self.model = workload.model
        self.batches = batches
        self.thresholds = list(thresholds)

    @torch.inference_mode()
    def __call__(self) -> None:
        taken = [self.model(**batch, exit_thresholds=self.thresholds).exit_index for batch in self.batches]
        self.exit_index = torch.cat(taken).cpu()


class Prediction:
    """`predict` over texts.

    Args:
        workload (`Workload`): Has the model.
        texts (`Sequence[Example]`): In data set order.
        thresholds (`Sequence[float | None]`): Of the exits.
        model (*optional*): Instead of the workload's model with exits.

    Attributes:
        cost: Of the latest pass.
    """

    def __init__(self, workload: Workload, texts: Sequence[Example], thresholds: Thresholds, model: Any = None):
        self.model = workload.model if model is None else model
        self.texts = texts
        self.thresholds = list(thresholds)

    def __call__(self) -> None:
        outputs = self.model.predict(self.texts, BATCH_SIZE, exit_thresholds=self.thresholds, show_progress=False)
        self.exit_index = outputs.exit_index

    @property
    def cost(self) -> Cost:
        return Cost.of(self.exit_index, self.texts, self.model.config.exit_costs)
