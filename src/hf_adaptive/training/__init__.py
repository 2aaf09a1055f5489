"""Training with `Trainer`."""

from .conflict_recorder import GradientConflictRecorder
from .distillation import ExitDistillation, add_teacher_logits
from .gradient_conflict import GradientConflict, gradient_conflict
from .routing_schedule import RoutingSchedule
from .trainer import ExitsTrainer

__all__ = [
    "ExitDistillation",
    "ExitsTrainer",
    "GradientConflict",
    "GradientConflictRecorder",
    "RoutingSchedule",
    "add_teacher_logits",
    "gradient_conflict",
]
