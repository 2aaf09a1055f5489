"""A model without exits on the same examples, for comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..modeling.examples import read_examples
from ..modeling.inputs import input_limits


@torch.inference_mode()
def plain_logits(model: Any, examples: Sequence[Mapping[str, Any]], batch_size: int) -> torch.Tensor:
    """Scores of a stock `…ForSequenceClassification`, in batches of similar length as in `predict`.

    Args:
        model: The stock model, in evaluation mode.
        examples (`Sequence[Mapping]`): Tokenised examples, as for `predict`.
        batch_size (`int`): Examples run at a time.

    Returns:
        `torch.Tensor` of shape `(examples, labels)`: On the CPU, in the order of the examples.

    Raises:
        ValueError: A model in training mode, or examples that cannot be read.
    """
    if model.training:
        raise ValueError("the plain model is in training mode: call plain.eval() first.")
    rows = read_examples(examples, input_limits([model.config]))
    order = torch.from_numpy(rows.lengths).argsort(descending=True, stable=True)
    padding = {**dict.fromkeys(rows.names, 0), "input_ids": model.config.pad_token_id or 0}
    found = []
    for numbers in order.split(batch_size):
        batch = {name: rows.batch(name, numbers.numpy(), padding[name]) for name in rows.names}
        tensors = {name: torch.from_numpy(values).to(model.device) for name, values in batch.items()}
        found.append(model(**tensors).logits.float().cpu())
    return torch.cat(found)[order.argsort()]
