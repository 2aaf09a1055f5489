"""From a wish to temperatures and thresholds: search, exact tests, guarantees."""

from .calibrator import CalibrationReport, ExitCalibrator, calibrate_exits

__all__ = ["CalibrationReport", "ExitCalibrator", "calibrate_exits"]
