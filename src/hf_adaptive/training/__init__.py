"""Training with `Trainer`."""

from .conflict_recorder import GradientConflictRecorder
from .routing_schedule import RoutingSchedule
from .trainer import ExitsTrainer

__all__ = ["ExitsTrainer", "GradientConflictRecorder", "RoutingSchedule"]
