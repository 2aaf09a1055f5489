"""Running a backbone's layers with something to do at the exits, without touching the backbone's code.

The backbone's `nn.ModuleList` of layers is replaced by a `LayerList`, which holds the same modules under the same
names. While a `LayerRun` is active it hands out thin stand-ins that count the layers run and call back where an exit
sits; otherwise it behaves as any `nn.ModuleList`. A run may be paused by an exception at an exit and resumed later
with fewer rows: the backbone is then called with the inputs of the rows that stay, so masks, position biases and
rotary tables come from the backbone's own code, and the layers already run are skipped. Nothing has to be guessed
about which argument of a layer belongs to a row.

An exit may have a branch: layers of its own between the trunk (the backbone's layers) and its head. A branch's layer
is called where the trunk's layer of the same depth is about to be, with the same arguments, so that an architecture's
windows, biases and rotary tables are right without being known here. (What a backbone does between two layers, such as
the convolution of the largest DeBERTa-v2, is the trunk's alone.)
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers.utils.import_utils import is_tracing


class _Active(threading.local):
    """The run of each thread. No `ContextVar`: a compiler cannot follow that."""

    run: "LayerRun | None" = None


_ACTIVE = _Active()


class Pause(Exception):  # noqa: N818 (no error)
    """Raised by an exit's callback to leave the backbone before the next layer."""


@dataclass
class Progress:
    """How far a run has come.

    Args:
        depth (`int`): Of the exit that was passed last, in layers.
        hidden (`torch.Tensor` of shape `(rows, length, hidden)`): Where the trunk goes on from: the state after so
            many layers, or as many fewer as that exit has in its branch.
        output_length (`int`, *optional*): Length of the tuple that the layers return; None if they return a tensor.
    """

    depth: int = 0
    hidden: torch.Tensor | None = None
    output_length: int | None = None


