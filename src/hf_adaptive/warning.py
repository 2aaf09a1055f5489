"""Warnings that point at the line which called the package, however deep inside it they arise. Without torch."""

import os
import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parent) + os.sep


def warn_caller(message: str) -> None:
    """Warns (`UserWarning`) at the innermost line that is not the package's.

    Args:
        message (`str`): What happened and what to do.
    """
    # As `skip_file_prefixes` does, which Python has from 3.12 on.
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
