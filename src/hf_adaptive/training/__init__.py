"""Training with `Trainer`."""

from .conflict_recorder import GradientConflictRecorder
from .gradient_conflict import GradientConflict, gradient_conflict
from .routing_schedule import RoutingSchedule
from .trainer import ExitsTrainer

__all__ = ["ExitsTrainer", "GradientConflict", "GradientConflictRecorder", "RoutingSchedule", "gradient_conflict"]
