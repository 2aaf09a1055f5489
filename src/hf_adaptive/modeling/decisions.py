"""What every model that answers row by row decides alike: when rows leave, and what is learned from all answers."""

from typing import Any

import torch
from transformers.utils import logging

from .answers import Answers, choose_exits, warn_of_nan
from .bases import ModelBase
from .criteria import CRITERIA, ForcedPolicy, Policy, ThresholdPolicy
from .losses import answer_loss, exits_loss, problem_type

logger = logging.get_logger(__name__)


class DecidesRowByRow(ModelBase):
    """Policies and losses of a classifier with exits or of a cascade; `_exits_are_untrained` says what to warn of."""

    _exits_are_untrained: bool

    def _policy(self, thresholds: Any, exit_at: int | None) -> Policy | None:
        """When rows leave; None to run everything and answer with the last exit."""
        if exit_at is not None:
            return self._forced_policy(thresholds, exit_at)
        thresholds = self.config.exit_thresholds if thresholds is None else thresholds
        if thresholds is None:
            return None
        # Those of the configuration too: `model.config.exit_thresholds = ...` checks nothing.
        thresholds = self.config.checked_thresholds(thresholds)
        if self.training or all(threshold is None for threshold in thresholds):
            return None
        criterion = CRITERIA[self.config.exit_criterion]
        criterion.check_problem_type(problem_type(self.config))
        if self._exits_are_untrained:
            logger.warning_once(
                "exit_thresholds are used with exits that were never trained: what they say means nothing. "
                "Fine-tune the model first, or load a checkpoint with trained exits."
            )
        return ThresholdPolicy(criterion, thresholds)

    def _note_training(self) -> None:
        """A pass in training mode: from now on the exits are being trained."""
        self._exits_are_untrained = self._exits_are_untrained and not self.training

    def _forced_policy(self, thresholds: Any, exit_at: int) -> Policy | None:
        if thresholds is not None:
            raise ValueError(f"give exit_at={exit_at} or exit_thresholds={thresholds}, not both.")
        index = self._exit_index(exit_at)
        is_last = index == len(self.config.exit_layers) - 1
        return None if self.training or is_last else ForcedPolicy(index)

    def _exit_index(self, exit_at: int) -> int:
        """Place in `exit_layers` of the exit after so many layers; a `ValueError` if there is none."""
        if isinstance(exit_at, bool) or exit_at not in self.config.exit_layers:
            raise ValueError(
                f"exit_at must be one of exit_layers={self.config.exit_layers} (layers run), got {exit_at!r}."
            )
        return self.config.exit_layers.index(exit_at)

    def _choose_exits(self, answers: Answers, policy: Policy) -> torch.Tensor:
        is_nan = answers.logits[:, :-1].isnan().any(dim=-1)
        for depth, count in zip(self.config.exit_layers, is_nan.sum(dim=0).tolist()):
            warn_of_nan(depth, count, len(is_nan))
        return choose_exits(answers, policy, self.config)

    def _loss(self, answers: Answers, labels: torch.Tensor, policy: Policy | None) -> torch.Tensor:
        if policy is not None:
            return answer_loss(answers.taken, labels, self.config)
        return exits_loss(answers.logits, answers.certainty, labels, self.config)
