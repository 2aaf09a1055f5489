"""The card of a classifier with exits, made from the model and its report."""

import enum
import math
import os
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration.wishes import Wish
from ..evaluation.report import spread_by_cost
from ..files import write_whole
from ..modeling.criteria import CRITERIA
from ..version import __version__
from .authorship import BLANK_SEAL, is_nobodys, sealed
from .names import as_code, as_literal, as_text, one_line

if TYPE_CHECKING:
    from ..evaluation.report import CurvePoint, ExitReport

logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
PLOT_FILE = "exits.png"
_ROWS = 12


def model_card(
    model: Any,
    report: "ExitReport | None" = None,
    *,
    repo_id: str = "this-model",
    base_model: str | None = None,
    dataset_name: str | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
    plot_file: str | None = PLOT_FILE,
    widget: Sequence[str] | None = None,
    training: Mapping[str, Any] | None = None,
) -> ModelCard:
    """A card that says where the model comes from, what its exits are worth, and how to load it.

    Args:
        model: A classifier with exits, also with an adapter of PEFT (or a cascade).
        report (`ExitReport`, *optional*): What was measured; the card has no numbers without it.
        repo_id (`str`): Name on the Hub, for the examples of use; or a folder's, and the card says that it is one.
        base_model (`str`, *optional*): What it was fine-tuned from; defaults to what the model was loaded from, unless
            that is `repo_id`. A Hub name is linked; of a path only the last part is shown.
        dataset_name (`str`, *optional*): What it was trained and evaluated on; shown as `base_model` is.
        language, license, tags (*optional*): As in any card's metadata.
        plot_file (`str`, *optional*): The picture beside the card that `report.plot` drew; None for none.
        widget (`Sequence[str]`, *optional*): Texts to try on the model's page.
        training (`Mapping`, *optional*): How to reproduce the model: names of settings and their values.

    Returns:
        `ModelCard`: With metadata that the Hub accepts (`model-index` where there is a report).

    Raises:
        ValueError: The report is of a model with other exits.
    """
    config = model.config
    _check_report(config, report)
    base_model = base_model or config._name_or_path or None
    base_model = None if base_model == repo_id else base_model
    repo_id = one_line(repo_id) or "this-model"
    base_model, dataset_name = _cleaned(base_model), _cleaned(dataset_name)
    # The only other thing that has a card of ours: a `PeftModel`.
    is_adapter = not isinstance(model, PreTrainedModel)
    template = resources.files(__package__).joinpath("card_template.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        _metadata(config, report, repo_id, base_model, dataset_name, language, license, tags, widget, is_adapter),
        template_str=template,
        seal=BLANK_SEAL,
        model_name=as_text(_last_part(repo_id)),
        repo_literal=as_literal(repo_id),
        is_folder=not _looks_like_hub_name(repo_id),
        base_model=_shown(base_model, "https://huggingface.co"),
        adapter_of=as_literal(_loaded_as(base_model)) if is_adapter else None,
        dataset=_shown(dataset_name, "https://huggingface.co/datasets"),
        facts=_facts(config),
        exit_table=_exit_table(config, report),
        curve_table=_curve_table(config, report) if report is not None and report.curve else None,
        plot_file=None if plot_file is None else quote(plot_file),
        report=report,
        metric=None if report is None else as_text(report.metric_name),
        device=None if report is None else as_text(report.device),
        chosen=_chosen(config, report),
        promise=_promise(config),
        reproduction=_reproduction(training),
        **_words(config),
    )
    return sealed(card)


def write_model_card(card: ModelCard, folder: str | os.PathLike[str], overwrite: bool = False) -> bool:
    """Writes the card into a folder, unless there is one that somebody wrote or edited.

    Args:
        card (`ModelCard`): The card.
        folder (`str` or `os.PathLike`): Where `README.md` is to be.
        overwrite (`bool`): Whether to replace a card that somebody wrote or edited, too.

    Returns:
        `bool`: Whether it was written.

    Raises:
        OSError: The folder cannot be written; the card in it is then as it was.
    """
    path = Path(folder) / CARD_FILE
    if path.exists() and not overwrite and not is_nobodys(path.read_text(encoding="utf-8", errors="replace")):
        logger.warning(
            f"{path} is left as it is: somebody wrote or edited it. To replace it, delete it, or pass overwrite=True "
            f"to write_model_card."
        )
        return False
    write_whole(path, lambda draft: Path(draft).write_text(str(card), encoding="utf-8"))
    return True


def _check_report(config: Any, report: "ExitReport | None") -> None:
    if report is not None and report.exit_layers != config.exit_layers:
        raise ValueError(
            f"the report is of a model with exits after layers {report.exit_layers}, but this model has them after "
            f"{config.exit_layers}. Pass the report that evaluate_exits made of this model."
        )


# Metadata


