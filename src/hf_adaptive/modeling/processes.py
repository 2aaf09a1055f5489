"""One call on several processes or GPUs: each takes a share of the items, and all get every answer.

Starting the processes, choosing their devices and moving tensors between them is `accelerate`'s.
"""

import os
from typing import Any

import torch
from transformers.utils import is_accelerate_available

if is_accelerate_available():
    from accelerate import PartialState
    from accelerate.utils import gather


class Shares:
    """The split of items, the same in every process, between the processes that were started together.

    Args:
        lengths (`torch.LongTensor` of shape `(items,)`): Sizes of the items, of which there is at least one.
        device (`torch.device`): Where this process computes; decides how processes are joined that are not yet.
        is_alone (`bool`): Whether this process does everything itself.

    Raises:
        ValueError: The processes have different items.
    """

    def __init__(self, lengths: torch.Tensor, device: torch.device, is_alone: bool):
        self.count = len(lengths)
        self._state = None if is_alone else _joined_processes(device)
        if self._state is not None:
            _check_agreement(lengths, self._state.device)

    @property
    def are_all(self) -> bool:
        """Whether this process has every item."""
        return self._state is None

    def own(self) -> torch.Tensor | slice:
        """Indexes of this process's items: every n-th, so that shares of sorted items are alike.

        Returns:
            `torch.LongTensor`: Of one length in every process, for which some have an item that another one has, too;
            or the slice of all items, which takes no memory.
        """
        if self._state is None:
            return slice(None)
        processes = self._state.num_processes
        padded = -(-self.count // processes) * processes
        return torch.arange(self._state.process_index, padded, processes) % self.count

    def join(self, values: torch.Tensor) -> torch.Tensor:
        """What belongs to every item, from what belongs to the items of each process.

        Args:
            values (`torch.Tensor` of shape `(items of this process, ...)`): On any device.

        Returns:
            `torch.Tensor` of shape `(count, ...)`: On the CPU, the same in every process.
        """
        if self._state is None:
            return values.cpu()
        together = gather(values.to(self._state.device).contiguous()).cpu()
        return together.unflatten(0, (self._state.num_processes, -1)).transpose(0, 1).flatten(0, 1)[: self.count]


def _check_agreement(lengths: torch.Tensor, device: torch.device) -> None:
    places = torch.arange(1, len(lengths) + 1)
    own = torch.stack((torch.tensor(len(lengths)), lengths.sum(), (lengths * places).sum()))
    of_all = gather(own.unsqueeze(0).to(device)).cpu()
    if not (of_all == of_all[0]).all():
        raise ValueError(
            f"the {len(of_all)} processes were given different data: {of_all[:, 0].tolist()} examples of "
            f"{of_all[:, 1].tolist()} tokens. Give every process the whole data set, of which each runs its share. "
            "For data that you divided yourself, call predict(..., split_between_processes=False)."
        )


def _joined_processes(device: torch.device) -> Any:
    """The state of this process among those that `accelerate launch` or `torchrun` started; None if it is alone."""
    if not is_accelerate_available():
        return None
    is_launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    is_joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not (is_launched or is_joined):
        return None
    state = PartialState(cpu=device.type == "cpu")
    return state if state.num_processes > 1 else None
