"""Labels are read in one way, whoever asks: a pass that trains, a trainer's scores, an evaluation, a calibration."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .checks import shortened
from .criteria import problem_type
from .examples import as_array, as_rows, check_mapping, column_of

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
LABEL_COLUMNS = ("labels", "label", "label_ids")
# Of a row without a label, which is left out of every loss and score.
NO_LABEL = -100


def problem_type_of(labels: torch.Tensor, config: Any) -> str:
    """As [`problem_type`]; where the configuration does not say and there are several labels, by the labels' type."""
    if config.problem_type is None and config.num_labels > 1 and labels.is_floating_point():
        return "multi_label_classification"
    return problem_type(config)


def read_labels(labels: Any, rows: int, config: Any) -> torch.Tensor:
    """Checked labels, in the one form that losses and scores work with.

    Args:
        labels (`torch.Tensor`): By problem type: class indexes, of any whole type, of shape `(rows,)` or `(rows, 1)`;
            floats of shape `(rows, labels)`, 0 or 1 a label (or a probability); finite numbers. -100 stands for no
            label, for every label of a row where there are several; numbers are always numbers.
        rows (`int`): How many there have to be.
        config: The model's configuration. If it leaves the problem type open, floats for several labels settle it.

    Returns:
        `torch.Tensor`: int64 of shape `(rows,)`; or floats of shape `(rows, labels)`, or `(rows,)` for one number.

    Raises:
        ValueError: Labels of the wrong type, number or range; it names them, and the row of the first.
    """
    if not isinstance(labels, torch.Tensor):
        raise ValueError(
            f"labels must be a torch.Tensor, got a {type(labels).__name__}. Make one with torch.tensor(labels)."
        )
    kind = problem_type_of(labels, config)
    if kind not in PROBLEM_TYPES:
        raise ValueError(f"problem_type must be one of {', '.join(PROBLEM_TYPES)}, got {kind!r}.")
    if kind == "single_label_classification":
        return _class_indexes(labels, rows, config.num_labels)
    read = _numbers(labels, rows, config.num_labels, kind)
    if kind == "multi_label_classification":
        # As the stock loss does at the first batch; decisions have to know it before there is a loss.
        config.problem_type = kind
    return read


def read_token_labels(labels: Any, shape: Sequence[int], num_labels: int) -> torch.Tensor:
    """Checked class indexes of tokens.

    Args:
        labels (`torch.Tensor` of shape `(batch, length)`): Class indexes; -100 where there is none.
        shape (`Sequence[int]`): The shape expected.
        num_labels (`int`): How many classes there are.

    Returns:
        `torch.LongTensor` of shape `(batch, length)`.

    Raises:
        ValueError: Labels of the wrong type, shape or range.
    """
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.shape != torch.Size(shape):
        given = f"{labels.dtype} of {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else shortened(labels)
        raise ValueError(f"labels must be whole numbers of shape {tuple(shape)}, one a token, got {given}.")
    labels = labels.long()
    _check_classes(labels, num_labels)
    return labels


def labels_of(examples: Any, config: Any) -> torch.Tensor | None:
    """The labels of a data set, for scores: where there are several labels at once, 0 or 1.

    Args:
        examples: As for [`as_rows`], with a column of `LABEL_COLUMNS`.
        config: As in [`read_labels`].

    Returns:
        `torch.Tensor`: As [`read_labels`]; None if there is no such column.

    Raises:
        ValueError: No examples, none that has a label, or as [`read_labels`].
    """
    rows = as_rows(examples)
    if len(rows) == 0:
        raise ValueError("the data set is empty: give at least one of the examples.")
    first = check_mapping(rows[0], 0)
    name = next((name for name in LABEL_COLUMNS if name in first), None)
    if name is None:
        return None
    values = column_of(rows, name)
    labels = read_labels(torch.from_numpy(_stacked(values)), len(values), config)
    if not has_label(labels, problem_type(config)).any():
        raise ValueError(f"no example has a label: {name} is -100 (no label) in every row.")
    if problem_type(config) != "multi_label_classification":
        return labels
    # A probability counts as the likelier of the two answers.
    return torch.where(labels == NO_LABEL, labels, (labels > 0.5).to(labels))


def has_label(labels: torch.Tensor, kind: str) -> torch.Tensor:
    """Which rows have one, `torch.BoolTensor` of shape `(rows,)`.

    Args:
        labels (`torch.Tensor`): From [`read_labels`].
        kind (`str`): The problem type; a number is always there.
    """
    if kind == "regression":
        return torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    return labels.view(len(labels), -1)[:, 0] != NO_LABEL


