"""Routing that changes over training: from SWEET to joint, or the reverse, or to anything between."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling.checks import check_choice, is_number
from ..modeling.exits import ExitsMixin
from ..modeling.routing import gradient_share
from .unwrapping import without_adapter

SHAPES = ("linear", "step")


class RoutingSchedule(TrainerCallback):
    """Changes `model.config.exit_routing` over training; the configuration ends with `end`, however training ends.

    What a step is trained with depends on its number only, so that training goes on as it was after a checkpoint.

    Args:
        start (`str` or `float`): Routing of the first step: `joint`, `sweet`, or a share from 0 to 1.
        end (`str` or `float`): Routing of the last step.
        shape (`str`): `linear`: the share moves from one to the other by the same amount every step; `step`: the first
            half of the steps has `start`, the second half `end`.

    Raises:
        ValueError: A routing or shape that cannot be used; when training starts, a model without exits, one of routing
            `disjoint`, or one whose layers are one shared module with a share between 0 and 1.

    Example:

        >>> trainer = ExitsTrainer(model, args, callbacks=[RoutingSchedule("joint", "sweet", shape="step")], ...)
    """

    def __init__(self, start: str | float, end: str | float, shape: str = "linear"):
        for name, routing in (("start", start), ("end", end)):
            _check_end(name, routing)
        check_choice("shape", shape, SHAPES)
        self.start, self.end, self.shape = start, end, shape

    def routing(self, step: int, max_steps: int) -> str | float:
        """Routing of a step.

        Args:
            step (`int`): Steps done before it, from 0.
            max_steps (`int`): Steps of the whole training.
        """
        if self.shape == "step":
            return self.start if 2 * step + 1 < max_steps else self.end
        # The last step is trained with `end`; if it is the only one, too.
        progress = step / (max_steps - 1) if max_steps > 1 else 1.0
        if progress in (0.0, 1.0):
            return self.end if progress else self.start
        first, last = gradient_share(self.start), gradient_share(self.end)
        return first + (last - first) * progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Refuses models for which a schedule has no meaning."""
        model = without_adapter(model)
        _check_model(model)
        routings = {self.routing(step, state.max_steps) for step in range(state.max_steps)}
        between = sorted(share for share in map(gradient_share, routings) if 0 < share < 1)
        if model.architecture.shares_layers and between:
            raise ValueError(
                f"RoutingSchedule({self.start!r}, {self.end!r}, {self.shape!r}) passes shares such as "
                f"{between[0]:.3g}, which have no meaning for {model.architecture.name}, whose layers are one shared "
                "module: use shape='step' with 'joint' and 'sweet'."
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Sets the routing of the step."""
        model.config.exit_routing = self.routing(state.global_step, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Leaves `end` in the configuration, also where training was stopped early."""
        model.config.exit_routing = self.end


def _check_end(name: str, routing: Any) -> None:
    if isinstance(routing, str) and routing in ("joint", "sweet"):
        return
    if not is_number(routing) or not 0 <= routing <= 1:
        raise ValueError(
            f"{name} must be 'joint', 'sweet' or a share from 0 (sweet) to 1 (joint), got {routing!r}. ('disjoint' "
            "freezes the backbone when the model is made, so it cannot be a part of a schedule.)"
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, ExitsMixin):
        raise ValueError(
            f"RoutingSchedule needs a classifier with exits, got a {type(model).__name__}, which has no routing."
        )
    if model.config.exit_routing == "disjoint":
        raise ValueError(
            "the model was made with exit_routing='disjoint', which froze its backbone: make it with the schedule's "
            "start ('joint', 'sweet' or a share)."
        )
