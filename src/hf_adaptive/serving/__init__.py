"""Serving: the rows of many requests through one model, stage by stage."""

from .engine import ExitsEngine
from .errors import DeadlineExceededError, EngineBrokenError, EngineClosedError, EngineFullError, NotANumberError
from .requests import EngineAnswer
from .statistics import EngineStatistics

__all__ = [
    "DeadlineExceededError",
    "EngineAnswer",
    "EngineBrokenError",
    "EngineClosedError",
    "EngineFullError",
    "EngineStatistics",
    "ExitsEngine",
    "NotANumberError",
]
