"""The row on what `predict` does for each text beside running layers and heads."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from inference import WARM_UP_TEXTS, layers_of
from measuring import Spread, measure_in_turn, wait_for
from results import Result, Target
from runs import Prediction
from workload import Workload


def host_work(workload: Workload) -> list[Result]:
    """Microseconds a text of `predict` over a `datasets.Dataset`: reading, sorting, batches, embeddings, decisions.

    What the embeddings take is told beside: they are the model's own arithmetic, but neither layers nor heads. So is
    the processor's time, which other programs on the machine change less.
    """
    texts = Dataset.from_list([dict(text) for text in workload.texts])
    run = OutsideTimed(Prediction(workload, texts, workload.thresholds), workload.model, workload.device)
    few = Prediction(workload, texts.select(range(min(WARM_UP_TEXTS, len(texts)))), workload.thresholds)
    repeats = workload.size.repeats
    measure_in_turn({"predict": run}, {"predict": few}, repeats, workload.device, "host work")
    outside = [1e6 * one.outside.wall / len(texts) for one in run.passes]
    least = min(run.passes, key=lambda one: one.outside.wall)
    values = {
        "predict, microseconds a text": 1e6 * least.whole.wall / len(texts),
        "of it embeddings": 1e6 * least.embeddings.wall / len(texts),
        "outside in processor time": 1e6 * least.outside.processor / len(texts),
        "of it embeddings in processor time": 1e6 * least.embeddings.processor / len(texts),
        "batches": least.batches,
        "outside without embeddings, microseconds a batch": 1e6
        * (least.outside.wall - least.embeddings.wall)
        / least.batches,
    }
    return [
        Result(
            "host_work",
            f"host work of predict over a datasets.Dataset of {len(texts)} texts",
            "microseconds a text outside layers and heads",
            Target(20),
            Spread.of(outside),
            values,
        )
    ]


@dataclass(frozen=True)
class Seconds:
    """Two clocks.

    Args:
        wall (`float`): As on the wall.
        processor (`float`): In which this process had a processor, all threads together.
    """

    wall: float = 0.0
    processor: float = 0.0

    @classmethod
    def now(cls) -> "Seconds":
        """From here on."""
        return cls(time.perf_counter(), time.process_time())

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall + other.wall, self.processor + other.processor)

    def __sub__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall - other.wall, self.processor - other.processor)


@dataclass
class Pass:
    """Where the time of one pass went.

    Args:
        whole (`Seconds`): All of it.
        inside (`Seconds`): In layers and heads.
        embeddings (`Seconds`): In the embeddings.
        batches (`int`): How often the backbone was called.
    """

    whole: Seconds = Seconds()
    inside: Seconds = Seconds()
    embeddings: Seconds = Seconds()
    batches: int = 0

    @property
    def outside(self) -> Seconds:
        """Neither in layers nor in heads."""
        return self.whole - self.inside


class OutsideTimed:
    """A run of which the time in layers and heads is taken; it waits for the device before and after each.

    Args:
        run (`Callable`): Runs the model.
        model: Whose layers and heads.
        device (`torch.device`): Where it is.

    Attributes:
        passes: Of every call.
    """

    def __init__(self, run: Any, model: Any, device: torch.device):
        self.run = run
        self.model = model
        branches = [layer for head in model.exits for layer in head.branch]
        self.layers_and_heads = [*layers_of(model), *model.exits, *branches]
        self.embeddings = embeddings_of(model)
        self.device = device
        self.passes: list[Pass] = []

    def __call__(self) -> None:
        self.passes.append(Pass())
        timed = [*self.layers_and_heads, self.embeddings]
        hooks = [module.register_forward_pre_hook(self._start) for module in timed]
        hooks += [module.register_forward_hook(self._stop) for module in self.layers_and_heads]
        hooks += [
            self.embeddings.register_forward_hook(self._stop_embeddings),
            self.model.base_model.register_forward_pre_hook(self._count),
        ]
        start = Seconds.now()
        self.run()
        wait_for(self.device)
        self.passes[-1].whole = Seconds.now() - start
        for hook in hooks:
            hook.remove()

    def _start(self, *_: Any) -> None:
        wait_for(self.device)
        self._started = Seconds.now()

    def _stop(self, *_: Any) -> None:
        self.passes[-1].inside += self._since_start()

    def _stop_embeddings(self, *_: Any) -> None:
        self.passes[-1].embeddings += self._since_start()

    def _since_start(self) -> Seconds:
        wait_for(self.device)
        return Seconds.now() - self._started

    def _count(self, *_: Any) -> None:
        self.passes[-1].batches += 1


def embeddings_of(model: Any) -> torch.nn.Module:
    """The part of the backbone that looks tokens up."""
    table = model.get_input_embeddings()
    return next(part for part in model.base_model.children() if table in part.modules())
