"""What a model is worth: reports, curves, metrics and plots."""

from .report import CurvePoint, ExitReport, PlainModel, evaluate_exits

__all__ = ["CurvePoint", "ExitReport", "PlainModel", "evaluate_exits"]