def _class_indexes(labels: torch.Tensor, rows: int, num_labels: int) -> torch.Tensor:
    if labels.is_floating_point():
        raise ValueError(
            f"labels must be whole numbers for single_label_classification, got {labels.dtype}. For several labels "
            "at once set problem_type='multi_label_classification'; for numbers, num_labels=1."
        )
    if labels.shape not in ((rows,), (rows, 1)):
        raise ValueError(
            f"labels must have one entry a row ({rows}), got shape {tuple(labels.shape)}. For several labels at once "
            "give floats."
        )
    labels = labels.view(-1).long()
    _check_classes(labels, num_labels)
    return labels


def _check_classes(labels: torch.Tensor, num_labels: int) -> None:
    is_wrong = (labels != NO_LABEL) & ((labels < 0) | (labels >= num_labels))
    if is_wrong.any():
        raise ValueError(
            f"labels must lie between 0 and {num_labels - 1} (num_labels={num_labels}; -100 is left out), got "
            f"{_named(labels, is_wrong)}. Load the model with the right num_labels, or mend the data: -100 stands for "
            "a row without a label."
        )


def _numbers(labels: torch.Tensor, rows: int, num_labels: int, kind: str) -> torch.Tensor:
    if not labels.is_floating_point():
        raise ValueError(f"labels must be floats for {kind}, got {labels.dtype}. Cast them with labels.float().")
    shapes = [(rows, num_labels)] if num_labels > 1 else [(rows,), (rows, 1)]
    if labels.shape not in shapes:
        raise ValueError(
            f"labels must have shape ({rows}, {num_labels}) for {kind} with num_labels={num_labels}, "
            f"got {tuple(labels.shape)}.{_hint_to_classes(labels)}"
        )
    if kind == "regression":
        _check_numbers(labels, labels.isfinite(), "finite numbers", kind)
        return labels.view(rows) if num_labels == 1 else labels
    labels = labels.view(rows, num_labels)
    is_left_out = (labels == NO_LABEL).all(dim=1, keepdim=True)
    allowed = "numbers between 0 and 1, one a label (or -100 for each: no label),"
    _check_numbers(labels, ((labels >= 0) & (labels <= 1)) | is_left_out, allowed, kind)
    return labels


def _hint_to_classes(labels: torch.Tensor) -> str:
    if labels.dim() != 1:
        return ""
    is_wrong = labels != labels.round()
    found = f", but there is {_named(labels, is_wrong)}" if is_wrong.any() else ""
    return f" If they are class indexes, give whole numbers{found}."


def _check_numbers(labels: torch.Tensor, is_usable: torch.Tensor, allowed: str, kind: str) -> None:
    if not is_usable.all():
        raise ValueError(f"labels must be {allowed} for {kind}, got {_named(labels, ~is_usable)}. Mend the data.")


def _named(labels: torch.Tensor, is_wrong: torch.Tensor) -> str:
    """Some of the wrong labels, and the row of the first."""
    row = int(is_wrong.nonzero()[0, 0])
    return f"{labels[is_wrong].unique().tolist()[:5]} (first in row {row})"


def _stacked(values: Sequence[Any]) -> np.ndarray:
    """Labels of all rows as int64 or float64, as a data collator would stack them."""
    kinds = set(map(type, values))
    if kinds <= {int, bool, float} and all(abs(value) < 2**63 for value in values if isinstance(value, int)):
        return np.array(values, dtype=np.float64 if float in kinds else np.int64)
    arrays = [_array_of_numbers(row, value) for row, value in enumerate(values)]
    for row, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"labels must have the same shape in every row, got {arrays[0].shape} in row 0 and {array.shape} in "
                f"row {row}: {shortened(values[row])}."
            )
    stacked = np.stack(arrays)
    return stacked.astype(np.float64 if stacked.dtype.kind == "f" else np.int64)


def _array_of_numbers(row: int, value: Any) -> np.ndarray:
    try:
        array = as_array(value)
    except (TypeError, ValueError):  # lists of unequal lengths
        array = np.array(None)
    if array.dtype.kind not in "iubf":
        raise ValueError(
            f"labels must be numbers, got {shortened(value)} in row {row}. Turn names into numbers "
            "(model.config.label2id); -100 stands for a row without a label."
        )
    return array
