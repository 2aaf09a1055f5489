"""What a backbone is given, one row an example."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Inputs that are looked up in a table, and the configuration's field with its size.
_TABLES = {"input_ids": "vocab_size", "token_type_ids": "type_vocab_size"}


@dataclass
class BackboneInputs:
    """The tensors that a backbone is called with.

    Args:
        tensors (`dict[str, torch.Tensor]`): Batch first.
        mask (`torch.Tensor` of shape `(rows, length)`, *optional*): 1 at real tokens; None if all are real.
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

    def select(self, rows: torch.Tensor | slice) -> "BackboneInputs":
        """The inputs of some rows."""
        mask = None if self.mask is None else self.mask[rows]
        return BackboneInputs({name: tensor[rows] for name, tensor in self.tensors.items()}, mask)

    def columns(self, start: int, stop: int) -> "BackboneInputs":
        """The inputs at some positions."""
        mask = None if self.mask is None else self.mask[:, start:stop]
        return BackboneInputs({name: tensor[:, start:stop] for name, tensor in self.tensors.items()}, mask)

    def spans(self) -> torch.Tensor:
        """First real position, and one past the last, of every row: `torch.LongTensor` of shape `(2, rows)`."""
        if self.mask is None or not self.can_be_trimmed:
            whole = torch.tensor([[0], [self.length]], device=self.device)
            return whole.expand(2, self.rows)
        real = (self.mask != 0).long()
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


def input_limits(configs: Sequence[Any]) -> dict[str, int]:
    """How many values there are for each input that all of these backbones look up in a table."""
    sizes = {name: [getattr(config, field, None) or 0 for config in configs] for name, field in _TABLES.items()}
    # 0: a backbone without segments.
    return {name: min(filter(None, counts)) for name, counts in sizes.items() if any(counts)}
