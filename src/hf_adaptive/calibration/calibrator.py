"""From held-out data to the temperatures and thresholds that a model keeps: `calibrate_exits`."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..evaluation.data_use import note_use
from ..files import write_whole
from ..modeling.answers import Answers, choose_exits
from ..modeling.checks import check_choice, check_classifier, check_count
from ..modeling.criteria import CRITERIA, ThresholdPolicy, problem_type
from ..modeling.examples import as_rows
from ..modeling.exit_profile import cells, count_cells
from ..modeling.labels import has_label, labels_of
from .exit_table import ExitTable, Thresholds
from .reference import check_reference, run_all_exits
from .risk_control import candidate_settings, check_size, find_guaranteed_thresholds, split_examples
from .temperature import TemperatureFit, fit_temperatures
from .threshold_search import find_thresholds
from .wishes import ThresholdChoice, Wish, make_wish

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class CalibrationReport:
    """What was asked of a calibration and what it found.

    Args:
        criterion (`str`): What is compared with the thresholds.
        thresholds (`list[float | None]`, *optional*): One for each exit but the last, in the criterion's unit; None if
            nothing granted the wish (or there was none), and all layers are run.
        choice (`ThresholdChoice`, *optional*): The wish, what it costs and saves on the calibration data, and the
            guarantee; its own thresholds are on the scale of the search. None if only temperatures were asked for.
        temperatures (`list[TemperatureFit]`, *optional*): One for each exit, with likelihood and calibration error
            before and after; None if they were left as they are.
        certainty_ranges (`list[tuple[float, float]]`, *optional*): Of each exit's learned unit, least and largest.
        num_examples (`int`): Calibration examples in all.
        num_unlabelled (`int`): Examples that were left out because they have no label (-100).
    """

    criterion: str
    thresholds: list[float | None] | None
    choice: ThresholdChoice | None
    temperatures: list[TemperatureFit] | None
    certainty_ranges: list[tuple[float, float]] | None
    num_examples: int
    num_unlabelled: int = 0

    @property
    def found(self) -> bool:
        """Whether something granted the wish."""
        return self.choice is not None and self.choice.found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the JSON file."""
        return {
            "criterion": self.criterion,
            "thresholds": self.thresholds,
            "choice": None if self.choice is None else self.choice.to_dict(),
            "temperatures": None if self.temperatures is None else [fit.to_dict() for fit in self.temperatures],
            "certainty_ranges": self.certainty_ranges,
            "num_examples": self.num_examples,
            "num_unlabelled": self.num_unlabelled,
        }

    def to_record(self, temperatures: list[float] | None, profile: list[list[int]]) -> dict[str, Any]:
        """What the configuration keeps of an answered wish (`exit_calibration`).

        Args:
            temperatures (`list[float]`, *optional*): Those that are stored beside it, one for each exit.
            profile (`list[list[int]]`): Calibration examples by exit taken and doubt left, see [`count_cells`].

        Raises:
            ValueError: There was no wish.
        """
        if self.choice is None:
            raise ValueError("only temperatures were asked for: there is no wish to record.")
        choice = self.choice.to_dict()
        return {
            "wish": choice["wish"],
            "guarantee": choice["guarantee"],
            "measured": {**choice["measured"], "exit_shares": list(self.choice.measured.exit_shares)},
            "num_examples": self.num_examples,
            "thresholds": self.thresholds,
            "temperatures": temperatures,
            "profile": profile,
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes the report, whole or not at all."""
        write_whole(path, lambda draft: Path(draft).write_text(json.dumps(self.to_dict(), indent=2) + "\n"))

    def __str__(self) -> str:
        if self.choice is None:
            return f"Temperatures from {self.num_examples} examples: {_rounded(self.temperatures)}"
        wish, measured = self.choice.wish, self.choice.measured
        if not self.choice.full_model_keeps:
            return f"{wish}: {self._already_lost()}"
        if not self.found:
            return f"{wish}: nothing found on {measured.num_examples} examples; all layers are run.{self._way_out()}"
        text = f"{wish}: {self.criterion} thresholds {_shown(self.thresholds)}, cost {measured.mean_cost:.3f}"
        if measured.accuracy is not None:
            text += f", accuracy {measured.accuracy:.4f} (drop {measured.accuracy_drop:+.4f})"
        text += f", {measured.disagreement:.1%} other answers, on {measured.num_examples} examples"
        if self.num_unlabelled:
            text += f" ({self.num_unlabelled} without a label left out)"
        if self.choice.guarantee is not None:
            text += f"; the bound holds on new data with confidence {self.choice.guarantee.confidence:g}"
        return text + "."

    def _already_lost(self) -> str:
        assert self.choice is not None, "there is a wish"
        measured, guarantee = self.choice.measured, self.choice.guarantee
        lost = f"{measured.disagreement:.2%} other answers"
        if self.choice.wish.needs_labels:
            lost = f"{measured.accuracy_drop:.4f} of accuracy"
        allows = (
            "the wish allows" if guarantee is None else f"can be promised with confidence {guarantee.confidence:g}"
        )
        return (
            f"the model alone, with all layers run, has lost {lost} against the reference on "
            f"{measured.num_examples} examples, more than {allows}. No thresholds mend that: quantise less, or allow "
            f"a larger loss.{self._examples_wanted()}"
        )

    def _way_out(self) -> str:
        if self.choice is None or self.choice.guarantee is None:
            return ""
        if self.choice.examples_wanted is None:
            return " More examples would not help: allow a larger loss, or train the exits better."
        return self._examples_wanted()

    def _examples_wanted(self) -> str:
        if self.choice is None or self.choice.examples_wanted is None:
            return ""
        return f" At the rates seen there, about {self.choice.examples_wanted} testing examples would do."


def calibrate_exits(
    model: Any,
    dataset: Sequence[Mapping[str, Any]],
    *,
    target_cost: float | None = None,
    max_accuracy_drop: float | None = None,
    max_disagreement: float | None = None,
    confidence: float | None = None,
    per_exit: bool = False,
    temperatures: bool | None = None,
    batch_size: int = 32,
    seed: int = 0,
    show_progress: bool = True,
    reference: Any = None,
) -> CalibrationReport:
    """Finds temperatures and thresholds on held-out data and stores them in the model's configuration.

    For several wishes make an [`ExitCalibrator`], which runs the model once.

    Args:
        model: A classifier with exits, or a cascade; or one of them exported (`OnnxClassifierWithExits`) or quantised.
        dataset: Tokenised examples, as for `predict`, that are used neither for training nor for evaluation, with
            `labels`, `label` or `label_ids` (only `max_disagreement` does without); those of label -100 are left out.
        target_cost (`float`, *optional*): The most accurate setting at this mean cost (0.4: 40 % of the layers).
        max_accuracy_drop (`float`, *optional*): The cheapest setting that loses at most so much accuracy against the
            last exit (0.005: half a point).
        max_disagreement (`float`, *optional*): The cheapest setting in which at most this share of the answers differs
            from the last exit's.
        confidence (`float`, *optional*): Makes the bound hold on new data of the same distribution with this
            probability (see [`find_guaranteed_thresholds`]); a part of the data then serves only for testing.
        per_exit (`bool`): One threshold an exit instead of one for all.
        temperatures (`bool`, *optional*): Whether to fit temperatures; by default where there are labels of classes.
        batch_size (`int`): Examples run at a time.
        seed (`int`): Of the split that a confidence needs.
        show_progress (`bool`): Whether to show a bar.
        reference (*optional*): The model whose last exit's answers the bound is measured against, where `model` is a
            changed form of it: the bound then covers that change (quantisation), too. By default `model` itself.

    Returns:
        `CalibrationReport`: What is stored now, and what it is worth.

    Raises:
        ValueError: Wishes that contradict each other or are out of range, missing labels, too few examples for the
            confidence, a criterion that means nothing for the problem, or a reference of other labels or made for
            another tokenizer (as far as vocabulary size and special tokens tell).
    """
    wishes = {
        "target_cost": target_cost,
        "max_accuracy_drop": max_accuracy_drop,
        "max_disagreement": max_disagreement,
    }
    calibrator = ExitCalibrator(
        model,
        dataset,
        temperatures=temperatures,
        batch_size=batch_size,
        seed=seed,
        show_progress=show_progress,
        reference=reference,
    )
    report = calibrator.calibrate(**wishes, confidence=confidence, per_exit=per_exit)
    calibrator.store(report)
    return report


class ExitCalibrator:
    """Runs a model once over calibration data, and then answers any number of wishes.

    Args:
        model, dataset, temperatures, batch_size, seed, show_progress, reference: As in [`calibrate_exits`].
    """

    def __init__(
        self,
        model: Any,
        dataset: Sequence[Mapping[str, Any]],
        *,
        temperatures: bool | None = None,
        batch_size: int = 32,
        seed: int = 0,
        show_progress: bool = True,
        reference: Any = None,
    ):
        check_classifier("calibrate_exits", model)
        check_choice("exit_criterion", model.config.exit_criterion, tuple(CRITERIA))
        check_count("seed", seed, least=0)
        if reference is not None:
            check_reference(model, reference)
        self.model = model
        self.config = model.config
        self.criterion = CRITERIA[model.config.exit_criterion]
        self.seed = seed
        self.labels = labels_of(dataset, model.config)
        self.problem_type = problem_type(model.config)
        self.fits_temperatures = self._fits_temperatures(temperatures)
        self._run(dataset, batch_size, show_progress)
        self.reference_logits = (
            None if reference is None else run_all_exits(reference, dataset, batch_size, show_progress)[0][:, -1]
        )
        self.num_unlabelled = self._leave_out_unlabelled()
        note_use(model, as_rows(dataset), "calibration")

    def calibrate(
        self,
        *,
        target_cost: float | None = None,
        max_accuracy_drop: float | None = None,
        max_disagreement: float | None = None,
        confidence: float | None = None,
        per_exit: bool = False,
    ) -> CalibrationReport:
        """Answers one wish (or none: temperatures only) without running the model again, and stores nothing.

        Args:
            target_cost, max_accuracy_drop, max_disagreement, confidence, per_exit: As in [`calibrate_exits`].
        """
        bounds = {
            "target_cost": target_cost,
            "max_accuracy_drop": max_accuracy_drop,
            "max_disagreement": max_disagreement,
        }
        has_wish = any(bound is not None for bound in bounds.values())
        if not has_wish and (confidence is not None or not self.fits_temperatures):
            raise ValueError("say what is wanted: target_cost, max_accuracy_drop or max_disagreement.")
        wish = make_wish(**bounds) if has_wish else None
        if wish is not None and len(self.config.exit_layers) == 1:
            raise ValueError(
                f"{wish} is about leaving early, and the model has one exit only (exit_layers="
                f"{self.config.exit_layers}). Give it more exits, or ask for temperatures only."
            )
        tuning, testing = self._split(wish, confidence, per_exit)
        fits = self._temperature_fits(tuning)
        ranges = self._certainty_ranges(tuning)
        choice = None
        if wish is not None:
            table = self._table(fits, ranges)
            choice = _choose(table, wish, confidence, per_exit, tuning, testing)
        return CalibrationReport(
            criterion=self.criterion.name,
            thresholds=self._user_thresholds(choice),
            choice=choice,
            temperatures=fits,
            certainty_ranges=ranges,
            num_examples=len(self.logits),
            num_unlabelled=self.num_unlabelled,
        )

    def store(self, report: CalibrationReport) -> None:
        """Writes what a report found into the model's configuration (saved with it)."""
        if report.temperatures is not None:
            self.config.exit_temperatures = [fit.temperature for fit in report.temperatures]
        if report.certainty_ranges is not None:
            self.model.set_certainty_ranges(report.certainty_ranges)
        if report.choice is not None:
            self.config.exit_thresholds = report.thresholds
            profile = self._profile(report.certainty_ranges)
            self.config.exit_calibration = report.to_record(self.config.exit_temperatures, profile)
            if not report.found:
                logger.warning(str(report))

    def _profile(self, ranges: list[tuple[float, float]] | None) -> list[list[int]]:
        """Examples by the exit that they take with the stored thresholds, and by the doubt left there."""
        exits = len(self.config.exit_layers)
        logits = (self.logits / self._temperature_tensor(self.config.exit_temperatures)).float()
        last = torch.full((len(logits),), exits - 1)
        answers = Answers(logits, last, self._stretched(ranges))
        if self.config.exit_thresholds is not None:
            policy = ThresholdPolicy(self.criterion, self.config.exit_thresholds)
            answers.exit_index = choose_exits(answers, policy, self.config)
        certainty = None if answers.certainty is None else answers.certainty.numpy()
        return count_cells(cells(logits.numpy(), answers.exit_index.numpy(), certainty, self.config), exits)

    # What was run

    def _fits_temperatures(self, asked: bool | None) -> bool:
        is_possible = self.labels is not None and self.problem_type != "regression"
        if asked and not is_possible:
            raise ValueError(
                "temperatures=True needs labels of classes: "
                f"{'the examples have none' if self.labels is None else 'this is regression'}. Add a column 'labels', "
                "or pass temperatures=False."
            )
        return is_possible if asked is None else asked

    def _run(self, dataset: Sequence[Mapping[str, Any]], batch_size: int, show_progress: bool) -> None:
        """One pass over the data: logits before temperatures, and certainties before their range, of every exit."""
        logits, certainty = run_all_exits(self.model, dataset, batch_size, show_progress)
        self.logits = logits * self._temperature_tensor(self.config.exit_temperatures)
        self.certainty = None if certainty is None else self._unstretched(certainty)

    def _leave_out_unlabelled(self) -> int:
        """How many rows of what was run have no label where others have one; they serve for nothing."""
        if self.labels is None:
            return 0
        is_labelled = has_label(self.labels, self.problem_type)
        self.labels, self.logits = self.labels[is_labelled], self.logits[is_labelled]
        self.certainty = None if self.certainty is None else self.certainty[is_labelled]
        if self.reference_logits is not None:
            self.reference_logits = self.reference_logits[is_labelled]
        return int((~is_labelled).sum())

    def _unstretched(self, certainty: torch.Tensor) -> torch.Tensor:
        least, largest = torch.tensor(self.model.certainty_ranges, dtype=torch.float64).unbind(dim=1)
        return least + certainty * (largest - least)

    def _temperature_tensor(self, temperatures: list[float] | None) -> torch.Tensor:
        values = [1.0] * len(self.config.exit_layers) if temperatures is None else temperatures
        return torch.tensor(values, dtype=torch.float64).view(-1, 1)

    # What is tried

    def _split(self, wish: Wish | None, confidence: float | None, per_exit: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Examples that shape scores and candidates, and examples that test them: the same without a confidence."""
        everything = torch.arange(len(self.logits))
        shapes_something = self.fits_temperatures or self.certainty is not None or per_exit
        if wish is None or confidence is None or not shapes_something:
            return everything, everything
        tuning, testing = split_examples(len(everything), seed=self.seed)
        check_size(len(testing), wish, confidence, len(everything))
        return tuning, testing

    def _temperature_fits(self, tuning: torch.Tensor) -> list[TemperatureFit] | None:
        if self.labels is None or not self.fits_temperatures:
            return None
        return fit_temperatures(self.logits[tuning], self.labels[tuning])

    def _certainty_ranges(self, tuning: torch.Tensor) -> list[tuple[float, float]] | None:
        if self.certainty is None:
            return None
        seen = self.certainty[tuning]
        return list(zip(seen.amin(dim=0).tolist(), seen.amax(dim=0).tolist()))

    def _table(self, fits: list[TemperatureFit] | None, ranges: list[tuple[float, float]] | None) -> ExitTable:
        self.criterion.check_problem_type(self.problem_type)
        temperatures = self.config.exit_temperatures if fits is None else [fit.temperature for fit in fits]
        # As the model computes it: float32, divided by the temperatures.
        logits = (self.logits / self._temperature_tensor(temperatures)).float()
        answers = Answers(logits, torch.zeros(len(logits), dtype=torch.long), self._stretched(ranges))
        exits = range(logits.shape[1])
        signals = torch.stack(
            [self.criterion.signal(answers.evidence(index, self.config)).double() for index in exits], dim=1
        )
        signals = signals.masked_fill(logits.isnan().any(dim=-1), math.nan)
        scores = signals if self.criterion.leaves_above else -signals
        agrees, correct, reference_correct = self._agreement(logits)
        costs = torch.tensor(self.config.exit_costs, dtype=torch.float64)
        return ExitTable(
            scores,
            agrees,
            costs,
            correct,
            lowest_score=self._lowest_score(),
            branch_costs=self._branch_costs(),
            reference_correct=reference_correct,
        )

    def _branch_costs(self) -> torch.Tensor | None:
        """What is saved at exits that nothing may take; a criterion that compares exits hears them all the same."""
        if self.criterion.compares_exits:
            return None
        return torch.tensor(self.config.exit_branch_costs, dtype=torch.float64)

    def _stretched(self, ranges: list[tuple[float, float]] | None) -> torch.Tensor | None:
        if ranges is None or self.certainty is None:
            return None
        least, largest = torch.tensor(ranges, dtype=torch.float64).unbind(dim=1)
        return ((self.certainty - least) / (largest - least)).clamp(0, 1).float()

    def _agreement(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Whether each exit says what the last one (the reference's) says, and what the label says, `(examples,
        exits)` each; and whether the reference says what the label says, `(examples,)`."""
        has_reference = self.reference_logits is not None
        trusted = logits[:, -1] if self.reference_logits is None else self.reference_logits
        agrees = self._same_answers(logits, trusted)
        if self.labels is None or self.problem_type == "regression":
            # A number is not right or wrong.
            return agrees, None, None
        correct, reference_correct = self._is_right(logits), self._is_right(trusted.unsqueeze(1))[:, 0]
        return agrees, correct, reference_correct if has_reference else None

    def _same_answers(self, logits: torch.Tensor, trusted: torch.Tensor) -> torch.Tensor:
        """Whether each exit `(examples, exits, labels)` says what the trusted one `(examples, labels)` says."""
        trusted = trusted.unsqueeze(1)
        if self.problem_type == "regression":
            # Two numbers can be the same within the tolerance.
            return (logits - trusted).abs().amax(dim=-1) <= self.config.exit_tolerance
        if self.problem_type == "multi_label_classification":
            return ((logits > 0) == (trusted > 0)).all(dim=-1)
        return logits.argmax(dim=-1) == trusted.argmax(dim=-1)

    def _is_right(self, logits: torch.Tensor) -> torch.Tensor:
        """Whether scores `(examples, exits, labels)` say what the label says; NaN never does."""
        assert self.labels is not None, "asked where there are labels"
        is_number = ~logits.isnan().any(dim=-1)
        if self.problem_type == "multi_label_classification":
            return ((logits > 0) == self.labels.bool().unsqueeze(1)).all(dim=-1) & is_number
        return (logits.argmax(dim=-1) == self.labels.view(-1, 1)) & is_number

    def _lowest_score(self) -> float:
        """Where everything leaves: the end of the criterion's range."""
        end = self.criterion.loosest_threshold
        return end if self.criterion.leaves_above else -end

    def _user_thresholds(self, choice: ThresholdChoice | None) -> list[float | None] | None:
        """From the scale of the search to the criterion's; None where nothing leaves early."""
        if choice is None or not choice.found or choice.thresholds == (None,) * len(choice.thresholds):
            return None
        return [None if score is None else self._user_threshold(score) for score in choice.thresholds]

    def _user_threshold(self, score: float) -> float:
        threshold = score if self.criterion.leaves_above else -score
        # Between two counts of agreeing exits lies no count.
        return float(math.ceil(threshold)) if self.criterion.counts_exits else threshold


def _choose(
    table: ExitTable,
    wish: Wish,
    confidence: float | None,
    per_exit: bool,
    tuning: torch.Tensor,
    testing: torch.Tensor,
) -> ThresholdChoice:
    if confidence is None:
        return find_thresholds(table, wish, per_exit)
    candidates: list[Thresholds] | None = candidate_settings(table.select(tuning), wish) if per_exit else None
    return find_guaranteed_thresholds(table.select(testing), wish, confidence, candidates)


def _rounded(fits: list[TemperatureFit] | None) -> str:
    return ", ".join(f"{fit.temperature:.3g}" for fit in fits or [])


def _shown(thresholds: list[float | None] | None) -> str:
    if thresholds is None:
        return "none"
    if len(set(thresholds)) == 1 and thresholds[0] is not None:
        return f"{thresholds[0]:.4g} each"
    return "[" + ", ".join("–" if one is None else f"{one:.4g}" for one in thresholds) + "]"
