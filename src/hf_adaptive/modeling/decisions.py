"""What every model that answers row by row decides alike: when rows leave, and what is learned from all answers."""

from typing import Any

import torch
from transformers.utils import is_torchdynamo_exporting, logging
from transformers.utils.import_utils import is_jit_tracing, is_tracing

from .answers import Answers, Leaving, choose_exits, warn_of_nan
from .bases import ModelBase
from .criteria import CRITERIA, ForcedPolicy, Policy, ThresholdPolicy, exit_position, problem_type
from .inputs import BackboneInputs
from .losses import answer_loss, exits_loss

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

    def _forced_policy(self, thresholds: Any, exit_at: int) -> Policy | None:
        if thresholds is not None:
            raise ValueError(f"give exit_at={exit_at} or exit_thresholds={thresholds}, not both.")
        index = self._exit_index(exit_at)
        is_last = index == len(self.config.exit_layers) - 1
        return None if self.training or is_last else ForcedPolicy(index)

    def _exit_index(self, exit_at: int) -> int:
        """Place in `exit_layers` of the exit after so many layers; a `ValueError` if there is none."""
        return exit_position(exit_at, self.config.exit_layers)

    def _leave_early(self, inputs: BackboneInputs, policy: Policy) -> Answers:
        """Runs rows until they leave; the rows that stay are run on as a smaller, tighter batch."""
        if isinstance(policy, ForcedPolicy):
            return self._run_until(inputs, policy.exit_index)
        _refuse_to_be_traced()
        leaving = Leaving(self.config, policy, inputs)
        progress = self._run_until_rows_leave(leaving)
        while progress is not None:
            progress.hidden = leaving.shrink(progress.hidden)
            progress = self._run_until_rows_leave(leaving, progress)
        assert leaving.answers is not None, "at least one exit has answered"
        return leaving.answers

    def _choose_exits(self, answers: Answers, policy: Policy) -> torch.Tensor:
        if not is_tracing():
            is_nan = answers.logits[:, :-1].isnan().any(dim=-1)
            for depth, count in zip(self.config.exit_layers, is_nan.sum(dim=0).tolist()):
                warn_of_nan(depth, count, len(is_nan))
        return choose_exits(answers, policy, self.config)

    def _loss(self, answers: Answers, labels: torch.Tensor, policy: Policy | None) -> torch.Tensor:
        if policy is not None:
            return answer_loss(answers.taken, labels, self.config)
        return exits_loss(answers.logits, answers.certainty, labels, self.config)

    def _scores(self, answers: Answers, loss: torch.Tensor | None) -> dict[str, Any]:
        """What a pass returns as `logits` and `exit_logits`; in training it is noted which of them is learned from."""
        if not self.training:
            return {"logits": answers.taken, "exit_logits": answers.logits}
        # Two tensors, so that a gradient through one is not taken for one through the other.
        taken, of_every_exit = answers.taken, answers.logits.view_as(answers.logits)
        for tensor, note in (
            (loss, self._note_training),
            (of_every_exit, self._note_training),
            (taken, self._warn_of_one_exit),
        ):
            if tensor is not None and tensor.requires_grad:
                tensor.register_hook(note)
        return {"logits": taken, "exit_logits": of_every_exit}

    def _note_training(self, gradient: torch.Tensor) -> None:
        """A gradient on its way to every exit: from now on they are being trained."""
        self._exits_are_untrained = False

    def _warn_of_one_exit(self, gradient: torch.Tensor | None) -> None:
        """A gradient on its way to the last exit only."""
        # DDP sends zeros, or None, to outputs that the loss does not come from.
        if gradient is None or not gradient.any():
            return
        if len(self.config.exit_layers) == 1:
            self._exits_are_untrained = False
            return
        logger.warning_once(
            "a loss on outputs.logits trains the last exit only: in training mode those are its scores, and the exits "
            f"after layers {self.config.exit_layers[:-1]} learn nothing (nor, where exit_routing lets no gradient "
            "pass them, do the layers below). For a loss of your own on every exit use outputs.exit_logits "
            "(batch, exits, labels), or hf_adaptive.ExitsTrainer, which calls compute_loss_func, and the loss of "
            "label_smoothing_factor, with each exit's logits in turn."
        )


def _refuse_to_be_traced() -> None:
    """Raises `ValueError` where what one batch does would be written down as what every batch does."""
    if is_jit_tracing() or is_torchdynamo_exporting():
        raise ValueError(
            "with exit_thresholds each row leaves on its own, but a traced or exported model treats all rows alike. "
            "Give exit_at=..., or set model.config.exit_thresholds = None and choose among exit_logits; "
            "hf_adaptive.export_onnx exports a graph for each stage, with which rows leave."
        )
