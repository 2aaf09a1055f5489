"""The card of a classifier with exits, made from the model and its report."""

import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import logging

from ..files import write_whole

if TYPE_CHECKING:
    from ..evaluation.report import ExitReport

logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
PLOT_FILE = "exits.png"
# Says that nobody has edited the card yet, so that a newer run may replace it.
MARKER = "<!-- Written by hf_adaptive. Remove this line to keep your own changes. -->"


def model_card(
    model: Any,
    report: "ExitReport | None" = None,
    *,
    repo_id: str = "this-model",
    dataset_name: str | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
    plot_file: str = PLOT_FILE,
) -> ModelCard:
    """A card that says where the model comes from, what its exits are worth, and how to load it.

    Args:
        model: A classifier with exits (or a cascade).
        report (`ExitReport`, *optional*): What was measured; the card has no numbers without it.
        repo_id (`str`): Name on the Hub, for the examples of use.
        dataset_name (`str`, *optional*): What it was trained and evaluated on; a Hub name is linked.
        language, license, tags (*optional*): As in any card's metadata.
        plot_file (`str`): The plot's name beside the card.

    Returns:
        `ModelCard`: With metadata that the Hub accepts (`model-index` where there is a report).
    """
    base_model = model.config._name_or_path or None
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["early-exit", "hf_adaptive", *_routing_tags(model.config), *(tags or [])],
        base_model=base_model if _is_hub_name(base_model) else None,
        datasets=[dataset_name] if _is_hub_name(dataset_name) else None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=_eval_results(model, report, dataset_name) if report is not None else None,
    )
    template = resources.files(__package__).joinpath("card_template.md").read_text()
    return ModelCard.from_template(
        data,
        template_str=template,
        marker=MARKER,
        model_name=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        dataset_name=dataset_name,
        base_model=_shown_name(base_model),
        facts=_facts(model.config),
        exit_layers=model.config.exit_layers,
        example_thresholds=_example_thresholds(model.config),
        report=report,
        exits=zip(report.exit_layers, report.costs, report.accuracy) if report is not None else (),
        plot_file=plot_file,
    )


def write_model_card(card: ModelCard, folder: str | os.PathLike, overwrite: bool = False) -> bool:
    """Writes the card into a folder, unless there is one that somebody else wrote or changed.

    Args:
        card (`ModelCard`): The card.
        folder (`str` or `os.PathLike`): Where `README.md` is to be.
        overwrite (`bool`): Whether to replace a card that somebody else wrote or changed.

    Returns:
        `bool`: Whether it was written.

    Raises:
        OSError: The folder cannot be written.
    """
    path = Path(folder) / CARD_FILE
    if path.exists() and not overwrite and MARKER not in path.read_text():
        logger.warning(f"{path} is left as it is: it was not written by hf_adaptive, or was edited since.")
        return False
    write_whole(path, lambda draft: Path(draft).write_text(str(card)))
    return True


def _routing_tags(config: Any) -> list[str]:
    return ["sweet"] if getattr(config, "exit_routing", None) == "sweet" else []


def _is_hub_name(name: str | None) -> bool:
    return name is not None and name.count("/") == 1 and not Path(name).exists() and not name.startswith((".", "/"))


def _shown_name(base_model: str | None) -> str | None:
    """A Hub name as it is; of a folder its last part, because the rest is nobody's business."""
    if base_model is None:
        return None
    return f"`{base_model if _is_hub_name(base_model) else Path(base_model).name}`"


def _facts(config: Any) -> list[tuple[str, str]]:
    labels = [str(config.id2label[index]) for index in sorted(config.id2label)]
    shown = ", ".join(labels[:10]) + (f", … ({len(labels)} in all)" if len(labels) > 10 else "")
    return [
        ("Exits after layers", f"{', '.join(map(str, config.exit_layers))} of {config.exit_layers[-1]}"),
        ("Training", f"`exit_routing={getattr(config, 'exit_routing', 'independent models')!r}`"),
        ("Pooling", f"`{getattr(config, 'exit_pooling', 'by model')}`"),
        ("Criterion", f"`{config.exit_criterion}`"),
        ("Thresholds", "none: all layers are run" if config.exit_thresholds is None else f"{config.exit_thresholds}"),
        ("Temperatures", "1 each" if config.exit_temperatures is None else f"{config.exit_temperatures}"),
        ("Classes", shown),
    ]


def _example_thresholds(config: Any) -> Any:
    return config.exit_thresholds or {"entropy": 0.3, "patience": 2}.get(config.exit_criterion, 0.9)


def _eval_results(model: Any, report: "ExitReport", dataset_name: str | None) -> list[EvalResult]:
    """The score of every exit, as the Hub's `model-index` has it."""
    name = dataset_name or "held-out data"
    return [
        EvalResult(
            task_type="text-classification",
            task_name=f"Text classification, exit after layer {layer} (cost {cost:.2f})",
            dataset_type=dataset_name if _is_hub_name(dataset_name) else "custom",
            dataset_name=name,
            dataset_config=f"exit-after-layer-{layer}",
            metric_type=report.metric_name,
            metric_value=score,
        )
        for layer, cost, score in zip(report.exit_layers, report.costs, report.accuracy)
    ]