class LayerRun:
    """One pass through the layers of one backbone.

    Args:
        layers (`LayerList`): The layers.
        branches (`Mapping[int, Sequence[nn.Module]]`): By the depth of each exit before the last, ascending: its
            branch, empty where it reads the trunk. Of the layers between it and the exit before, it covers the last.
        at_exit (`Callable[[int, torch.Tensor], torch.Tensor]`): Gets an exit's depth and the hidden state there;
            returns the hidden state that the trunk goes on with (not asked of exits beside the trunk), or raises
            `Pause`.
        to_exit (`Callable[[torch.Tensor], torch.Tensor]`): Applied to what an exit beside the trunk (one with a
            branch, or on the embeddings) takes from it: its hidden state, and tensors that layers share.
        shared_gradient (`Callable[[int, torch.Tensor], torch.Tensor]`): Applied to every other tensor that a layer of
            the trunk is given, with the layer's depth: the way by which parameters shared between layers would learn.
        may_learn_again (`Callable[[int, int], bool]`): Whether a module that was first run at one depth may learn at a
            later one; asked where layers share a module (ALBERT).
        progress (`Progress`, *optional*): Where to resume.
        stop (`int`, *optional*): Depth of an exit after which nothing is run; None to run all layers.
        trunk_waits (`bool`): Whether a branch of several layers is run before the trunk's layers beside it, which may
            not be needed: after its exit the run is then paused.
    """

    def __init__(
        self,
        layers: "LayerList",
        branches: Mapping[int, Sequence[nn.Module]],
        at_exit: Callable[[int, torch.Tensor], torch.Tensor],
        to_exit: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
        shared_gradient: Callable[[int, torch.Tensor], torch.Tensor] = lambda depth, tensor: tensor,
        may_learn_again: Callable[[int, int], bool] = lambda first, depth: True,
        progress: Progress | None = None,
        stop: int | None = None,
        trunk_waits: bool = False,
    ):
        self.layers = layers
        self.branches = {depth: branch for depth, branch in branches.items() if stop is None or depth <= stop}
        self.at_exit = at_exit
        self.to_exit = to_exit
        self.stop = stop
        self.shared_gradient = shared_gradient
        self.may_learn_again = may_learn_again
        self.trunk_waits = trunk_waits
        self._first_depths: dict[nn.Module, int] = {}
        self._depth = 0
        self._beside: torch.Tensor | None = None
        self._has_stopped = False
        self._knows_length = False
        self.resumed = progress or Progress()
        self.progress = Progress(output_length=self.resumed.output_length)

    def __enter__(self) -> "LayerRun":
        self._outer, _ACTIVE.run = _ACTIVE.run, self
        return self

    def __exit__(self, *exception: object) -> None:
        _ACTIVE.run = self._outer

    def call(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs, or skips, the next layer; before it, what of the exits is due."""
        depth = self._depth
        self._depth += 1
        self._first_depths.setdefault(layer, depth)
        hidden = args[0] if args else kwargs["hidden_states"]
        resumed = self._start_of(self.resumed.depth)
        if depth < resumed:
            return self._skipped(hidden)
        if self.resumed.hidden is not None and depth == resumed:
            hidden = self.resumed.hidden
        branch_goes_on = False
        for exit_depth, position in self._due(depth):
            if self._is_beside(exit_depth):
                branch_goes_on = self._run_beside(exit_depth, position, hidden, args, kwargs)
            else:
                self.progress.hidden = hidden
                hidden = self._reach(exit_depth, hidden)
        if (branch_goes_on and self.trunk_waits) or self._is_over():
            return self._skipped(hidden)
        return self._run_trunk(layer, depth, hidden, args, kwargs)

    def _start_of(self, exit_depth: int) -> int:
        """Layers of the trunk that an exit needs."""
        return exit_depth - len(self.branches.get(exit_depth, ()))

    def _is_beside(self, exit_depth: int) -> bool:
        return exit_depth == 0 or len(self.branches[exit_depth]) > 0

    def _due(self, depth: int) -> Iterator[tuple[int, int]]:
        """Exits that need something before the trunk's layer at this depth, and how much of their branch was run."""
        for exit_depth, branch in self.branches.items():
            is_passed = self.resumed.hidden is not None and exit_depth <= self.resumed.depth
            position = depth - self._start_of(exit_depth)
            if not is_passed and 0 <= position < max(1, len(branch)):
                yield exit_depth, position

    def _run_beside(
        self, exit_depth: int, position: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Runs one layer of a branch, and the exit after its last; whether the branch goes on."""
        branch = self.branches[exit_depth]
        if position == 0:
            self.progress.hidden = hidden
            self._beside = self.to_exit(hidden)
        state = cast(torch.Tensor, self._beside)
        if branch:
            args, kwargs = _with_hidden(state, args, kwargs, self.to_exit)
            output = branch[position](*args, **kwargs)
            self._note_length(output)
            state = output[0] if isinstance(output, tuple) else output
        if position + 1 < len(branch):
            self._beside = state
            return True
        self._beside = None
        self._reach(exit_depth, state)
        if position > 0 and self.trunk_waits and not self._has_stopped:
            raise Pause
        return False

    def _reach(self, exit_depth: int, hidden: torch.Tensor) -> torch.Tensor:
        self.progress.depth = exit_depth
        self._has_stopped = exit_depth == self.stop
        return self.at_exit(exit_depth, hidden)

    def _run_trunk(
        self, layer: nn.Module, depth: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        first = self._first_depths[layer]
        args, kwargs = _with_hidden(hidden, args, kwargs, lambda tensor: self.shared_gradient(depth, tensor))
        learns = torch.is_grad_enabled() and (first == depth or self.may_learn_again(first, depth))
        with torch.set_grad_enabled(learns):
            output = layer(*args, **kwargs)
        self._note_length(output)
        return output

    def _note_length(self, output: Any) -> None:
        self.progress.output_length = len(output) if isinstance(output, tuple) else None
        self._knows_length = True

    def _is_over(self) -> bool:
        """Whether the rest is not run.

        An exception would leave an exporter with half of the backbone's modules on its stack: it is given a rest that
        does nothing, and drops what nobody reads.
        """
        if not self._has_stopped:
            return False
        if not is_tracing():
            raise Pause
        return self._knows_length  # what layers return: the first is run for it

    def _skipped(self, hidden: torch.Tensor) -> Any:
        """Hands on what a layer was given, in the form of its output."""
        length = self.progress.output_length
        return hidden if length is None else (hidden, *[None] * (length - 1))


def _with_hidden(
    hidden: torch.Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    pass_on: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with this hidden state; what learns among the others is passed on."""
    rest = {name: _passed_on(value, pass_on) for name, value in kwargs.items()}
    if args:
        return (hidden, *(_passed_on(value, pass_on) for value in args[1:])), rest
    return (), {**rest, "hidden_states": hidden}


def _passed_on(value: Any, pass_on: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return pass_on(value) if value.requires_grad else value
    if isinstance(value, tuple):
        return tuple(_passed_on(item, pass_on) for item in value)
    return value


class _CountedLayer:
    """Stands for a layer while a run is active."""

    def __init__(self, run: LayerRun, layer: nn.Module):
        self._run = run
        self._layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run.call(self._layer, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class LayerList(nn.ModuleList):
    """A backbone's layers; the same modules under the same names as the `nn.ModuleList` that it replaces."""

    def _active_run(self) -> LayerRun | None:
        run = _ACTIVE.run
        return run if run is not None and run.layers is self else None

    def __iter__(self) -> Iterator[Any]:
        run = self._active_run()
        return super().__iter__() if run is None else (_CountedLayer(run, layer) for layer in super().__iter__())

    def __getitem__(self, index: int | slice) -> Any:
        run = self._active_run()
        if run is None:
            return super().__getitem__(index)
        if isinstance(index, slice):
            return [_CountedLayer(run, layer) for layer in list(self._modules.values())[index]]
        return _CountedLayer(run, super().__getitem__(index))


def install_layer_list(backbone: nn.Module, path: str) -> LayerList:
    """Replaces the `nn.ModuleList` at `path` of `backbone` by a `LayerList` of the same modules."""
    parent_path, _, name = path.rpartition(".")
    parent = backbone.get_submodule(parent_path)
    layers = LayerList(cast(nn.ModuleList, backbone.get_submodule(path)))
    setattr(parent, name, layers)
    return layers
