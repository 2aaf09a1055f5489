"""Pictures of a PAPA study (compare figure 2 of arXiv 2211.03495)."""

import os
from collections.abc import Mapping

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from ..files import write_whole
from .averages import MeanAttention
from .ranking import HeadRanking

# Positions that fewer examples than this share of the most frequent one reach are left out of pictures.
_LEAST_SHARE = 0.05


def plot_head_ranks(rankings: HeadRanking | Mapping[str, HeadRanking], path: str | os.PathLike[str]) -> None:
    """Heat maps, layers × heads: in which order heads can be made constant, one map for each ranking.

    A cell has the head's place in the order (1: needs attention least) and the colour of that place, so that maps can
    be compared: dark cells are the first to be constant. The half that needs attention least is framed; beside each
    layer stands how many of its heads are in that half.

    Args:
        rankings (`HeadRanking` or `Mapping[str, HeadRanking]`): From `rank_heads`; several by title, all of one shape.
        path (`str` or `os.PathLike`): Of the PNG, written whole or not at all.
    """
    titled = {"": rankings} if isinstance(rankings, HeadRanking) else dict(rankings)
    layers, heads = next(iter(titled.values())).attention_weights.shape
    figure = Figure(figsize=(0.8 + len(titled) * (0.9 + 0.36 * heads), 1.6 + 0.34 * layers), layout="constrained")
    panels = figure.subplots(1, len(titled), squeeze=False)[0]
    for axes, (title, ranking) in zip(panels, titled.items()):
        image = _draw_ranks(axes, ranking)
        axes.set_title(title, fontsize=11)
    panels[0].set_ylabel("layer (from 0)")
    bar = figure.colorbar(image, ax=list(panels), shrink=0.8, aspect=30)
    bar.set_label("place in the order: first → last to be constant")
    _save(figure, path)


def _draw_ranks(axes: Axes, ranking: HeadRanking) -> AxesImage:
    order = ranking.order
    layers, heads = ranking.attention_weights.shape
    places = torch.zeros(layers, heads)
    for place, (layer, head) in enumerate(order, start=1):
        places[layer, head] = place
    image = axes.imshow(places, cmap="cividis", aspect="auto", origin="lower", vmin=1, vmax=len(order))
    half = len(order) // 2
    for layer, head in order:
        place = int(places[layer, head])
        colour = "white" if place <= half else "black"
        axes.text(head, layer, str(place), ha="center", va="center", color=colour, fontsize=8)
        if place <= half:
            frame = Rectangle((head - 0.46, layer - 0.46), 0.92, 0.92, fill=False, edgecolor="white", linewidth=1.2)
            axes.add_patch(frame)
    for layer in range(layers):
        count = int((places[layer] <= half).sum())
        axes.text(heads - 0.4, layer, f"{count}/{heads}", ha="left", va="center", fontsize=8)
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xlabel("head (from 0)")
    return image


def plot_constants(
    averages: MeanAttention, ranking: HeadRanking, path: str | os.PathLike[str], columns: int = 4
) -> None:
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


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    # No global state of pyplot, and so no display and no figures left open.
    FigureCanvasAgg(figure)
    with matplotlib.rc_context({"savefig.dpi": 150}):
        write_whole(path, lambda draft: figure.savefig(draft, format="png"))
