"""What a backbone is given, one row an example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.import_utils import is_tracing

# Inputs that are looked up in a table, and the configuration's field with its size.
_TABLES = {"input_ids": "vocab_size", "token_type_ids": "type_vocab_size"}


@dataclass
class BackboneInputs:
    """The tensors that a backbone is called with.

    Args:
        tensors (`dict[str, torch.Tensor]`): Batch first.
        mask (`torch.Tensor` of shape `(rows, length)`, *optional*): 1 at tokens that heads take for real; None if
            all are real.
    """

    tensors: dict[str, torch.Tensor]
    mask: torch.Tensor | None

    @property
    def rows(self) -> int:
        """Number of examples."""
        return next(iter(self.tensors.values())).shape[0]

    @property
    def length(self) -> int:
        """Number of positions, padding included."""
        return next(iter(self.tensors.values())).shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors.values())).device

    @property
    def can_be_trimmed(self) -> bool:
        """Whether the backbone is told of the padding, so that none is attended to, by one entry a position."""
        attention_mask = self.tensors.get("attention_mask")
        return attention_mask is not None and attention_mask.dim() == 2

    def select(self, rows: torch.Tensor) -> "BackboneInputs":
        """The inputs of some rows."""
        mask = None if self.mask is None else self.mask.index_select(0, rows)
        return BackboneInputs({name: tensor.index_select(0, rows) for name, tensor in self.tensors.items()}, mask)

    def columns(self, start: int, stop: int) -> "BackboneInputs":
        """The inputs at some positions."""
        mask = None if self.mask is None else self.mask[:, start:stop]
        return BackboneInputs({name: tensor[:, start:stop] for name, tensor in self.tensors.items()}, mask)

    def spans(self) -> torch.Tensor:
        """First real position, and one past the last, of every row: `torch.LongTensor` of shape `(2, rows)`."""
        if self.mask is None or not self.can_be_trimmed:
            whole = torch.tensor([[0], [self.length]], device=self.device)
            return whole.expand(2, self.rows)
        # Not the heads' mask: where there is none, they take for padding what the backbone attends to.
        real = (self.tensors["attention_mask"] != 0).long()
        first = real.argmax(dim=1)
        stop = self.length - real.flip(dims=(1,)).argmax(dim=1)
        return torch.stack((first, stop))


def positions_of_real_tokens(mask: torch.Tensor) -> torch.Tensor:
    """Positions counted from each row's first real token on.

    Args:
        mask (`torch.Tensor` of shape `(rows, length)`): 1 at real tokens.

    Returns:
        `torch.LongTensor` of shape `(rows, length)`: 0 for padding on the left; padding on the right is counted on, as
        backbones do.
    """
    first = (mask != 0).long().argmax(dim=1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - first).clamp(min=0)


def checked_tensors(named: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """The inputs that are there, as one row an example.

    Args:
        named (`Mapping[str, torch.Tensor | None]`): `input_ids` or `inputs_embeds`, and the others.

    Raises:
        ValueError: No tensors, an empty batch, or tensors that do not go together.
    """
    tensors = {name: _checked_tensor(name, value) for name, value in named.items() if value is not None}
    main = "input_ids" if "input_ids" in tensors else "inputs_embeds"
    if main not in tensors or {"input_ids", "inputs_embeds"} <= tensors.keys():
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds.")
    dimensions = 2 if main == "input_ids" else 3
    if tensors[main].dim() != dimensions:
        shape = "(batch, length)" if main == "input_ids" else "(batch, length, hidden)"
        raise ValueError(f"{main} must have the shape {shape}, got {tuple(tensors[main].shape)}.")
    rows, length = tensors[main].shape[:2]
    if 0 in (rows, length):
        raise ValueError(f"the batch is empty: shape ({rows}, {length}). Give at least one row and one token.")
    for name in ("attention_mask", "token_type_ids", "position_ids"):
        if name in tensors:
            tensors[name] = _of_every_row(name, tensors[name], rows, length)
    return tensors


def _checked_tensor(name: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{name} must be a torch.Tensor, got a {type(value).__name__}. Make one with torch.tensor(...); a "
            "tokenizer gives them with return_tensors='pt'. For lists use predict."
        )
    is_whole = value.dtype in (torch.int32, torch.int64)
    if not is_whole and name not in ("inputs_embeds", "attention_mask"):
        raise ValueError(f"{name} must be of type torch.int64, got {value.dtype}. Cast it with .long().")
    return value


def _of_every_row(name: str, tensor: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    if name == "attention_mask" and tensor.dim() in (3, 4):
        return tensor  # who attends to whom
    if name == "position_ids" and tensor.shape in ((length,), (1, length)):
        return tensor.expand(rows, length)
    if tensor.shape != (rows, length):
        raise ValueError(
            f"{name} must have the shape ({rows}, {length}) of the other inputs, got {tuple(tensor.shape)}."
        )
    return tensor


def raise_misfit(inputs: BackboneInputs, config: Any, error: Exception) -> None:
    """Raises `ValueError` for an input that a backbone has no place for, after it failed.

    Looking first would cost every batch time, and on a GPU wait for it.
    """
    if is_tracing() or isinstance(error, torch.OutOfMemoryError):
        return
    longest = getattr(config, "max_position_embeddings", None)
    limits = input_limits([config]) | ({} if longest is None else {"position_ids": longest})
    for name, limit in limits.items():
        values = inputs.tensors.get(name)
        if values is not None and bool(((values < 0) | (values >= limit)).any()):
            raise ValueError(
                f"{name} must lie between 0 and {limit - 1}, of which the model has tables, got values from "
                f"{int(values.min())} to {int(values.max())}. Were they made by this model's tokenizer?"
            ) from error
    if longest is not None and (inputs.length > longest or isinstance(error, IndexError)):
        raise ValueError(
            f"input_ids of {inputs.length} tokens need more positions than the model has "
            f"(config.max_position_embeddings={longest}). Tokenise with truncation=True."
        ) from error
    unusual = {name: tuple(tensor.shape) for name, tensor in inputs.tensors.items() if tensor.dim() > 2}
    if unusual:
        raise ValueError(f"the model has no use for {unusual}: {error}.") from error


def input_limits(configs: Sequence[Any]) -> dict[str, int]:
    """How many values there are for each input that all of these backbones look up in a table."""
    sizes = {name: [getattr(config, field, None) or 0 for config in configs] for name, field in _TABLES.items()}
    # 0: a backbone without segments.
    return {name: min(filter(None, counts)) for name, counts in sizes.items() if any(counts)}
