"""Whether what was calibrated still holds while serving: an audit of the answers, and a watch on the rows."""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers.utils import logging

from ..modeling.checks import check_choice, is_number
from ..modeling.criteria import CRITERIA, problem_type
from ..modeling.exit_profile import calibration_in_force, cells, exit_shares
from ..modeling.scheduling import RowAnswers
from .requests import Request
from .sequential import BoundTest, DriftTest, exact_interval

logger = logging.get_logger(__name__)

# Rows that wait for their audit; more are not drawn.
_WAITING_AUDITS = 1024
# A bound that was not asked for: what was measured at calibration, so surely not exceeded there.
_CONFIDENCE = 0.95
ACTIONS = {"warn": "warned", "tighten": "tightened", "run_everything": "runs everything"}


@dataclass(frozen=True)
class AuditReport:
    """What the audit found.

    Args:
        share (`float`): Of the answered rows that are drawn for it.
        rows (`int`): Audited so far, since thresholds last changed.
        other_answers (`int`): Of these, how many the last exit answers differently.
        rate (`float`, *optional*): Their share.
        interval (`tuple[float, float]`): In which the rate lies with 95 % (Clopper–Pearson; for one look).
        bound (`float`, *optional*): The rate that was promised or measured at calibration; None if it is not known.
        bound_from (`str`): What the bound is.
        is_broken (`bool`): Whether the rate is above the bound, by a test that may be looked at all the time.
        action (`str`): What was done about it: `none`, `warned`, `tightened` or `runs everything`.
    """

    share: float
    rows: int
    other_answers: int
    rate: float | None
    interval: tuple[float, float]
    bound: float | None
    bound_from: str
    is_broken: bool
    action: str


@dataclass(frozen=True)
class DriftReport:
    """Whether rows are like those of the calibration.

    Args:
        is_watched (`bool`): False where nothing is known to compare with; `why_not` says why.
        why_not (`str`): See above.
        rows (`int`): Seen so far.
        is_drifting (`bool`): Whether they differ, by a test that may be looked at all the time.
        found_after (`int`, *optional*): Rows after which it was found.
        false_alarm_rate (`float`): Probability that it is ever said though nothing changes.
        exit_shares (`list[float]`): Shares of the exits so far.
        expected_shares (`list[float]`, *optional*): At calibration.
    """

    is_watched: bool
    why_not: str
    rows: int
    is_drifting: bool
    found_after: int | None
    false_alarm_rate: float
    exit_shares: list[float]
    expected_shares: list[float] | None


@dataclass(frozen=True)
class Audited:
    """A row that was answered, and how."""

    request: Request
    taken: np.ndarray


