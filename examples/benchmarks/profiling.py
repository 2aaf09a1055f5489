"""Where the time of early exit goes: to longer texts, to smaller batches, and to all that is not a layer."""

import time
from collections.abc import Callable
from typing import Any

import torch
from inference import WARM_UP_TEXTS, layers_of
from measuring import Spread, measure_in_turn, ratio, wait_for
from results import Result
from runs import ExitBatches, PlainBatches, PlainPass, Prediction, ready_batches
from workload import Example, Workload

Pair = tuple[ExitBatches | Prediction, PlainBatches | PlainPass]


def where_time_goes(workload: Workload) -> list[Result]:
    """Three ratios whose product is that of `early_exit_in_batches`, and three for `prediction`."""

    def forward(texts: list[Example]) -> Pair:
        batches = ready_batches(workload, texts)
        return ExitBatches(workload, batches, workload.thresholds), PlainBatches(workload, batches)

    def predict(texts: list[Example]) -> Pair:
        return Prediction(workload, texts, workload.thresholds), PlainPass(workload, texts, is_sorted=True)

    return [
        *_profile(workload, "forward", forward, workload.few_texts),
        *_profile(workload, "predict", predict, workload.texts),
    ]


def _profile(
    workload: Workload, name: str, runs: Callable[[list[Example]], Pair], texts: list[Example]
) -> list[Result]:
    timed, warm_up = (_timed(workload, *runs(some)) for some in (texts, texts[:WARM_UP_TEXTS]))
    title = f"where the time of {name} goes"
    seconds = measure_in_turn(timed, warm_up, workload.size.repeats, workload.device, title)
    early, plain = timed["early"], timed["plain"]
    exit_costs = torch.tensor(workload.model.config.exit_costs, dtype=torch.float64)
    fraction = exit_costs[early.run.exit_index].mean().item()
    tokens = early.tokens / plain.tokens
    outside = {
        key: [total / in_layers for total, in_layers in zip(seconds[key], run.seconds)] for key, run in timed.items()
    }
    factors = {
        "tokens × layers / plain model's / fraction of layers run": Spread.of([tokens / fraction]),
        "time in layers per token / plain model's": ratio(early.seconds, plain.seconds, tokens),
        "time / time in layers / the same of the plain model": ratio(outside["early"], outside["plain"]),
    }
    values = {"fraction of layers": fraction}
    return [Result("where_time_goes", title, what, None, spread, values) for what, spread in factors.items()]


def _timed(
    workload: Workload, early: ExitBatches | Prediction, plain: PlainBatches | PlainPass
) -> dict[str, "LayersTimed"]:
    return {
        "early": LayersTimed(early, workload.model, workload.device),
        "plain": LayersTimed(plain, workload.plain, workload.device),
    }


class LayersTimed:
    """A run of which the time in the layers is taken. It waits for the device before and after each layer.

    Args:
        run (`Callable`): Runs the model.
        model: Whose layers.
        device (`torch.device`): Where it is.

    Attributes:
        seconds: In the layers, of every pass.
        tokens: Positions, padding included, that the layers were run on in the latest pass, summed over layers.
    """

    def __init__(self, run: Any, model: Any, device: torch.device):
        self.run = run
        self.layers = layers_of(model)
        self.device = device
        self.seconds: list[float] = []
        self.tokens = 0

    def __call__(self) -> None:
        self.seconds.append(0.0)
        self.tokens = 0
        hooks = [layer.register_forward_pre_hook(self._start) for layer in self.layers]
        hooks += [layer.register_forward_hook(self._stop) for layer in self.layers]
        self.run()
        for hook in hooks:
            hook.remove()

    def _start(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        wait_for(self.device)
        self._started = time.perf_counter()

    def _stop(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        wait_for(self.device)
        self.seconds[-1] += time.perf_counter() - self._started
        self.tokens += inputs[0].shape[:2].numel()
