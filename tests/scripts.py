"""Runs scripts of examples/ in this process, as from the command line: their imports take longer than their work."""

import contextlib
import importlib
import io
import logging
import os
import sys
from pathlib import Path
from unittest import mock

import datasets
import pytest
import transformers


def run_here(name: str, *arguments: object, folder: Path) -> str:
    """Calls a script's `main` in a folder.

    Args:
        name: Module of the script.
        *arguments: Its flags.
        folder: Where it is called.

    Returns:
        What it printed. What it sets for its process is undone.
    """
    script = importlib.import_module(name)
    printed = io.StringIO()
    with _own_settings(), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        script.main()
    return printed.getvalue()


@contextlib.contextmanager
def _own_settings():
    """Environment, and what is said, are afterwards as they were before."""
    verbosity, level = transformers.logging.get_verbosity(), logging.root.level
    with mock.patch.dict(os.environ):
        try:
            yield
        finally:
            logging.root.setLevel(level)
            transformers.logging.set_verbosity(verbosity)
            transformers.logging.enable_progress_bar()
            datasets.enable_progress_bars()
