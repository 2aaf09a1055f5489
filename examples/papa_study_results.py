"""The page of examples/run_papa.py: tables with intervals, heat maps, and curves, from the parts that are there.

Every interval is mean ± t · s / √seeds (95 %, Student's t); differences are taken seed by seed.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from exit_study_results import interval, percent, points, table
from hf_adaptive.modeling.switch import replaced_files
from hf_adaptive.probing import HeadRanking, MeanAttention
from hf_adaptive.probing.plots import plot_constants, plot_head_ranks
from papa_study_exits import FRACTION, METHODS, finished_methods
from papa_study_timing import STOCK

Values = dict[str, Any]
# The relative drop with all heads constant that the paper reports, on average over its models and tasks (abstract).
PAPERS_DROP = 0.08
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def write_page(folder: Path) -> str:
    """Writes results.md, results.json and the figures into `page/`; returns the words."""
    # A part that was stopped before its heads were ranked has nothing to show.
    ranked = [path.parent for path in sorted(folder.glob("parts/*/*/head_ranking.json"))]
    parts = [part for part in map(read_part, ranked) if part["scores"]]
    timing_file = folder / "timing.json"
    timing = json.loads(timing_file.read_text(encoding="utf-8")) if timing_file.exists() else None
    words = page(parts, timing)
    # Together, so that no table stands beside numbers of another run.
    with replaced_files(folder / "page", "results.json") as new:
        content = json.dumps({"parts": parts, "timing": timing}, indent=1)
        (new / "results.json").write_text(content + "\n", encoding="utf-8")
        (new / "results.md").write_text(words, encoding="utf-8")
        if parts:
            draw_scores(parts, new / "scores.svg")
        for model, own in by_model(parts).items():
            rankings = {part["task"]: ranking_of(part) for part in own}
            plot_head_ranks(rankings, new / f"heads-{model}.png")
            averages = MeanAttention.load(folder / "parts" / model / own[0]["task"] / "averages.safetensors")
            plot_constants(averages, ranking_of(own[0]), new / f"constants-{model}.png")
    return words


def read_part(folder: Path) -> Values:
    """What is there of one encoder on one task."""
    part = json.loads((folder / "part.json").read_text(encoding="utf-8"))
    part["settings"] = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "runs").glob("*.json"))]
    fractions = sorted({run["fraction"] for run in runs})
    part["scores"] = [
        {
            "fraction": fraction,
            "constant_heads": own[0]["constant_heads"],
            "parameters": own[0]["parameters"],
            "by_seed": {run["seed"]: run["score"] for run in sorted(own, key=lambda run: run["seed"])},
        }
        for fraction in fractions
        for own in [[run for run in runs if run["fraction"] == fraction]]
    ]
    part["lambdas"] = HeadRanking.load(folder / "head_ranking.json").lambdas
    part["exits"] = finished_methods(folder)
    return part


def ranking_of(part: Values) -> HeadRanking:
    """The ranking of a part's heads."""
    return HeadRanking(tuple(map(tuple, part["lambdas"])))


def by_model(parts: list[Values]) -> dict[str, list[Values]]:
    """Parts of each encoder."""
    return {model: [part for part in parts if part["model"] == model] for model in {p["model"]: None for p in parts}}


# In words


def page(parts: list[Values], timing: Values | None) -> str:
    """The page."""
    sections = [_heading()]
    for model, own in by_model(parts).items():
        sections += [_model_heading(model, own), _scores_table(own), _drops_table(own), _halves_table(own)]
        sections.append(f"![Heads of {model}](heads-{model}.png)")
        sections.append(f"Average attention on {own[0]['task']}:\n\n![Constants of {model}](constants-{model}.png)")
    if parts:
        sections.append("![Scores](scores.svg)")
    if timing is not None:
        sections += _timing_tables(timing)
    sections += [_exits_table(part, timing) for part in parts if part["exits"]]
    return "\n\n".join(sections) + "\n"


def _heading() -> str:
    return (
        "# How much attention encoders need\n\nWritten by `examples/run_papa.py`; numbers in "
        "[results.json](results.json). Scores are in %, on test data: mean ± half of the 95 % interval over seeds "
        "(Student's t); differences are in points and paired, seed by seed. The probe is trained on a frozen encoder; "
        "the heads that need attention least, by the ranking learned on the task, are the first to be constant."
    )


