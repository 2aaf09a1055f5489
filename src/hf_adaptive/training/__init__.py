"""Training with `Trainer`."""

from .trainer import ExitsTrainer

__all__ = ["ExitsTrainer"]
