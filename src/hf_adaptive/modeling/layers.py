"""Running a backbone's layers with something to do at the exits, without touching the backbone's code.

The backbone's `nn.ModuleList` of layers is replaced by a `LayerList`, which holds the same modules under the same
names. While a `LayerRun` is active it hands out thin stand-ins that count the layers run and call back where an exit
sits; otherwise it behaves as any `nn.ModuleList`. A run may be paused by an exception at an exit and resumed later
with fewer rows: the backbone is then called with the inputs of the rows that stay, so masks, position biases and
rotary tables come from the backbone's own code, and the layers already run are skipped. Nothing has to be guessed
about which argument of a layer belongs to a row.
"""

import threading
from collections.abc import Callable, Iterator
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
        depth (`int`): Layers run so far.
        hidden (`torch.Tensor` of shape `(rows, length, hidden)`): Output of the last of them.
        output_length (`int`, *optional*): Length of the tuple that the layers return; None if they return a tensor.
    """

    depth: int = 0
    hidden: torch.Tensor | None = None
    output_length: int | None = None


class LayerRun:
    """One pass through the layers of one backbone.

    Args:
        layers (`LayerList`): The layers.
        boundaries (`tuple[int, ...]`): Depths (layers run) at which `at_boundary` is called, before the next layer.
        at_boundary (`Callable[[int, torch.Tensor], torch.Tensor]`): Gets the depth and the hidden state there, returns
            the hidden state to go on with, or raises `Pause`.
        shared_gradient (`Callable[[int, torch.Tensor], torch.Tensor]`): Applied to every other tensor that a layer is
            given, with the layer's depth: the way by which parameters shared between layers would learn.
        may_learn_again (`Callable[[int, int], bool]`): Whether a module that was first run at one depth may learn at a
            later one; asked where layers share a module (ALBERT).
        progress (`Progress`, *optional*): Where to resume.
        stop (`int`, *optional*): Depth from which on no layer is run; None to run all of them.
    """

    def __init__(
        self,
        layers: "LayerList",
        boundaries: tuple[int, ...],
        at_boundary: Callable[[int, torch.Tensor], torch.Tensor],
        shared_gradient: Callable[[int, torch.Tensor], torch.Tensor] = lambda depth, tensor: tensor,
        may_learn_again: Callable[[int, int], bool] = lambda first, depth: True,
        progress: Progress | None = None,
        stop: int | None = None,
    ):
        self.layers = layers
        self.boundaries = frozenset(depth for depth in boundaries if stop is None or depth <= stop)
        self.stop = stop
        self.at_boundary = at_boundary
        self.shared_gradient = shared_gradient
        self.may_learn_again = may_learn_again
        self._first_depths: dict[nn.Module, int] = {}
        self.resumed = progress or Progress()
        self.progress = Progress(output_length=self.resumed.output_length)

    def __enter__(self) -> "LayerRun":
        self._outer, _ACTIVE.run = _ACTIVE.run, self
        return self

    def __exit__(self, *exception: object) -> None:
        _ACTIVE.run = self._outer

    def call(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs, or skips, the next layer."""
        depth = self.progress.depth
        first = self._first_depths.setdefault(layer, depth)
        hidden = args[0] if args else kwargs["hidden_states"]
        if depth < self.resumed.depth:
            return self._skipped(hidden)
        if self.resumed.hidden is not None and depth == self.resumed.depth:
            hidden = self.resumed.hidden
        elif depth in self.boundaries:
            self.progress.hidden = hidden
            hidden = self.at_boundary(depth, hidden)
        if self._is_over(depth):
            return self._skipped(hidden)
        args, kwargs = self._with_hidden(hidden, args, kwargs, depth)
        learns = torch.is_grad_enabled() and (first == depth or self.may_learn_again(first, depth))
        with torch.set_grad_enabled(learns):
            output = layer(*args, **kwargs)
        self.progress.depth += 1
        self.progress.output_length = len(output) if isinstance(output, tuple) else None
        return output

    def _is_over(self, depth: int) -> bool:
        """Whether the rest is not run.

        An exception would leave an exporter with half of the backbone's modules on its stack: it is given a rest that
        does nothing, and drops what nobody reads.
        """
        if self.stop is None or depth < self.stop:
            return False
        if not is_tracing():
            raise Pause
        return depth > 0  # after the first layer it is known what layers return

    def _skipped(self, hidden: torch.Tensor) -> Any:
        """Hands on what a layer was given, in the form of its output."""
        self.progress.depth += 1
        length = self.progress.output_length
        return hidden if length is None else (hidden, *[None] * (length - 1))

    def _with_hidden(
        self, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], depth: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            args = (hidden, *(self._with_shared_gradient(depth, value) for value in args[1:]))
            return args, {name: self._with_shared_gradient(depth, value) for name, value in kwargs.items()}
        rest = {name: self._with_shared_gradient(depth, value) for name, value in kwargs.items()}
        return (), {**rest, "hidden_states": hidden}

    def _with_shared_gradient(self, depth: int, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.shared_gradient(depth, value) if value.requires_grad else value
        if isinstance(value, tuple):
            return tuple(self._with_shared_gradient(depth, item) for item in value)
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
