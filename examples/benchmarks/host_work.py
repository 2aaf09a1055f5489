"""The row on what `predict` does for each text beside running layers and heads."""

import time
from typing import Any

import torch
from datasets import Dataset
from inference import WARM_UP_TEXTS, layers_of
from measuring import Spread, measure_in_turn, wait_for
from results import Result, Target
from runs import Prediction
from workload import Workload


def host_work(workload: Workload) -> list[Result]:
    """Microseconds a text of `predict` over a `datasets.Dataset`: reading, sorting, batches, embeddings, decisions."""
    texts = Dataset.from_list([dict(text) for text in workload.texts])
    run = OutsideTimed(Prediction(workload, texts, workload.thresholds), workload.model, workload.device)
    few = Prediction(workload, texts.select(range(min(WARM_UP_TEXTS, len(texts)))), workload.thresholds)
    repeats = workload.size.repeats
    seconds = measure_in_turn({"predict": run}, {"predict": few}, repeats, workload.device, "host work")["predict"]
    outside = [1e6 * (total - inside) / len(texts) for total, inside in zip(seconds, run.seconds)]
    return [
        Result(
            "host_work",
            f"host work of predict over a datasets.Dataset of {len(texts)} texts",
            "microseconds a text outside layers and heads",
            Target(20),
            Spread.of(outside),
            {"predict, microseconds a text": 1e6 * min(seconds) / len(texts)},
        )
    ]


class OutsideTimed:
    """A run of which the time in layers and heads is taken; it waits for the device before and after each.

    Args:
        run (`Callable`): Runs the model.
        model: Whose layers and heads.
        device (`torch.device`): Where it is.

    Attributes:
        seconds: In layers and heads, of every pass.
    """

    def __init__(self, run: Any, model: Any, device: torch.device):
        self.run = run
        parts_of_heads = [part for part in model.exits.modules() if not list(part.children())]
        self.modules = [*layers_of(model), *parts_of_heads]
        self.device = device
        self.seconds: list[float] = []

    def __call__(self) -> None:
        self.seconds.append(0.0)
        hooks = [module.register_forward_pre_hook(self._start) for module in self.modules]
        hooks += [module.register_forward_hook(self._stop) for module in self.modules]
        self.run()
        for hook in hooks:
            hook.remove()

    def _start(self, *_: Any) -> None:
        wait_for(self.device)
        self._started = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        wait_for(self.device)
        self.seconds[-1] += time.perf_counter() - self._started
