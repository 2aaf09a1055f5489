"""One exit as an ordinary model: the architecture's stock classifier of fewer layers, without code of this package."""

import copy
from typing import Any

import torch

from .bases import ModelBase


class GivesStockClassifiers(ModelBase):
    """`to_stock` for a classifier with exits."""

    @torch.no_grad()
    def to_stock(self, exit_at: int) -> Any:
        """A plain `…ForSequenceClassification` of the layers up to one exit, which answers as that exit does.

        It has weights of its own and no code but that of transformers: it is saved, exported, quantised and served as
        any stock model. The exit's temperature is part of its last linear layer. Stock classifiers that take the first
        token take the first *position*: give them rows padded on the right. An exit's branch takes the place of
        the trunk's layers beside it.

        Args:
            exit_at (`int`): The exit after this layer, one of `exit_layers`.

        Returns:
            `PreTrainedModel`: In evaluation mode, on the device and in the type of this model.

        Raises:
            ValueError: No exit there; an `exit_pooling` that the stock class does not have (the message names those
                that it has), or constant heads, layers or a head that no stock class has; an exit on the embeddings.
        """
        index = self._exit_index(exit_at)
        self._check_stock_counterpart(index)
        config = config_of_first_layers(self.config.to_plain(), exit_at)
        poolings = self.architecture.classifier_poolings
        if poolings:
            config.classifier_pooling = poolings[self.config.exit_pooling]
        if exit_at == len(self.exits[index].branch) and "conv_kernel_size" in config.to_dict():
            config.conv_kernel_size = 0  # DeBERTa-v2's convolution belongs to the trunk
        if self.architecture.shares_layers:
            config.num_hidden_groups = _groups_of_first_layers(self.config, exit_at)
        stock = self.architecture.stock("ForSequenceClassification")._from_config(config, dtype=self.dtype)
        in_one_type(stock, self.dtype)
        stock.load_state_dict(self._stock_weights(index, stock.state_dict().keys()))
        divide_by_temperature(stock.get_submodule(self.architecture.head.classifier), self.config, index)
        return stock.to(self.device).eval()

    def _check_stock_counterpart(self, index: int) -> None:
        """Raises `ValueError` where no stock class computes what an exit does."""
        own, pooling = self.architecture, self.config.exit_pooling
        if self.config.exit_layers[index] == 0:
            raise ValueError("the exit on the embeddings has no stock counterpart: there is no layer before it.")
        if own.shares_layers and len(self.exits[index].branch):
            raise ValueError(
                f"an exit of {own.name} with a branch has no stock counterpart: there, all layers are one module. Use "
                "the last exit."
            )
        if own.head.classifier is None:
            raise ValueError(
                f"{own.name} has no stock classifier that an exit could become. Use exit_at in forward or predict."
            )
        if self.config.constant_heads:
            raise ValueError(
                f"constant_heads={self.config.constant_heads} have no stock counterpart: no class of transformers has "
                "constant attention. Only a model without them can become a stock classifier."
            )
        allowed = tuple(own.classifier_poolings) or (own.default_pooling(self.config),)
        if pooling not in allowed:
            raise ValueError(
                f"exit_pooling={pooling!r} has no counterpart in {own.name}ForSequenceClassification, whose head sees "
                f"{' or '.join(map(repr, allowed))}. Train the exits with exit_pooling={allowed[0]!r} to get a stock "
                "model of one of them."
            )

    def _stock_weights(self, index: int, names: Any) -> dict[str, torch.Tensor]:
        """This model's weights under the names of the stock classifier that one exit becomes."""
        sources = dict(self.architecture.head.sources)
        if self.architecture.final_norm is not None:
            # The last exit has none of its own: the backbone's is left in place.
            sources["final_norm"] = f"{self.base_model_prefix}.{self.architecture.final_norm}"
        own = self.state_dict()
        head = {
            f"{source}.{name}": own[f"exits.{index}.{part}.{name}"]
            for part, source in sources.items()
            if getattr(self.exits[index], part) is not None
            for name in getattr(self.exits[index], part).state_dict()
        }
        return {name: head[name] if name in head else own[self._own_name(index, name)] for name in names}

    def _own_name(self, index: int, name: str) -> str:
        """The name here of a stock backbone's weight, which may be one of the exit's branch."""
        prefix = f"{self.base_model_prefix}.{self.architecture.layers}."
        if not name.startswith(prefix):
            return name
        layer, _, rest = name.removeprefix(prefix).partition(".")
        position = int(layer) - (self.config.exit_layers[index] - len(self.exits[index].branch))
        return name if position < 0 else f"exits.{index}.branch.{position}.{rest}"


def config_of_first_layers(config: Any, depth: int) -> Any:
    """A copy of a stock configuration that asks for so many layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:depth]
    return config


def divide_by_temperature(classifier: Any, config: Any, index: int) -> None:
    """Makes an exit's temperature part of its last linear layer."""
    if config.exit_temperatures is not None:
        for parameter in classifier.parameters():
            parameter.data /= config.exit_temperatures[index]


def in_one_type(model: Any, dtype: torch.dtype) -> Any:
    """Some of DeBERTa's weights are made as float32, whatever the type of the model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _groups_of_first_layers(config: Any, depth: int) -> int:
    """How many of ALBERT's groups the first layers use; a smaller model has to use them at the same places."""
    used = _groups(config.num_hidden_layers, config.num_hidden_groups)[:depth]
    count = max(used) + 1
    if _groups(depth, count) != used:
        raise ValueError(
            f"the first {depth} of {config.num_hidden_layers} layers with num_hidden_groups="
            f"{config.num_hidden_groups} have no stock counterpart: a smaller model would use the groups at other "
            "places. Use the last exit, or one at the end of a group."
        )
    return count


def _groups(layers: int, groups: int) -> list[int]:
    # As AlbertTransformer.forward does.
    return [int(layer / (layers / groups)) for layer in range(layers)]
