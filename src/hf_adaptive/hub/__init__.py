"""Model cards and pushing."""

from .model_card import model_card, write_model_card

__all__ = ["model_card", "write_model_card"]