def _model_heading(model: str, parts: list[Values]) -> str:
    settings = parts[0]["settings"]
    sizes = "; ".join(
        f"{part['task']}: {part['examples']['train']} training and {part['examples']['test']} test examples, cut at "
        f"{part['settings']['length']} tokens"
        for part in parts
    )
    return (
        f"## {model}: {parts[0]['layers']} layers × {parts[0]['heads']} heads\n\n{sizes}. Probe: "
        f"{settings['epochs']:g} epochs at learning rate {settings['learning_rate']:g}; ranking: "
        f"{settings['ranking_epochs']:g} epochs of "
        f"{settings['ranking_examples']} examples."
    )


def _fractions(parts: list[Values]) -> list[float]:
    return sorted({row["fraction"] for part in parts for row in part["scores"]})


def _by_fraction(part: Values) -> dict[float, Values]:
    return {row["fraction"]: row for row in part["scores"]}


def _name(fraction: float) -> str:
    return "no head constant" if fraction == 0 else "all" if fraction == 1 else f"{100 * fraction:.4g} %"


def _scores_table(parts: list[Values]) -> str:
    fractions = _fractions(parts)
    rows = []
    for part in parts:
        scores = _by_fraction(part)
        cells = [percent(interval(_values(scores[one]))) if one in scores else "–" for one in fractions]
        rows.append((part["task"], f"{100 * part['majority']:.1f}", *cells))
    return table(("score", "most frequent label", *map(_name, fractions)), rows)


def _values(row: Values) -> list[float]:
    return list(row["by_seed"].values())


def _drops_table(parts: list[Values]) -> str:
    fractions = [fraction for fraction in _fractions(parts) if fraction > 0]
    rows = []
    for part in parts:
        scores = _by_fraction(part)
        if 0 in scores:
            cells = [_drop(scores[one], scores[0]) if one in scores else "–" for one in fractions]
            rows.append((part["task"], *cells))
    words = "Against no head constant, in points; in brackets relative to that score"
    return f"{words} (the paper, all heads: −{100 * PAPERS_DROP:g} %):\n\n" + table(
        ("minus no head constant", *map(_name, fractions)), rows
    )


def _drop(row: Values, base: Values) -> str:
    change = difference(row["by_seed"], base["by_seed"])
    relative = change["mean"] / float(np.mean(_values(base)))
    return f"{points(change)} ({100 * relative:+.1f} %)"


def difference(first: dict[int, float], second: dict[int, float]) -> Values:
    """Seed by seed, of the seeds that both have."""
    return interval([first[seed] - second[seed] for seed in first if seed in second])


def _halves_table(parts: list[Values]) -> str:
    """Where the half lies that needs attention least, and how much tasks agree on it."""
    halves = {part["task"]: first_half(part) for part in parts}
    layers = range(parts[0]["layers"])
    rows = [
        (task, *(str(sum(layer == one for one, _ in half)) for layer in layers), _shared(task, halves))
        for task, half in halves.items()
    ]
    words = (
        "Of the half of the heads that needs attention least, so many lie in each layer (of "
        f"{parts[0]['heads']}); and the share of this half that other tasks have in theirs (by chance: 50 %)."
    )
    return f"{words}\n\n" + table(("heads in the first half", *(f"layer {one}" for one in layers), "shared"), rows)


