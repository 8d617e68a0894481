"""Ranks of the positives among the negatives, as a histogram."""

import itertools

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from fastssl.eval.ranks import Ranks, bins, collect_ranks

from .parts import Picture
from .pictures import GREY, draw
from .run_data import RunData

QUERIES = 512  # number of images in the histogram


def collect(run: RunData) -> Ranks | None:
    """Ranks of training batches, in evaluation mode; the method and torch's generators are left unchanged."""
    config, seed = run.run.config, run.run.options.seed
    return collect_ranks(run.method, run.train_source, config.augmentation, config.training.batch_size, seed, QUERIES)


def histogram(ranks: Tensor, negatives: int, colour: str) -> Picture:
    """Share of the queries in each of the `bins`, and the share expected by chance.

    Args:
        ranks: [Q] int64, number of negatives that score above each query's positive.
        negatives: number of negatives of each query.
        colour: colour of the bars.
    """
    edges = bins(negatives)
    shares = np.histogram(ranks.numpy(), bins=edges)[0] / len(ranks)
    chance = np.diff(edges) / (negatives + 1)
    names = [f"{low:,}" if high - low == 1 else f"{low:,}–{high - 1:,}" for low, high in itertools.pairwise(edges)]
    spacing = -(-len(names) // 6)  # bins per label, so that labels do not overlap

    def plot(axes: Axes) -> None:
        axes.bar(range(len(shares)), shares, color=colour, width=0.85)
        axes.stairs(chance, np.arange(len(edges)) - 0.5, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xticks(range(0, len(names), spacing), names[::spacing])
        axes.set_xlabel("negatives that score above the positive")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        axes.grid(False, axis="x")

    first, median = float((ranks == 0).double().mean()), int(ranks.median())
    alt = f"histogram of ranks: {first:.1%} of the positives are first, the median rank is {median}"
    legend = [(colour, "disc", "queries"), (GREY, "dash", "by chance")]
    return draw("", alt, plot, 2.3, legend=legend)
