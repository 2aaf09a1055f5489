"""PAPA, from averages to the probe (Hassid et al., Findings of EMNLP 2022, arXiv 2211.03495)."""

from .averages import MeanAttention, mean_attention
from .preprocessing import fix_sequence_positions, fix_token_positions
from .ranking import HeadRanking, rank_heads

__all__ = [
    "HeadRanking",
    "MeanAttention",
    "fix_sequence_positions",
    "fix_token_positions",
    "mean_attention",
    "rank_heads",
]
