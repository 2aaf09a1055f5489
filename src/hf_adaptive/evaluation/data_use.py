"""Calibration never sees evaluation data: remembers on a model which data served for what, and warns."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..modeling.examples import as_array
from ..warning import warn_caller


def note_use(model: Any, dataset: Sequence[Mapping[str, Any]], use: str) -> None:
    """Remembers what a data set was used for; warns if the same examples served for the other purpose.

    Args:
        model: A classifier with exits, or a cascade.
        dataset (`Sequence[Mapping]`): Tokenised examples.
        use (`str`): `calibration` or `evaluation`.
    """
    other = "evaluation" if use == "calibration" else "calibration"
    used = model.__dict__.setdefault("_data_used_for", {"calibration": set(), "evaluation": set()})
    own = _print_of(dataset)
    if own in used[other]:
        warn_caller(
            f"these examples are used for {use}, but this model used them for {other} before: scores on data that "
            "thresholds or temperatures were chosen on are too good. Hold out a part for calibration, and report on "
            "the rest."
        )
    used[use].add(own)


def _print_of(dataset: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """Tells data sets apart by their size and a few of their examples."""
    places = {0, len(dataset) // 3, len(dataset) // 2, len(dataset) - 1}
    return (
        len(dataset),
        *(tuple(as_array(dataset[place]["input_ids"]).flatten().tolist()) for place in sorted(places)),
    )
