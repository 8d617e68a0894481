"""Ranks of the positives among the negatives: how hard the contrastive task still is."""

import itertools

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from fastssl.data.loader import Loader

from .parts import Picture
from .pictures import GREY, draw
from .run_data import RunData

QUERIES = 512  # number of queries in the histogram
BATCH = 256  # largest batch: 4,096 images would take minutes on a CPU


def collect(run: RunData) -> tuple[Tensor, int, int]:
    """(ranks [Q] int64 on the CPU, number of negatives, images per batch) of training batches, in evaluation mode.

    The method and torch's generators are left unchanged.
    """
    size = min(run.run.config.training.batch_size, BATCH, len(run.train_source))
    device = next(run.method.parameters()).device
    loader = Loader(
        run.train_source, run.run.config.augmentation, size, seed=run.run.options.seed, device=device, max_bad=1.0
    )
    collected = []
    devices = [device] if device.type == "cuda" else []  # a method that shuffles its batch uses the generator
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(run.run.options.seed)
        for batch in itertools.islice(loader.epoch(0), -(-QUERIES // size)):
            ranks, negatives = run.method.ranks(batch)
            collected.append(ranks.cpu())
    return torch.cat(collected), negatives, size


def bins(negatives: int) -> np.ndarray:
    """Edges [bins + 1] int64 of bins 0 | 1 | 2–3 | 4–7 | … up to `negatives`: bin i is edges[i] … edges[i + 1] − 1."""
    powers = 2 ** np.arange(max(1, (negatives - 1).bit_length()))
    return np.array([0, *powers, negatives + 1])


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
