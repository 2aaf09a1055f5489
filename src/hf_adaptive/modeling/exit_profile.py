"""How rows spread over exits, and how sure they were: kept at calibration, compared while serving. Without torch.

Rows are counted in cells, the exit taken times how much doubt was left. The cells are fixed beforehand, so that counts
of two samples can be compared exactly.
"""

import math
from typing import Any

import numpy as np

from .criteria import CRITERIA, Evidence, problem_type

# Quarters of a power of ten: 1 to 0.56, to 0.32, … and less than a millionth.
_CELLS_A_POWER = 4
DOUBTS = 6 * _CELLS_A_POWER + 1


def cells(logits: np.ndarray, exit_index: np.ndarray, certainty: np.ndarray | None, config: Any) -> np.ndarray:
    """The cell of each row, ordered from easy rows (early exits, little doubt) to hard ones.

    Args:
        logits (`np.ndarray` of shape `(rows, exits, labels)`): What the exits said, up to the one taken.
        exit_index (`np.ndarray` of shape `(rows,)`): The exit taken.
        certainty (`np.ndarray` of shape `(rows, exits)`, *optional*): Of the exits' learned units.
        config: The model's configuration.

    Returns:
        `np.ndarray` of shape `(rows,)`: Whole numbers below exits × `DOUBTS`.
    """
    found = np.zeros(len(logits), dtype=np.int64)
    for index in np.unique(exit_index).tolist():
        rows = np.flatnonzero(exit_index == index)
        sure = None if certainty is None else certainty[rows, index]
        evidence = Evidence(logits[rows, : index + 1], problem_type(config), sure, config.exit_tolerance)
        found[rows] = index * DOUBTS + _levels(evidence, config.exit_criterion)
    return found


def count_cells(found: np.ndarray, exits: int) -> list[list[int]]:
    """Rows by exit and by level of doubt."""
    return np.bincount(found, minlength=exits * DOUBTS).reshape(exits, DOUBTS).tolist()


def _levels(evidence: Evidence, name: str) -> np.ndarray:
    """Levels of doubt, from the least one, 0, on; all 0 where the criterion counts exits, and for numbers."""
    criterion = CRITERIA[name]
    if criterion.counts_exits or evidence.problem_type not in criterion.problem_types:
        return np.zeros(len(evidence.logits), dtype=np.int64)
    signal = criterion.signal(evidence).astype(np.float64)
    doubt = 1 - signal if criterion.leaves_above else signal
    doubt = np.nan_to_num(doubt, nan=1.0).clip(10.0 ** -(DOUBTS // _CELLS_A_POWER), 1.0)
    powers = -np.log10(doubt)
    return DOUBTS - 1 - np.floor(_CELLS_A_POWER * powers).astype(np.int64)


def calibration_in_force(config: Any) -> dict[str, Any] | None:
    """`exit_calibration`, if the thresholds and temperatures are still those that it speaks of."""
    record = config.exit_calibration
    stored = (config.exit_thresholds, config.exit_temperatures)
    return None if record is None or (record["thresholds"], record["temperatures"]) != stored else record


def exit_shares(counts: list[list[int]]) -> list[float]:
    """Share of the rows that took each exit."""
    rows = max(1, sum(map(sum, counts)))
    return [sum(exit_) / rows for exit_ in counts]


def check_profile(counts: Any, exits: int) -> None:
    """Raises `ValueError` unless these are counts of the cells, or None."""
    if counts is None:
        return
    is_right = isinstance(counts, list) and len(counts) == exits and all(_is_counts(row) for row in counts)
    if not is_right or math.fsum(map(sum, counts)) == 0:
        raise ValueError(
            f"exit_calibration['profile'] must be {exits} lists of {DOUBTS} counts, one for each exit, got "
            f"{counts!r:.80}. It is written by calibrate_exits; leave exit_calibration out."
        )


def _is_counts(row: Any) -> bool:
    return isinstance(row, list) and len(row) == DOUBTS and all(type(count) is int and count >= 0 for count in row)
