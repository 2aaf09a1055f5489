"""Whether exits pull a layer in different directions: the paper's explanation of what joint training loses
(Rotem et al., ACL 2023, arXiv 2306.02307, section 3)."""

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling.checks import shortened
from ..modeling.exits import ExitsMixin
from ..modeling.labels import read_labels
from ..modeling.losses import answer_loss
from .unwrapping import without_adapter


@dataclass(frozen=True, eq=False)
class GradientConflict:
    """The gradients that the exits send into each layer.

    Args:
        exit_layers (`list[int]`): Layers run before each exit.
        similarity (`torch.Tensor` of shape `(layers, exits, exits)`): Cosine between the gradients of two exits in the
            parameters of a layer, from -1 (opposed) to 1; NaN where one of the two does not reach the layer, which
            under SWEET is every pair.
        norms (`torch.Tensor` of shape `(layers, exits)`): Their lengths; 0 where none reaches the layer.
    """

    exit_layers: list[int]
    similarity: torch.Tensor
    norms: torch.Tensor

    @property
    def mean_similarity(self) -> torch.Tensor:
        """Mean over the pairs of exits that both reach a layer, of shape `(layers,)`; NaN where there is none."""
        exits = self.similarity.shape[-1]
        pairs = list(itertools.combinations(range(exits), 2))
        if not pairs:
            return torch.full(self.similarity.shape[:1], math.nan, dtype=self.similarity.dtype)
        return torch.stack([self.similarity[:, first, second] for first, second in pairs], dim=1).nanmean(dim=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file; None for NaN, which JSON does not have."""
        return {
            "exit_layers": list(self.exit_layers),
            "similarity": _without_nan(self.similarity.tolist()),
            "norms": self.norms.tolist(),
            "mean_similarity": _without_nan(self.mean_similarity.tolist()),
        }


def gradient_conflict(model: Any, batch: Mapping[str, torch.Tensor]) -> GradientConflict:
    """Compares the gradients of the exits' losses, layer by layer, as `exit_routing` lets them through.

    The losses are those of training (with `exit_loss_weights`), but nothing is dropped out. The model's mode, its
    gradients and the state of the random generators stay as they are.

    Args:
        model: A classifier with exits.
        batch (`Mapping[str, torch.Tensor]`): What the model is called with, with `labels`.

    Returns:
        `GradientConflict`: On the CPU, float64. Layers that are one shared module (ALBERT) count as one.

    Raises:
        ValueError: A model without exits (the members of a cascade share no layers), no labels, or bad ones.
    """
    model = without_adapter(model)
    _check(model, batch)
    with torch.enable_grad(), _training_without_dropout(model):
        gradients = [_layer_gradients(model, loss) for loss in _losses(model, batch)]
    by_layer = [torch.stack(of_exits) for of_exits in zip(*gradients)]
    # Dot products of every pair; the diagonal holds the squared norms.
    products = torch.stack([of_exits @ of_exits.T for of_exits in by_layer]).cpu()
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    return GradientConflict(
        exit_layers=list(model.config.exit_layers),
        # 0/0 is NaN: no gradient has no direction.
        similarity=products / (norms.unsqueeze(2) * norms.unsqueeze(1)),
        norms=norms,
    )


def _check(model: Any, batch: Mapping[str, torch.Tensor]) -> None:
    if not isinstance(model, ExitsMixin):
        raise ValueError(
            f"gradient_conflict needs a classifier with exits, got a {type(model).__name__}: exits that share layers "
            "are compared."
        )
    check_batch(batch)


def check_batch(batch: Any) -> None:
    """Raises `ValueError` unless a mapping of tensors with labels."""
    if not isinstance(batch, Mapping) or not all(isinstance(value, torch.Tensor) for value in batch.values()):
        raise ValueError(f"batch must be a mapping from names to tensors, got {shortened(batch)}.")
    if "labels" not in batch:
        raise ValueError(f"the batch has no labels: expected 'labels' among its keys, got {sorted(batch)}.")


def _losses(model: Any, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The weighted loss of every exit, with its graph."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = inputs.pop("labels")
    labels = read_labels(labels, len(labels), model.config)
    exit_logits = model(**inputs).exit_logits
    weights = model.config.exit_loss_weights or [1.0] * len(model.config.exit_layers)
    return [
        weight * answer_loss(logits, labels, model.config)
        for weight, logits in zip(weights, exit_logits.unbind(dim=1))
    ]


@contextmanager
def _training_without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """The model itself computes every exit, as in training; its parts are in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    were_untrained = model._exits_are_untrained
    try:
        model.eval()
        model.training = True
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        model._exits_are_untrained = were_untrained


def _layer_gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    """The gradient of a loss in each layer, as one vector a layer; zeros where it does not reach."""
    layers = [list(layer.parameters()) for layer in model._layers]
    learning = [parameter for layer in layers for parameter in layer if parameter.requires_grad]
    found = torch.autograd.grad(loss, learning, retain_graph=True, allow_unused=True) if learning else ()
    gradients = {id(parameter): gradient for parameter, gradient in zip(learning, found) if gradient is not None}
    return [
        torch.cat([gradients.get(id(p), torch.zeros_like(p)).flatten().double() for p in layer]) for layer in layers
    ]


def _without_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if math.isnan(values) else values
