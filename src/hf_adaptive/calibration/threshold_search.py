"""From a wish ("three times cheaper", "at most half a point worse") to the thresholds that grant it.

Nothing here promises anything about new data: `risk_control` does.
"""

from __future__ import annotations

from .exit_table import ExitTable, Thresholds
from .setting_search import PerExitSearch, SharedPath
from .wishes import Objective, ThresholdChoice, Wish, objective_of, reward_of


def find_thresholds(table: ExitTable, wish: Wish, per_exit: bool = False) -> ThresholdChoice:
    """The best setting of the thresholds for a wish on these examples.

    One threshold for all exits is found by comparing every operating point there is. One per exit is found by a local
    search (see [`PerExitSearch`]) that is never worse than the shared threshold on these examples, without a promise
    to be the global optimum.

    Args:
        table: the calibration examples.
        wish: from [`make_wish`].
        per_exit: one threshold per exit instead of one for all.

    Raises:
        ValueError: a wish about accuracy without labels.
    """
    objective = objective_of(wish, table)
    thresholds = _best_per_exit(table, wish, objective) if per_exit else _best_shared(table, wish, objective)
    found = thresholds is not None and (not wish.allows_loss or table.saves(thresholds))
    # Nothing grants a bound on the loss: not even all layers run, which lose nothing unless there is a reference.
    full_model_keeps = thresholds is not None or not wish.allows_loss
    if thresholds is None or not found:
        thresholds = table.run_everything
    measured = table.measure(thresholds)
    return ThresholdChoice(wish, found, thresholds, per_exit, measured, full_model_keeps=full_model_keeps)


def _best_shared(table: ExitTable, wish: Wish, objective: Objective) -> Thresholds | None:
    path, reward = SharedPath(table), reward_of(table, wish)
    values = objective(path.mean(reward), path.mean(table.costs.expand_as(reward)))
    best = int(values.argmax())
    return path.setting(best) if values[best].isfinite() else None


def _best_per_exit(table: ExitTable, wish: Wish, objective: Objective) -> Thresholds | None:
    return PerExitSearch(table, reward_of(table, wish)).best(objective)
