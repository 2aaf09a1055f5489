"""Checks of single values that users give; a `ValueError` names the value, what is allowed, and what was given."""

import math
import os
from numbers import Integral, Real
from typing import Any


def is_whole_number(value: Any) -> bool:
    """Whether it is an integer, of Python or numpy; truth values are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number, of Python or numpy; truth values are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises `ValueError` unless `value` is one of `allowed`, which are texts or truth values."""
    if not isinstance(value, (str, int)) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shortened(value)}.")


def has_exits(model: Any) -> bool:
    """Whether it is a classifier with exits or a cascade, in torch or exported."""
    return getattr(getattr(model, "config", None), "exit_layers", None) is not None


def check_classifier(user: str, model: Any) -> None:
    """Raises `ValueError` unless a classifier with exits or a cascade, in torch or exported."""
    if not has_exits(model):
        raise ValueError(
            f"{user} needs a model with exits or a cascade, got a {type(model).__name__}. Load one with "
            "AutoModelForSequenceClassificationWithExits.from_pretrained(...)."
        )


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises `ValueError` unless a whole number of at least so many."""
    if not is_whole_number(value) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {shortened(value)}.")


def check_at_least(name: str, value: Any, least: float) -> None:
    """Raises `ValueError` unless a finite number of at least so much."""
    if not is_number(value) or value < least:
        raise ValueError(f"{name} must be a number of at least {least}, got {shortened(value)}.")


def check_path(name: str, value: Any) -> str | os.PathLike[str]:
    """The value, if it is a text or a path; else raises `ValueError`."""
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{name} must be a path, a text or a pathlib.Path, got {shortened(value)}.")
    return value


def shortened(value: Any) -> str:
    """A value as text, for messages."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
