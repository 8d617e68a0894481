"""Ranks of the positives among the negatives: how hard the contrastive task still is, and signs that it is lost."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastssl.contract import RanksNegatives
from fastssl.data.augmentation import Augmentation
from fastssl.data.loader import Loader
from fastssl.data.source import Source
from fastssl.distributed import rank, world_size

BATCH = 256  # largest batch: 4,096 images would take minutes on a CPU
RANDOM = 0.95  # share of the entropy of random ranks, from which the ranks count as random
EASY = 0.999  # share of positives ranked first, from which there is nothing left to learn
HALF = 0.5  # of an epoch at the start that does not count: a queue of random keys is easily told from positives
FALLEN = 1 / 3  # share of its best epoch's positives ranked first, below which the contrast counts as lost


class Ranks(NamedTuple):
    """Where positives stand among the negatives."""

    positions: Tensor  # [Q] int64 on the CPU: number of negatives that score above each query's positive
    negatives: int  # of each query
    batch: int  # images per batch

    @property
    def first(self) -> float:
        """Share of the positives that rank first, 0 to 1."""
        return float((self.positions == 0).double().mean())

    @property
    def entropy(self) -> float:
        """Entropy of the ranks, as a share of that of random ones: 0 where all positives rank first, about 1 where
        ranks are random. Ranks within one of the `bins` count as equally likely."""
        edges = bins(self.negatives)
        shares = np.histogram(self.positions.numpy(), bins=edges)[0] / len(self.positions)
        found = shares > 0
        densities = shares[found] / np.diff(edges)[found]
        return max(0.0, float(-(shares[found] * np.log(densities)).sum() / math.log(self.negatives + 1)))

    def text(self) -> str:
        """The numbers as a phrase."""
        return (
            f"{self.first:.1%} rank first among {self.negatives:,} negatives; the entropy of their ranks is "
            f"{self.entropy:.0%} of that of random ones"
        )

    def results(self) -> dict[str, float]:
        """Fields of evaluations.jsonl."""
        return {"ranked_first": round(self.first, 4), "rank_entropy": round(self.entropy, 4)}

    def warning(self) -> str | None:
        """One sentence if the ranks look random, or all positives rank first."""
        if self.entropy > RANDOM:
            return "The contrast looks lost: positives rank among the negatives as if at random."
        if self.first > EASY:
            return "The contrast looks too easy: all positives rank first; the views of an image may be too much alike."
        return None


@torch.no_grad()
def collect_ranks(
    method: RanksNegatives, source: Source, augmentation: Augmentation, batch_size: int, seed: int, queries: int
) -> Ranks | None:
    """Ranks in training batches of about so many images; those of this rank, but all ranks must call together.

    The method, which should be in evaluation mode, and torch's generators are left unchanged.

    Args:
        method: an `nn.Module`, which ranks negatives.
        source: training images.
        augmentation: of the method.
        batch_size: images of a training batch over all ranks.
        seed: of order and views.
        queries: number of images of a rank, which whole batches round up.

    Returns:
        None where a batch has too few images for a negative.
    """
    size = min(batch_size // world_size(), BATCH, len(source) // world_size())
    if size < 1:
        return None
    device = next(method.parameters()).device  # type: ignore[attr-defined]
    place = {"device": device, "rank": rank(), "world": world_size()}
    loader = Loader(source, augmentation, size, seed=seed, max_bad=1.0, **place)
    collected, negatives = [], 0
    devices = [device] if device.type == "cuda" else []  # a method that shuffles its batch uses the generator
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for batch in itertools.islice(loader.epoch(0), -(-queries // size)):
            positions, negatives = method.ranks(batch)
            collected.append(positions.cpu())
    return Ranks(torch.cat(collected), negatives, size) if collected and negatives > 0 else None


def bins(negatives: int) -> np.ndarray:
    """Edges [bins + 1] int64 of bins 0 | 1 | 2–3 | 4–7 | … up to `negatives`: bin i is edges[i] … edges[i + 1] − 1."""
    powers = 2 ** np.arange(max(1, (negatives - 1).bit_length()))
    return np.array([0, *powers, negatives + 1])


def lost_contrast(metrics: list[dict]) -> str | None:
    """One sentence if far fewer positives rank first in the newest epoch than in an earlier one.

    Args:
        metrics: records of metrics.jsonl, with "top1" where the method ranks negatives.
    """
    by_epoch: dict[int, list[float]] = {}
    for line in metrics:
        if line.get("top1") is not None and line["epoch"] > HALF:
            by_epoch.setdefault(math.ceil(line["epoch"]), []).append(line["top1"])
    if not by_epoch:
        return None
    means = {epoch: sum(values) / len(values) for epoch, values in by_epoch.items()}
    last = max(means)
    best = max(means, key=lambda epoch: means[epoch])
    if means[last] >= FALLEN * means[best]:
        return None
    return (
        f"The contrast looks lost: {means[last]:.1%} of the positives rank first in epoch {last}, after "
        f"{means[best]:.1%} in epoch {best}."
    )
