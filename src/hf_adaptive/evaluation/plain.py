"""A model without exits on the same examples, for comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")


@torch.inference_mode()
def plain_logits(model: Any, examples: Sequence[Mapping[str, Any]], batch_size: int) -> torch.Tensor:
    """Scores of a stock `…ForSequenceClassification`, in batches of similar length as in `predict`.

    Args:
        model: The stock model, in evaluation mode.
        examples (`Sequence[Mapping]`): Tokenised examples, each with an `attention_mask`.
        batch_size (`int`): Examples run at a time.

    Returns:
        `torch.Tensor` of shape `(examples, labels)`: On the CPU, in the order of the examples.

    Raises:
        ValueError: A model in training mode.
    """
    if model.training:
        raise ValueError("the plain model is in training mode: call plain.eval() first.")
    rows = [examples[number] for number in range(len(examples))]
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]["input_ids"]))
    padding = {**dict.fromkeys(INPUT_NAMES, 0), "input_ids": model.config.pad_token_id or 0}
    names = [name for name in INPUT_NAMES if name in rows[0]]
    found = []
    for start in range(0, len(order), batch_size):
        batch = [rows[number] for number in order[start : start + batch_size]]
        tensors = {
            name: pad_sequence([torch.as_tensor(row[name]) for row in batch], True, padding[name]).to(model.device)
            for name in names
        }
        found.append(model(**tensors).logits.float().cpu())
    return torch.cat(found)[torch.tensor(order).argsort()]
