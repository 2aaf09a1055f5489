"""Whether a card is still as this package, or `transformers`, wrote it: only such a card may be replaced unasked."""

import hashlib
import re

from huggingface_hub import ModelCard, ModelCardData

_SEAL = "<!-- Written by hf_adaptive, checksum {}: a later run renews this card unless somebody has edited it. -->"
_SEAL_PATTERN = re.compile(re.escape(_SEAL).replace(r"\{\}", "([0-9a-f]{16})"))
BLANK_SEAL = _SEAL.format("0" * 16)
# What `push_to_hub` of models and tokenizers writes above an empty form where a repository has no card.
_STOCK_DESCRIPTION = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. "
    "This model card has been automatically generated."
)


def sealed(card: ModelCard) -> ModelCard:
    """The card with its `BLANK_SEAL` replaced by one that holds a checksum of everything else in it."""
    text = str(ModelCard(str(card)))
    return ModelCard(text.replace(BLANK_SEAL, _SEAL.format(_checksum(text))))


def is_nobodys(text: str) -> bool:
    """Whether nobody has written or changed this card by hand.

    Args:
        text (`str`): The whole card, metadata included.
    """
    seal = _SEAL_PATTERN.search(text)
    return seal[1] == _checksum(text) if seal else is_empty_form(text)


def is_empty_form(text: str) -> bool:
    """Whether this is the form that `push_to_hub` of `transformers` writes, with nothing filled in."""
    if _STOCK_DESCRIPTION not in text:
        return False
    form = ModelCard.from_template(ModelCardData(), model_description=_STOCK_DESCRIPTION)
    return text.replace("\r\n", "\n").rstrip().endswith(form.text.rstrip())


def _checksum(text: str) -> str:
    """Of everything but the seal; line endings do not count, because git and editors change them unasked."""
    rest = _SEAL_PATTERN.sub("", text).replace("\r\n", "\n").strip()
    return hashlib.sha256(rest.encode()).hexdigest()[:16]
