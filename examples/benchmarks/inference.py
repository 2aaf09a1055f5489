"""The rows on inference: early exit beside the plain model."""

import copy

import torch
from measuring import Run, measure_in_turn, medians, ratio
from results import CurvePoint, Result, Target
from runs import Cost, ExitBatches, PlainBatches, PlainPass, Prediction, by_length, ready_batches
from workload import BATCH_SIZE, NOBODY_REACHES, Example, Workload, same_for_all

from hf_adaptive.modeling.criteria import CRITERIA

WARM_UP_TEXTS = 2 * BATCH_SIZE


def early_exit_in_batches(workload: Workload) -> list[Result]:
    """`forward` on batches of similar length beside the plain model on the same batches."""
    thresholds = workload.thresholds
    texts = by_length(workload.few_texts)
    batches = ready_batches(workload, texts)
    early, plain = ExitBatches(workload, batches, thresholds), PlainBatches(workload, batches)
    warm_up = {"early": ExitBatches(workload, batches[:2], thresholds), "plain": PlainBatches(workload, batches[:2])}
    repeats = 3 * workload.size.repeats  # a pass is short
    seconds = measure_in_turn(
        {"early": early, "plain": plain}, warm_up, repeats, workload.device, "early exit in batches"
    )
    cost = Cost.of(early.exit_index, texts, workload.model.config.exit_costs)
    return [
        Result(
            "early_exit_in_batches",
            f"early exit in a batch of {BATCH_SIZE}, {len(texts)} texts in batches of similar length",
            "time / (plain model on the same batches × fraction of layers run)",
            Target(1.10),
            ratio(seconds["early"], seconds["plain"], cost.layers),
            {**medians(seconds), **cost.to_dict()},
        )
    ]


def prediction(workload: Workload) -> list[Result]:
    """`predict` beside the plain model, on length-sorted batches and in data set order."""

    def runs(texts: list[Example]) -> dict[str, Run]:
        return {
            "predict": Prediction(workload, texts, workload.thresholds),
            "plain, sorted": PlainPass(workload, texts, is_sorted=True),
            "plain, data set order": PlainPass(workload, texts, is_sorted=False),
        }

    texts = workload.texts
    timed = runs(texts)
    seconds = _measured(workload, timed, runs(texts[:WARM_UP_TEXTS]), "prediction")
    cost = timed["predict"].cost
    values = {**medians(seconds), **cost.to_dict()}
    return [
        Result(
            "prediction",
            f"prediction over {len(texts)} texts of mixed length",
            f"time / (plain model on length-sorted batches of {BATCH_SIZE} × fraction of layers run)",
            Target(1.03),
            ratio(seconds["predict"], seconds["plain, sorted"], cost.layers),
            values,
        ),
        Result(
            "prediction",
            f"the same against the plain model in data set order, batches of {BATCH_SIZE}",
            "throughput ratio",
            Target(3.8, at_least=True),
            ratio(seconds["plain, data set order"], seconds["predict"]),
            values,
        ),
    ]


def one_at_a_time(workload: Workload) -> list[Result]:
    """`predict` beside early exit as the research code does it: one text at a time, padded to a fixed length."""
    thresholds = workload.thresholds

    def runs(texts: list[Example]) -> dict[str, Run]:
        # Padding is never dropped before a row leaves, so all of it is run.
        padded = [workload.batch([text], length=workload.longest) for text in texts]
        return {
            "predict": Prediction(workload, texts, thresholds),
            "one at a time": ExitBatches(workload, padded, thresholds),
        }

    texts = workload.few_texts
    timed = runs(texts)
    seconds = _measured(workload, timed, runs(texts[:2]), "one at a time")
    return [
        Result(
            "one_at_a_time",
            f"prediction over {len(texts)} texts against early exit one at a time padded to {workload.longest}",
            "throughput ratio",
            Target(25 if workload.device.type == "cuda" else 6, at_least=True),
            ratio(seconds["one at a time"], seconds["predict"]),
            {**medians(seconds), **timed["predict"].cost.to_dict()},
        )
    ]


