"""A classifier's graphs in onnxruntime. Without torch."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .folder import IS_ASKED, STATE, Stage


def needed(package: str) -> Any:
    """A package of the extra "onnx".

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f'{package} is not installed, or cannot be loaded ({error}): pip install "hf_adaptive[onnx]". To run an '
            "exported model without torch: pip install --no-deps hf_adaptive, and pip install onnxruntime tokenizers."
        ) from error


class StageGraphs:
    """The graphs of one classifier, each run for a batch at a time; several threads may do so at once.

    Args:
        folder (`Path`): Where the graphs are.
        stages (`Sequence[Stage]`): What they are.
        providers (`Sequence[str]`, *optional*): Execution providers of onnxruntime, the preferred first; the CPU's by
            default.
        threads (`int`, *optional*): Threads of one run; onnxruntime's choice by default.

    Raises:
        ValueError: A provider that this onnxruntime does not have, or a bad number of threads.
        OSError: A graph that cannot be read, or that has other inputs or outputs than it should.

    Attributes:
        inputs (`list[str]`): What the graphs read of an example.
    """

    def __init__(
        self,
        folder: Path,
        stages: Sequence[Stage],
        providers: Sequence[str] | None = None,
        threads: int | None = None,
    ):
        runtime = needed("onnxruntime")
        self.stages = list(stages)
        names = dict.fromkeys(name for stage in self.stages for name in stage.inputs)
        self.inputs = [name for name in names if name not in (STATE, IS_ASKED)]
        chosen = _checked_providers(providers, runtime.get_available_providers())
        options = runtime.SessionOptions()
        options.intra_op_num_threads = _checked_threads(threads)
        options.log_severity_level = 3
        # Each graph has threads of its own. Waiting in a loop for the next call, as they do by default, those of the
        # graph that ran before would take the processor from the one that runs now. While a graph runs they may wait
        # in a loop: to be woken for every operation takes longer than small ones do.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._sessions = [_session(runtime, folder / stage.file, options, chosen) for stage in self.stages]
        for stage, session in zip(self.stages, self._sessions):
            _check_names(stage, session, folder)

    def __len__(self) -> int:
        return len(self.stages)

    def shape(self, index: int, output: str) -> list[Any]:
        """Shape of an output of one graph, as the graph declares it; names stand for what is free."""
        shapes = {each.name: each.shape for each in self._sessions[index].get_outputs()}
        return shapes[output]

    def run(self, index: int, arrays: Mapping[str, np.ndarray], is_asked: bool = True) -> dict[str, np.ndarray]:
        """Outputs of one graph by name.

        Args:
            index (`int`): Of the stage.
            arrays (`Mapping[str, np.ndarray]`): Some are the graph's inputs.
            is_asked (`bool`): Whether what the exit says is wanted; if not, it may have no rows.
        """
        stage = self.stages[index]
        given = {name: np.array(is_asked) if name == IS_ASKED else arrays[name] for name in stage.inputs}
        return dict(zip(stage.outputs, self._sessions[index].run(stage.outputs, given)))


def _session(runtime: Any, path: Path, options: Any, providers: list[str]) -> Any:
    try:
        return runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's own classes have no common one
        raise OSError(f"{path} cannot be read: {error}. Copy or export the model again.") from error


def _checked_providers(providers: Sequence[str] | None, available: list[str]) -> list[str]:
    if providers is None:
        return ["CPUExecutionProvider"]
    if not isinstance(providers, (list, tuple)) or not providers or any(name not in available for name in providers):
        raise ValueError(f"providers must be a list of some of {available}, got {providers!r}.")
    return list(providers)


def _checked_threads(threads: int | None) -> int:
    if threads is None:
        return 0  # onnxruntime's choice
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be a whole number from 1 on, or None, got {threads!r}.")
    return threads


def _check_names(stage: Stage, session: Any, folder: Path) -> None:
    found = [each.name for each in session.get_inputs()], [each.name for each in session.get_outputs()]
    if found != (stage.inputs, stage.outputs):
        raise OSError(
            f"{folder / stage.file} does not fit stages.json: it has inputs and outputs {found}, not "
            f"{(stage.inputs, stage.outputs)}. Copy or export the model again."
        )
