"""Subsets of the labels, and accuracy."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.data.source import Source, Subset


class Accuracy(NamedTuple):
    """Shares of images, 0 … 1."""

    top1: float
    top5: float | None  # None with 5 classes or fewer


def accuracy(logits: Tensor, labels: Tensor) -> Accuracy:
    """Accuracy of logits [N, C] for labels [N]. Labels from C on, of classes without training images, are errors."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    top5 = best.any(1).float().mean().item() if logits.shape[1] > 5 else None
    return Accuracy(best[:, 0].float().mean().item(), top5)


def labelled(source: Source) -> Source:
    """The images of a source that have a label: the source itself if all have one, else a part of it, maybe empty."""
    if source.classes is None:
        return Subset(source, [])
    numbers = [number for number in range(len(source)) if source.label(number) >= 0]
    return source if len(numbers) == len(source) else Subset(source, numbers)


def labelled_subset(source: Source, share: float, seed: int) -> Source:
    """A share of the labelled images: the same number of each class, at least one.

    All images of a class are taken if it has fewer. A seed determines the choice, and the choice of a smaller share is
    part of that of a larger one. Images without a label (−1) are left out.

    Args:
        source: images with labels.
        share: share of the labelled images, above 0 and at most 1.
        seed: random seed of the choice; the global generator is not used.

    Raises:
        ValueError: the source has no labels.
    """
    labels = torch.tensor([source.label(i) for i in range(len(source))])
    if source.classes is None or not (labels >= 0).any():
        raise ValueError("eval: the source has no labels to learn from")
    if share == 1:
        return labelled(source)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    of_class = [order[labels[order] == label] for label in labels.unique().tolist() if label >= 0]
    each = max(1, round(share * sum(map(len, of_class)) / len(of_class)))
    return Subset(source, torch.cat([rows[:each] for rows in of_class]).sort().values.tolist())