def _metadata(
    config: Any,
    report: "ExitReport | None",
    repo_id: str,
    base_model: str | None,
    dataset_name: str | None,
    language: str | list[str] | None,
    license: str | None,
    tags: list[str] | None,
    widget: Sequence[str] | None,
    is_adapter: bool,
) -> ModelCardData:
    results = _eval_results(config, report, dataset_name) if report is not None else None
    return ModelCardData(
        language=language,
        license=license,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification",
        tags=["early-exit", "hf_adaptive", *_own_tags(config), *(tags or [])],
        base_model=base_model if _is_hub_name(base_model) else None,
        datasets=[dataset_name] if _is_hub_name(dataset_name) else None,
        metrics=[one_line(report.metric_name)] if report is not None else None,
        model_name=_last_part(repo_id) if results else None,
        eval_results=results or None,
        **_widget(widget),
    )


def _widget(texts: Sequence[str] | None) -> dict[str, Any]:
    return {} if texts is None else {"widget": [{"text": text} for text in texts]}


def _own_tags(config: Any) -> list[str]:
    values = config.to_dict()
    return [
        *(["sweet"] if values.get("exit_routing") == "sweet" else []),
        *(["constant-attention"] if values.get("constant_heads") else []),
    ]


def _eval_results(config: Any, report: "ExitReport", dataset_name: str | None) -> list[EvalResult]:
    """One result with a score for every exit, and one for the stored thresholds if they are on the curve."""
    metric = one_line(report.metric_name)
    scores = [
        (f"{metric} after layer {layer} (cost {cost:.2f})", round(score, 4))
        for layer, cost, score in zip(report.exit_layers, report.costs, report.accuracy)
    ]
    chosen = _chosen(config, report)
    if chosen is not None:
        name = f"{metric} with the stored thresholds (cost {chosen.cost:.2f})"
        scores.append((name, round(chosen.accuracy, 4)))
    return [
        EvalResult(
            task_type="text-classification",
            task_name="Text classification",
            dataset_type=dataset_name if _is_hub_name(dataset_name) else "unknown",
            dataset_name=_last_part(dataset_name) if dataset_name else "held-out data",
            metric_type=metric,
            metric_name=name,
            metric_value=score,
        )
        for name, score in scores
        # The Hub takes no NaN, which is what a correlation with a constant is.
        if math.isfinite(score)
    ]


def _chosen(config: Any, report: "ExitReport | None") -> "CurvePoint | None":
    """What was measured at the thresholds that the configuration stores."""
    if report is None or report.chosen is None or report.criterion != config.exit_criterion:
        return None
    return report.chosen if report.chosen.threshold == config.exit_thresholds else None


# Names


def _is_hub_name(name: str | None) -> TypeGuard[str]:
    return name is not None and _looks_like_hub_name(name) and not Path(name).exists()


def _looks_like_hub_name(name: str) -> bool:
    if name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _cleaned(name: str | None) -> str | None:
    return None if name is None else one_line(name) or None


def _last_part(name: str) -> str:
    """The name without the owner; of a path without the folders, because they are nobody's business."""
    return Path(name).name


def _shown(name: str | None, address: str) -> str | None:
    if name is None:
        return None
    return f"[{name}]({address}/{name})" if _is_hub_name(name) else as_code(_last_part(name))


def _loaded_as(name: str | None) -> str:
    """What stands in code for the model that an adapter changes."""
    if name is None:
        return "the-base-model"
    return name if _is_hub_name(name) else _last_part(name)


# Text


def _words(config: Any) -> dict[str, Any]:
    """What the template's sentences need of the configuration."""
    values = config.to_dict()
    criterion = CRITERIA[config.exit_criterion]
    stored = config.exit_thresholds
    example = criterion.example_threshold if stored is None else [_rounded(threshold) for threshold in stored]
    return {
        "routing": values.get("exit_routing"),
        "has_branches": any(config.exit_branch_costs),
        "has_constant_heads": bool(values.get("constant_heads")),
        "first_exit": config.exit_layers[0],
        "last_exit": config.exit_layers[-1],
        "criterion": config.exit_criterion,
        "leaves_above": criterion.leaves_above,
        "threshold_range": criterion.threshold_range,
        "example_thresholds": example,
    }


def _rounded(threshold: float | None) -> float | None:
    return None if threshold is None else float(f"{threshold:.4g}")


def _facts(config: Any) -> str:
    values = config.to_dict()
    labels = [as_text(str(config.id2label[index])) for index in sorted(config.id2label)]
    shown = ", ".join(labels[:10]) + (f", … ({len(labels)} in all)" if len(labels) > 10 else "")
    rows = [
        ("exits after layers", f"{', '.join(map(str, config.exit_layers))} of {config.exit_layers[-1]}"),
        ("routing", _routing_in_words(values.get("exit_routing"))),
        *([("branches", _branches_in_words(config))] if any(config.exit_branch_costs) else []),
        ("pooling", f"`{values['exit_pooling']}`" if "exit_pooling" in values else "each model's own"),
        ("criterion", f"`{config.exit_criterion}`"),
        ("thresholds", "none: all layers are run" if config.exit_thresholds is None else "stored, see below"),
        ("classes", shown),
    ]
    return _table(("", ""), rows, numbers=False)


