"""Pictures of a PAPA study (compare figure 2 of arXiv 2211.03495)."""

import os
from collections.abc import Sequence

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from ..files import write_whole
from .averages import MeanAttention
from .ranking import HeadRanking

# The drop with all heads constant that the paper reports, on average over its models and tasks (abstract).
_PAPERS_DROP = 0.08
# Positions that fewer examples than this share of the most frequent one reach are left out of pictures.
_LEAST_SHARE = 0.05


def plot_scores(
    fractions: Sequence[float],
    scores: Sequence[Sequence[float]],
    metric: str,
    path: str | os.PathLike,
) -> None:
    """Score by share of constant heads, the mean over seeds and every run as a dot, beside the papers' drop.

    Args:
        fractions (`list[float]`): Shares of constant heads, ascending.
        scores (`list[list[float]]`): For every share, the score of each seed.
        metric (`str`): Name of the score.
        path (`str` or `os.PathLike`): Of the PNG, written whole or not at all.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    means = [sum(row) / len(row) for row in scores]
    axes.plot([100 * fraction for fraction in fractions], means, marker="o", color="tab:blue", label="mean over seeds")
    for fraction, row in zip(fractions, scores):
        axes.plot([100 * fraction] * len(row), row, linestyle="", marker=".", color="tab:orange")
    axes.plot([], [], linestyle="", marker=".", color="tab:orange", label="one seed")
    if fractions[0] == 0:
        axes.axhline(means[0], color="gray", linestyle=":", label="no constant heads")
        axes.axhline(
            (1 - _PAPERS_DROP) * means[0], color="gray", linestyle="--", label="8 % below: all constant in the paper"
        )
    axes.set_xlabel("constant heads, % of all")
    axes.set_ylabel(metric)
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_attention_weights(ranking: HeadRanking, path: str | os.PathLike) -> None:
    """Heat map, layers × heads, of the share of attention that every head keeps.

    Args:
        ranking (`HeadRanking`): From `rank_heads`.
        path (`str` or `os.PathLike`): Of the PNG, written whole or not at all.
    """
    weights = ranking.attention_weights
    layers, heads = weights.shape
    figure = Figure(figsize=(2 + 0.55 * heads, 1.5 + 0.5 * layers), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(weights, cmap="cividis", aspect="auto", origin="lower")
    middle = (weights.min() + weights.max()) / 2
    for layer in range(layers):
        for head in range(heads):
            weight = weights[layer, head].item()
            colour = "black" if weight > middle else "white"
            axes.text(head, layer, f"{weight:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xlabel("head (from 0)")
    axes.set_ylabel("layer (from 0)")
    axes.set_title("learned share of attention (0: all constant, 1: all attention)", fontsize=10)
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def plot_constants(averages: MeanAttention, ranking: HeadRanking, path: str | os.PathLike, columns: int = 4) -> None:
    """The average matrices of the heads that need attention least (upper row) and most (lower row).

    Args:
        averages (`MeanAttention`): From `mean_attention`.
        ranking (`HeadRanking`): From `rank_heads`.
        path (`str` or `os.PathLike`): Of the PNG, written whole or not at all.
        columns (`int`): Heads in a row.
    """
    examples = averages.counts.diagonal()
    length = int((examples >= _LEAST_SHARE * examples.max()).nonzero().max()) + 1
    matrices = averages.average[:, :, :length, :length].cpu()
    matrices = torch.nn.functional.normalize(matrices, p=1, dim=-1)
    order = ranking.order
    rows = {"least": order[:columns], "most": order[: -columns - 1 : -1]}

    figure = Figure(figsize=(2.6 * columns + 1, 6), layout="constrained")
    grid = figure.subplots(2, columns, sharex=True, sharey=True, squeeze=False)
    for (need, pairs), row in zip(rows.items(), grid):
        row[0].set_ylabel(f"needs attention {need}\nattending position")
        for axes, (layer, head) in zip(row, pairs):
            image = axes.imshow(matrices[layer, head], cmap="viridis", norm=PowerNorm(0.5, vmin=0, vmax=1))
            share = ranking.attention_weights[layer, head].item()
            axes.set_title(f"layer {layer}, head {head} ({share:.2f})", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("attended position")
    figure.colorbar(image, ax=grid, label="average attention, rows normalised", shrink=0.7)
    _save(figure, path)


def _save(figure: Figure, path: str | os.PathLike) -> None:
    # No global state of pyplot, and so no display and no figures left open.
    FigureCanvasAgg(figure)
    with matplotlib.rc_context({"savefig.dpi": 150}):
        write_whole(path, lambda draft: figure.savefig(draft, format="png"))
