"""Reports, curves, calibration and plots."""

from .calibration import CalibrationReport, ExitCalibrator, calibrate_exits
from .report import CurvePoint, ExitReport, evaluate_exits

__all__ = [
    "CalibrationReport",
    "CurvePoint",
    "ExitCalibrator",
    "ExitReport",
    "calibrate_exits",
    "evaluate_exits",
]