def _branches_in_words(config: Any) -> str:
    lengths = [str(config.branch_length(depth)) for depth in config.exit_layers[:-1]]
    return f"{', '.join(lengths)} layers of their own for the exits before the last"


def _routing_in_words(routing: str | float | None) -> str:
    words: dict[str | float | None, str] = {
        "joint": "`joint`: every exit's loss updates all layers below it",
        "sweet": "`sweet`: every exit's loss updates only the layers since the exit before it",
        "disjoint": "`disjoint`: exits on a frozen backbone",
        None: "independent models",
    }
    return words.get(routing, f"`{routing}`: this share of an exit's gradient passes to the layers of the exit before")


def _exit_table(config: Any, report: "ExitReport | None") -> str:
    exits = len(config.exit_layers)
    thresholds = [*(config.exit_thresholds or [None] * (exits - 1)), None]
    columns = {
        "layers run": [str(layer) for layer in config.exit_layers],
        "cost": [f"{cost:.2f}" for cost in config.exit_costs],
        **({as_text(report.metric_name): [f"{score:.4f}" for score in report.accuracy]} if report is not None else {}),
        "threshold": ["–" if threshold is None else f"{threshold:.4g}" for threshold in thresholds],
        "temperature": [f"{temperature:.4g}" for temperature in config.exit_temperatures or [1] * exits],
    }
    return _table(tuple(columns), list(zip(*columns.values())))


def _curve_table(config: Any, report: "ExitReport") -> str:
    header = ["threshold", "cost", as_text(report.metric_name)]
    if report.full_seconds:
        header += ["times as fast"]
    layers = " / ".join(map(str, report.exit_layers))
    return _table((*header, f"% leaving after {layers}"), _curve_rows(report, _chosen(config, report)))


def _curve_rows(report: "ExitReport", chosen: "CurvePoint | None") -> list[tuple[str, ...]]:
    """A dozen rows from the cheapest point to the dearest, the chosen one in bold among them."""
    timed = [point for point in report.curve if point.seconds is not None]
    others = spread_by_cost([*timed, *report.curve], _ROWS - (chosen is not None))
    rows = [(point.cost, _curve_row(report, point, False)) for point in others]
    if chosen is not None:
        rows.append((chosen.cost, _curve_row(report, chosen, True)))
    return [cells for _, cells in sorted(rows)]


def _curve_row(report: "ExitReport", point: "CurvePoint", is_chosen: bool) -> tuple[str, ...]:
    threshold = "chosen" if isinstance(point.threshold, list) else f"{point.threshold:.4g}"
    cells = [threshold, f"{point.cost:.2f}", f"{point.accuracy:.4f}"]
    if report.full_seconds:
        cells.append("–" if point.seconds is None else f"{report.speed(point):.2f}")
    cells.append(" / ".join(f"{100 * share:.0f}" for share in point.exit_distribution))
    return tuple(f"**{cell}**" if is_chosen else cell for cell in cells)


def _promise(config: Any) -> str | None:
    """What calibration was asked for, promised and saw, in sentences."""
    record = config.calibration_in_force
    if record is None:
        return None
    measured, guarantee, count = record["measured"], record["guarantee"], record["num_examples"]
    wish = Wish(record["wish"]["name"], record["wish"]["bound"])
    text = [f"The thresholds were asked for **{as_text(wish.in_words)}**."]
    if guarantee is None:
        text.append(
            f"They were chosen on {record['num_examples']} held-out examples, without a promise about new data."
        )
    else:
        text.append(
            f"On new data like the calibration data this holds with confidence **{guarantee['confidence']:g}** "
            f"({guarantee['test']} test on {guarantee['num_testing']} of {count} held-out examples)."
        )
    lost = "" if measured["accuracy_drop"] is None else f" and {100 * measured['accuracy_drop']:.1f} points lost"
    text.append(f"There the cost was {measured['mean_cost']:.2f}, with {measured['disagreement']:.1%} other answers")
    return " ".join(text) + f"{lost}."


def _reproduction(training: Mapping[str, Any] | None) -> str:
    versions = {name: metadata.version(name) for name in ("transformers", "torch")}
    settings = {**(training or {}), **versions, "hf_adaptive": __version__}
    shown = [(as_text(name), as_text(_setting(value))) for name, value in settings.items()]
    return _table(("", ""), shown, numbers=False)


def _setting(value: Any) -> str:
    value = value.value if isinstance(value, enum.Enum) else value
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A Markdown table; its cells may hold any text."""
    lines = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    lines.insert(1, ["---:" if numbers else "---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