class Monitor:
    """Draws rows for the audit and follows where rows leave.

    Args:
        config: The model's configuration.
        decisions (`dict`): What the engine was told of thresholds; something else than the calibrated ones cannot be
            compared with the calibration.
        audit_share (`float`): Share of the answered rows that are drawn.
        when_broken (`str`): See [`ExitsEngine`].
        false_alarm_rate (`float`): Of each of the two tests.
        seed (`int`): Of what is drawn.

    Raises:
        ValueError: A setting out of range.
    """

    def __init__(
        self,
        config: Any,
        decisions: dict[str, Any],
        audit_share: float,
        when_broken: str,
        false_alarm_rate: float,
        seed: int,
    ):
        _check_settings(audit_share, when_broken, false_alarm_rate)
        self.config = config
        self.decisions = decisions
        self.audit_share = audit_share
        self.when_broken = when_broken
        self.false_alarm_rate = false_alarm_rate
        self._random = np.random.default_rng(seed)
        self._problem_type = problem_type(config)
        is_as_calibrated = all(value is None for value in decisions.values())
        self._record = calibration_in_force(config) if is_as_calibrated else None
        # A heap of the rows' numbers, their cells, and the rows where they were drawn.
        self._unordered: list[tuple[int, int, Audited | None]] = []
        self._waiting: deque[Audited] = deque()
        self._counts = np.zeros(len(config.exit_layers), dtype=np.int64)
        self._drift = self._new_drift_test(seed)
        self._bound, self._bound_from = self._find_bound()
        self._action = "none"
        self._audit_anew()

    # Rows that were answered

    def note(self, rows: Sequence[Request], answers: RowAnswers) -> None:
        """Rows were answered, in whatever order."""
        if not rows:
            return
        self._counts += np.bincount(answers.exit_index, minlength=len(self._counts))
        if self._drift is None and self.audit_share == 0:
            return
        drawn = (self._random.random(len(rows)) < self.audit_share).tolist()
        if self._drift is None:
            found = [0] * len(rows)
        else:
            found = cells(answers.logits, answers.exit_index, answers.certainty, self.config).tolist()
        for row, taken, cell, is_drawn in zip(rows, answers.taken, found, drawn):
            if is_drawn or self._drift is not None:
                heapq.heappush(self._unordered, (row.number, cell, Audited(row, taken) if is_drawn else None))

    def look(self, oldest: float) -> None:
        """Tests rows, and lets those drawn wait, in the order in which they came, as far as all before are done.

        Easy rows are answered first: in the order of the answers every stream would seem to become harder.

        Args:
            oldest (`float`): Number of the oldest row that is still to be answered.
        """
        found = []
        while self._unordered and self._unordered[0][0] < oldest:
            _, cell, audited = heapq.heappop(self._unordered)
            found.append(cell)
            if audited is not None and len(self._waiting) < _WAITING_AUDITS:
                self._waiting.append(audited)
        if self._drift is not None and found:
            self._watch(self._drift, found)

    def _watch(self, test: DriftTest, found: list[int]) -> None:
        known = test.found_after is not None
        test.note(found)
        if test.found_after is not None and not known:
            logger.warning(
                f"rows are no longer like those of the calibration (found after {test.found_after} rows; a false "
                f"alarm ever has probability {self.false_alarm_rate:g}). Check the answers, and calibrate again."
            )

    # The audit

    def next_audit(self) -> Audited | None:
        """A row that is to be run to the last exit."""
        return self._waiting.popleft() if self._waiting else None

    def note_audit(self, audited: Audited, last: np.ndarray) -> dict[str, Any] | None:
        """What the last exit says, scores of shape `(labels,)`; returns the thresholds to go on with, if new ones."""
        is_other = not self._agree(audited.taken, last)
        self._audited += 1
        self._others += is_other
        if self._test is None:
            return None
        was_broken = self._test.is_broken
        self._test.note(is_other)
        return self._act() if self._test.is_broken and not was_broken else None

    def _agree(self, taken: np.ndarray, last: np.ndarray) -> bool:
        if self._problem_type == "multi_label_classification":
            return bool(((taken > 0) == (last > 0)).all())
        if self._problem_type == "regression":
            return bool(np.abs(taken - last).max() <= (self.config.exit_tolerance or 0.0))
        return int(taken.argmax()) == int(last.argmax())

    def _act(self) -> dict[str, Any] | None:
        report = self._report()
        logger.warning(
            f"{report.other_answers} of {report.rows} audited answers differ from the last exit's: more than "
            f"{report.bound:.3g} ({report.bound_from}), with confidence. when_broken={self.when_broken!r}."
        )
        self._action = ACTIONS[self.when_broken]
        if self.when_broken == "warn":
            return None
        # What was calibrated speaks of other thresholds.
        self._drift, self._record = None, None
        self._audit_anew()
        exits = len(self.config.exit_layers) - 1
        if self.when_broken == "run_everything":
            self.decisions = {"exit_thresholds": [None] * exits}
        else:
            self.decisions = {"exit_thresholds": [self._tightened(one) for one in self._thresholds()]}
        return self.decisions

    def _thresholds(self) -> list[float | None]:
        asked = self.decisions.get("exit_thresholds")
        return self.config.checked_thresholds(self.config.exit_thresholds if asked is None else asked)

    def _tightened(self, threshold: float | None) -> float | None:
        return None if threshold is None else CRITERIA[self.config.exit_criterion].tightened(threshold)

    def _audit_anew(self) -> None:
        self._audited, self._others = 0, 0
        self._waiting.clear()
        self._test = None if self._bound is None else BoundTest(self._bound, self.false_alarm_rate)

    def _find_bound(self) -> tuple[float | None, str]:
        """The rate of other answers that is to be kept."""
        if self._record is None:
            return None, "nothing was calibrated for these thresholds"
        wish = self._record["wish"]
        if wish["name"] == "max_disagreement":
            return wish["bound"], f"{wish['name']}={wish['bound']:g} was asked for"
        measured = self._record["measured"]
        count = round(measured["disagreement"] * measured["num_examples"])
        most = exact_interval(count, measured["num_examples"], 2 * _CONFIDENCE - 1)[1]
        return most, f"{measured['disagreement']:.3g} was measured on {measured['num_examples']} calibration examples"

    # Reports

    def audit_report(self) -> dict[str, Any]:
        """As plain values, see [`AuditReport`]."""
        return asdict(self._report())

    def _report(self) -> AuditReport:
        return AuditReport(
            share=self.audit_share,
            rows=self._audited,
            other_answers=self._others,
            rate=self._others / self._audited if self._audited else None,
            interval=exact_interval(self._others, self._audited),
            bound=self._bound,
            bound_from=self._bound_from,
            is_broken=self._test is not None and self._test.is_broken,
            action=self._action,
        )

    def drift_report(self) -> dict[str, Any]:
        """As plain values, see [`DriftReport`]."""
        test = self._drift
        return asdict(
            DriftReport(
                is_watched=test is not None,
                why_not="" if test is not None else "nothing was calibrated for these thresholds",
                rows=int(self._counts.sum()),
                is_drifting=test is not None and test.found_after is not None,
                found_after=None if test is None else test.found_after,
                false_alarm_rate=self.false_alarm_rate,
                exit_shares=(self._counts / max(1, self._counts.sum())).tolist(),
                expected_shares=None if self._record is None else exit_shares(self._record["profile"]),
            )
        )

    def _new_drift_test(self, seed: int) -> DriftTest | None:
        if self._record is None:
            return None
        return DriftTest(np.ravel(self._record["profile"]).tolist(), self.false_alarm_rate, seed)


def _check_settings(audit_share: float, when_broken: str, false_alarm_rate: float) -> None:
    if not is_number(audit_share) or not 0 <= audit_share <= 1:
        raise ValueError(f"audit_share must be a share from 0 (off) to 1, got {audit_share!r}.")
    check_choice("when_broken", when_broken, tuple(ACTIONS))
    if not is_number(false_alarm_rate) or not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate must be a probability above 0 and below 1, got {false_alarm_rate!r}.")
