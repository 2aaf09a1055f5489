"""The tokenizers that texts are read with."""

from typing import Any

from transformers import PreTrainedTokenizerBase


def check_tokenizer(tokenizer: Any) -> None:
    """Raises `ValueError` unless a tokenizer of transformers, or None."""
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            "tokenizer must be one of transformers (AutoTokenizer.from_pretrained(...)), or None, got a "
            f"{type(tokenizer).__name__}."
        )
