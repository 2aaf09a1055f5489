"""The model that is calibrated, and the one whose answers it is measured against, run alike."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..modeling.checks import has_exits

_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


def run_all_exits(
    model: Any, dataset: Any, batch_size: int, show_progress: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What every exit says of every example, in torch's double precision: one pass over the data.

    Args:
        model: A classifier with exits or a cascade, in torch or exported.
        dataset: Tokenised examples.
        batch_size (`int`): Examples run at a time.
        show_progress (`bool`): Whether to show a bar.

    Returns:
        Logits `(examples, exits, labels)`, divided by the temperatures, and certainties `(examples, exits)` or None.
    """
    everything = [None] * (len(model.config.exit_layers) - 1)
    with _evaluating(model):
        outputs = model.predict(dataset, batch_size, exit_thresholds=everything, show_progress=show_progress)
    certainty = outputs.exit_certainty
    logits = torch.as_tensor(outputs.exit_logits).double()
    return logits, None if certainty is None else torch.as_tensor(certainty).double()


def check_reference(model: Any, reference: Any) -> None:
    """Raises `ValueError` for a reference whose answers cannot be compared with the model's.

    Args:
        model, reference: As for [`run_all_exits`].
    """
    if not has_exits(reference):
        raise ValueError(
            f"reference must be a classifier with exits or a cascade, in torch or exported, got a "
            f"{type(reference).__name__}. A plain model becomes one with exit_layers=[its number of layers]."
        )
    for name in ("id2label", "problem_type"):
        own, other = getattr(model.config, name), getattr(reference.config, name)
        if own != other:
            raise ValueError(
                f"model and reference must have the same labels, but {name} is {own} and {other}. Give the model that "
                "this one was made from."
            )
    for name, (own, other) in _tokens(model, reference).items():
        if own != other:
            raise ValueError(
                f"model and reference must be made for one tokenizer, but {name} is {own} and {other}. Give the model "
                "that this one was made from."
            )


def _tokens(model: Any, reference: Any) -> dict[str, tuple[int, int]]:
    """What both say of the tokenizer, by name: values of the model and of the reference."""
    said = {"vocab_size": tuple(each.input_limits["input_ids"] for each in (model, reference))}
    for name in _SPECIAL_TOKENS:
        values = tuple(getattr(each.config, name, None) for each in (model, reference))
        if None not in values:
            said[name] = values
    return said


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Puts a torch model into evaluation mode for a while; an exported one has no other."""
    if not isinstance(model, torch.nn.Module) or not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
