"""What a model is worth: reports, curves, metrics and plots."""

from .report import CurvePoint, ExitReport, evaluate_exits

__all__ = ["CurvePoint", "ExitReport", "evaluate_exits"]
