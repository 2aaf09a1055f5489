"""Model cards and pushing."""

from .model_card import model_card, write_model_card
from .push import card_on_hub, choose_card_to_upload, keep_card_of_hub, push_model_card

__all__ = [
    "card_on_hub",
    "choose_card_to_upload",
    "keep_card_of_hub",
    "model_card",
    "push_model_card",
    "write_model_card",
]