def first_half(part: Values) -> set[tuple[int, int]]:
    """The half of the heads that needs attention least."""
    order = ranking_of(part).order
    return {(layer, head) for layer, head in order[: len(order) // 2]}


def _shared(task: str, halves: dict[str, set[tuple[int, int]]]) -> str:
    shares = [len(halves[task] & half) / len(half) for other, half in halves.items() if other != task]
    return "–" if not shares else f"{100 * float(np.mean(shares)):.0f} %"


def _timing_tables(timing: Values) -> list[str]:
    machine = timing["machine"]
    measured = {name: part["heads"] for name, part in timing["parts"].items()}
    fractions = sorted({name for heads in measured.values() for name in heads if name != STOCK}, key=float)
    rows = [
        (name, f"{np.median(heads[STOCK]['seconds']):.3f}", *(_ratio(heads.get(one)) for one in fractions))
        for name, heads in measured.items()
    ]
    words = (
        f"## Measured time of the backbone, beside stock (sdpa)\n\n{machine['cpu']}, {machine['threads']} threads, "
        f"torch {machine['torch']}; test texts in batches of 32 of similar length. Time / stock: median of pairs that "
        "ran in turn, with quartiles."
    )
    header = ("time", "stock, seconds", *(_name(float(one)) for one in fractions))
    return [f"{words}\n\n" + table(header, rows)]


def _ratio(measured: Values | None) -> str:
    return "–" if measured is None else f"{measured['ratio']:.2f} ({measured['lower']:.2f}–{measured['upper']:.2f})"


def _exits_table(part: Values, timing: Values | None) -> str:
    """Constant heads and exits in one checkpoint, beside each alone."""
    measured = (timing or {"parts": {}})["parts"].get(f"{part['model']}/{part['task']}", {}).get("exits", {})
    runs = {method: {run["seed"]: run for run in part["exits"] if run["method"] == method} for method in METHODS}
    base = runs["neither"]
    rows = [
        (method, *_exits_cells(own, base, method == "neither"), _ratio(measured.get(method)))
        for method, own in runs.items()
        if own and base
    ]
    settings = part["settings"]
    longest = max((run["exit_layers"] for run in part["exits"]), key=len)
    words = (
        f"## Constant heads × exits: {part['model']}, {part['task']}\n\nAll fine-tuned whole "
        f"({settings['exits_epochs']:g} epochs at learning rate {settings['exits_learning_rate']:g}); constant: the "
        f"{100 * FRACTION:g} % of the heads that need attention least; exits after layers "
        f"{', '.join(map(str, longest))}, calibrated on validation data to lose at most "
        f"{100 * settings['max_accuracy_drop']:g} point against the own last exit."
    )
    header = ("method", "accuracy", "minus neither", "layers run, %", "last exit", "time / neither")
    return f"{words}\n\n" + table(header, rows)


def _exits_cells(own: dict[int, Values], base: dict[int, Values], is_base: bool) -> list[str]:
    accuracy, of_base = ({seed: run["accuracy"] for seed, run in runs.items()} for runs in (own, base))
    return [
        percent(interval(list(accuracy.values()))),
        "–" if is_base else points(difference(accuracy, of_base)),
        percent(interval([run["cost"] for run in own.values()])),
        percent(interval([run["accuracy_by_exit"][-1] for run in own.values()])),
    ]


# Figure


def draw_scores(parts: list[Values], path: Path) -> None:
    """Relative score over the share of constant heads, one panel for each encoder."""
    models = by_model(parts)
    with matplotlib.rc_context({"svg.hashsalt": "papa-study", "font.size": 10}):
        figure = Figure(figsize=(5 * len(models), 4), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axes, (model, own) in zip(panels, models.items()):
            _draw_model(axes, model, own)
        panels[0].set_ylabel("score / score with no head constant")
        figure.savefig(path, metadata={"Date": None})


def _draw_model(axes: Any, model: str, parts: list[Values]) -> None:
    for colour, part in zip(COLOURS, parts):
        scores = _by_fraction(part)
        base = float(np.mean(_values(scores[0]))) if 0 in scores else 1.0
        shares = [100 * fraction for fraction in scores]
        means = [float(np.mean(_values(row))) / base for row in scores.values()]
        axes.plot(shares, means, "-o", color=colour, markersize=4, label=part["task"])
        for share, row in zip(shares, scores.values()):
            own = [value / base for value in _values(row)]
            axes.plot([share] * len(own), own, linestyle="", marker=".", color=colour, alpha=0.4)
        axes.axhline(part["majority"] / base, color=colour, linestyle=":", linewidth=0.8)
    axes.axhline(1 - PAPERS_DROP, color="gray", linestyle="--", linewidth=0.8, label="the paper's mean, all constant")
    axes.set_title(f"{model} (dots: seeds; dotted: most frequent label)", fontsize=10)
    axes.set_xlabel("constant heads, % of all")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
