"""The members of a cascade: stock classifiers, how they are made, called and checked."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedConfig, PreTrainedModel

from .architectures import ARCHITECTURES, Architecture
from .checks import is_whole_number, shortened
from .configuration import check_exit_layers
from .inputs import BackboneInputs, positions_of_real_tokens
from .stock_exit import config_of_first_layers, in_one_type


def new_member(config: PreTrainedConfig, attention: str | None) -> PreTrainedModel:
    """A classifier with new weights, and with this implementation of attention."""
    config._attn_implementation = attention
    model_class: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    return in_one_type(model_class(config), torch.get_default_dtype())


def first_layers(stock: PreTrainedModel, depth: int, new: set[str]) -> PreTrainedModel:
    """A model of the first layers of another, with its trained weights; the weights named in `new` start anew."""
    member = type(stock)._from_config(config_of_first_layers(stock.config, depth), dtype=stock.dtype)
    # Layers are numbered from the first on, so that those of the smaller model have the same names in both.
    names = member.state_dict().keys()
    weights = {name: tensor for name, tensor in stock.state_dict().items() if name in names and name not in new}
    member.load_state_dict(weights, strict=False)
    return in_one_type(member, stock.dtype)


def member_arguments(member: PreTrainedModel, inputs: BackboneInputs) -> dict[str, Any]:
    """What a member is called with."""
    # A tokenizer made for BERT gives segments, which DistilBERT does not have.
    known = inspect.signature(type(member).forward).parameters
    arguments: dict[str, Any] = {name: tensor for name, tensor in inputs.tensors.items() if name in known}
    architecture = ARCHITECTURES.get(member.config.model_type)
    if architecture is None:
        return arguments
    if architecture.positions_from_mask and "position_ids" not in arguments and inputs.can_be_trimmed:
        arguments["position_ids"] = positions_of_real_tokens(inputs.tensors["attention_mask"])
    return {**arguments, **architecture.forward_arguments}


class MemberEmbeddings:
    """Several tables of embeddings that are treated as one.

    Args:
        tables (`list[nn.Module]`): Those of a cascade's members; what is read is read from the first.
    """

    def __init__(self, tables: list[nn.Module]):
        object.__setattr__(self, "tables", tables)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tables[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        for table in self.tables:
            setattr(table, name, value)

    def __delattr__(self, name: str) -> None:
        for table in self.tables:
            delattr(table, name)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> "HookHandles":
        """As `nn.Module.register_forward_hook`, on every table."""
        return HookHandles([table.register_forward_hook(*args, **kwargs) for table in self.tables])


@dataclass
class HookHandles:
    """What removes several hooks at once."""

    handles: list[Any]

    def remove(self) -> None:
        """Removes all of them."""
        for handle in self.handles:
            handle.remove()


def as_list(name: str, values: Any) -> list[Any]:
    """The values of a list, a `ModuleList`, …; a `ValueError` for what is none."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"{name} of a cascade must be a list, got {shortened(values)}.")
    return list(values)


def check_depths(depths: list[int], config: PreTrainedConfig, architecture: Architecture) -> None:
    """A `ValueError` for depths that cannot be taken from a model."""
    num_layers = config.num_hidden_layers
    # The last member may be smaller than the model.
    is_smaller = bool(depths) and is_whole_number(depths[-1]) and 0 < depths[-1] < num_layers
    largest = depths[-1] if is_smaller else num_layers
    try:
        check_exit_layers(depths, largest)
    except ValueError as error:
        reason = str(error).replace("exit_layers", "depths")
        raise ValueError(f"depths={depths} do not fit a model of {num_layers} layers: {reason}") from None
    if architecture.shares_layers and config.num_hidden_groups > 1 and depths[0] < num_layers:
        raise ValueError(
            f"depths={depths} cannot be taken from a model of num_hidden_groups={config.num_hidden_groups}, which are "
            "spread over all layers: a smaller model would use them elsewhere. Use one with a single group."
        )


def check_classes(models: list[PreTrainedModel]) -> None:
    """A `ValueError` for models that are no stock sequence classifiers, or of different types of numbers."""
    if not models:
        raise ValueError("a cascade needs at least one member, got none.")
    for model in models:
        # One look into the mapping: its values would import the code of every architecture.
        known: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        is_classifier = isinstance(model, PreTrainedModel) and known.get(type(model.config), None) is type(model)
        # Code of its own does not travel with the cascade, and a model with exits has costs of its own.
        if not is_classifier or type(model)._auto_class is not None:
            raise ValueError(
                f"a member of a cascade must be a stock sequence classifier, got a {type(model).__name__}. Load it "
                "with AutoModelForSequenceClassification from a plain checkpoint."
            )
        if model.dtype != models[0].dtype:
            raise ValueError(
                f"members of a cascade must have one dtype, which is that of the checkpoint, got {models[0].dtype} "
                f"and {model.dtype}. Convert them with model.to(dtype)."
            )


def check_independence(models: list[PreTrainedModel]) -> None:
    """A `ValueError` for members that share weights."""
    owners: dict[int, int] = {}
    for position, model in enumerate(models):
        for parameter in model.parameters():
            owner = owners.setdefault(id(parameter), position)
            if owner != position:
                raise ValueError(
                    f"members {owner} and {position} share weights, but members of a cascade are independent of each "
                    "other. Load or copy (copy.deepcopy) each of them."
                )