def nothing_exits(workload: Workload) -> list[Result]:
    """What asking every exit costs when no row leaves: `forward` and `predict` beside the plain model."""
    thresholds = same_for_all(NOBODY_REACHES, workload.model.config)

    def runs(texts: list[Example]) -> dict[str, Run]:
        batches = ready_batches(workload, texts)
        return {
            "forward": ExitBatches(workload, batches, thresholds),
            "plain, same batches": PlainBatches(workload, batches),
            "predict": Prediction(workload, texts, thresholds),
            "plain, sorted": PlainPass(workload, texts, is_sorted=True),
        }

    texts = workload.few_texts
    timed = runs(texts)
    seconds = _measured(workload, timed, runs(texts[:WARM_UP_TEXTS]), "nothing exits")
    values = {**medians(seconds), **timed["predict"].cost.to_dict()}
    compared = {"forward": "plain, same batches", "predict": "plain, sorted"}
    return [
        Result(
            "nothing_exits",
            f"nothing exits: {name}, {len(texts)} texts",
            f"time / plain model ({other.removeprefix('plain, ')})",
            Target(1.03),
            ratio(seconds[name], seconds[other]),
            values,
        )
        for name, other in compared.items()
    ]


def composition(workload: Workload) -> list[Result]:
    """`predict` with bf16, and with compiled layers, each beside the plain model in the same setting."""
    thresholds = workload.thresholds
    return [
        _composed(workload, name, change, thresholds)
        for name, change in {"bf16": _in_bf16, "compiled layers": _with_compiled_layers}.items()
    ]


def _composed(workload: Workload, name: str, change, thresholds: list[float]) -> Result:
    model, plain = change(copy.deepcopy(workload.model)), change(copy.deepcopy(workload.plain))

    def runs(texts: list[Example]) -> dict[str, Run]:
        return {
            "predict": Prediction(workload, texts, thresholds, model),
            "plain, sorted": PlainPass(workload, texts, is_sorted=True, model=plain),
        }

    texts = workload.few_texts
    timed = runs(texts)
    # The whole of it: compilation comes with the lengths.
    seconds = _measured(workload, timed, timed, name)
    cost = timed["predict"].cost
    return Result(
        "composition",
        f"prediction with {name}, {len(texts)} texts",
        f"time / (plain model with {name} on length-sorted batches × fraction of layers run)",
        None,
        ratio(seconds["predict"], seconds["plain, sorted"], cost.layers),
        {**medians(seconds), **cost.to_dict()},
    )


def _in_bf16(model):
    return model.to(torch.bfloat16)


def _with_compiled_layers(model):
    """Regional compilation: the code of a layer is compiled once and used for all."""
    for layer in layers_of(model):
        layer.compile(dynamic=True)
    return model


def layers_of(model) -> list[torch.nn.Module]:
    """The backbone's layers."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return next(list(layers) for layers in lists if len(layers) == model.config.num_hidden_layers)


def cost_and_time(workload: Workload) -> list[CurvePoint]:
    """Measured time over thresholds, for the plot."""
    config = workload.model.config
    grid = CRITERIA[config.exit_criterion].useful_thresholds(config.num_labels, len(config.exit_layers))
    # Six of the library's own: from leaving at once to not at all.
    thresholds = grid[::4]

    def runs(texts: list[Example]) -> dict[str, Run]:
        early = {str(one): Prediction(workload, texts, same_for_all(one, config)) for one in thresholds}
        return {"plain": PlainPass(workload, texts, is_sorted=True), **early}

    timed = runs(workload.few_texts)
    seconds = _measured(workload, timed, runs(workload.few_texts[:WARM_UP_TEXTS]), "cost and time")
    costs = {one: timed[str(one)].cost for one in thresholds}
    return [
        CurvePoint(one, cost.layers, cost.tokens, ratio(seconds[str(one)], seconds["plain"]))
        for one, cost in costs.items()
    ]


def _measured(workload: Workload, runs: dict[str, Run], warm_up: dict[str, Run], title: str) -> dict[str, list[float]]:
    return measure_in_turn(runs, warm_up, workload.size.repeats, workload.device, title)
