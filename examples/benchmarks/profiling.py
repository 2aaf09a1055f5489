"""Where the time of early exit goes: to longer texts, to smaller batches, and to all that is not a layer."""

import time
from typing import Any

import torch
from inference import layers_of
from measuring import Run, Spread, ratio, seconds_of, wait_for
from results import Result
from runs import ExitBatches, PlainBatches, PlainPass, Prediction, by_length, in_batches
from tqdm.auto import tqdm
from workload import Workload


def where_time_goes(workload: Workload) -> list[Result]:
    """Three ratios whose product is that of `early_exit_in_batches`, and three for `prediction`."""
    thresholds = workload.thresholds
    batches = [workload.batch(batch) for batch in in_batches(by_length(workload.few_texts))]
    forward = ExitBatches(workload, batches, thresholds)
    predict = Prediction(workload, workload.texts, thresholds)
    return [
        *_profile(workload, "forward", forward, PlainBatches(workload, batches)),
        *_profile(workload, "predict", predict, PlainPass(workload, workload.texts, is_sorted=True)),
    ]


def _profile(workload: Workload, name: str, early: ExitBatches | Prediction, plain: Run) -> list[Result]:
    clocks = LayerClock(workload.model, workload.device), LayerClock(workload.plain, workload.device)
    for _ in tqdm(range(workload.size.repeats + 1), desc=f"where the time of {name} goes"):
        for clock, run in zip(clocks, (early, plain)):
            clock.measure(run)
    with_exits, without = clocks
    exit_layers = torch.tensor(early.model.config.exit_layers, dtype=torch.float64)
    fraction = (exit_layers[early.exit_index].mean() / exit_layers[-1]).item()
    factors = {
        "tokens × layers / plain model's / fraction of layers run": Spread.of(
            [with_exits.tokens / without.tokens / fraction]
        ),
        "time in layers per token / plain model's": ratio(
            with_exits.in_layers, without.in_layers, with_exits.tokens / without.tokens
        ),
        "time / time in layers / the same of the plain model": ratio(with_exits.outside, without.outside),
    }
    values = {"fraction of layers": fraction}
    return [
        Result("where_time_goes", f"where the time of {name} goes", what, None, spread, values)
        for what, spread in factors.items()
    ]


class LayerClock:
    """Times the layers of a model beside the whole of it, waiting for the device before and after each layer.

    The first pass is a warm-up, and not among the results.

    Args:
        model: Whose layers.
        device (`torch.device`): Where it is.

    Attributes:
        tokens: Positions, padding included, that the layers were run on in the latest pass, summed over layers.
    """

    def __init__(self, model: Any, device: torch.device):
        self.layers = layers_of(model)
        self.device = device
        self.tokens = 0
        self._passes: list[tuple[float, float]] = []

    @property
    def in_layers(self) -> list[float]:
        """Seconds in the layers, of every pass."""
        return [in_layers for _, in_layers in self._passes[1:]]

    @property
    def outside(self) -> list[float]:
        """Time / time in the layers, of every pass."""
        return [total / in_layers for total, in_layers in self._passes[1:]]

    def measure(self, run: Run) -> None:
        """Times one pass."""
        self.tokens, self._seconds = 0, 0.0
        hooks = [layer.register_forward_pre_hook(self._start) for layer in self.layers]
        hooks += [layer.register_forward_hook(self._stop) for layer in self.layers]
        total = seconds_of(run, self.device)
        for hook in hooks:
            hook.remove()
        self._passes.append((total, self._seconds))

    def _start(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        wait_for(self.device)
        self._started = time.perf_counter()

    def _stop(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        wait_for(self.device)
        self._seconds += time.perf_counter() - self._started
        self.tokens += inputs[0].shape[:2].numel()
