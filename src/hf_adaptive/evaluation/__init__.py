"""Reports, curves, calibration and plots."""

from .calibration import CalibrationReport, ExitCalibrator, calibrate_exits
from .gradient_conflict import GradientConflict, gradient_conflict
from .report import CurvePoint, ExitReport, evaluate_exits

__all__ = [
    "CalibrationReport",
    "CurvePoint",
    "ExitCalibrator",
    "ExitReport",
    "GradientConflict",
    "calibrate_exits",
    "evaluate_exits",
    "gradient_conflict",
]
