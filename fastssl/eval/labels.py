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


def labelled_subset(source: Source, amount: float, seed: int) -> Source:
    """Some of the labelled images: a share of them or a number of them, equally many of each class.

    Of a share each class has at least one image, and all of its images if it has fewer than the others. A number is
    divided exactly: some classes, chosen by the seed, may have one image more than the others, and where a class has
    too few images the others fill up. A seed determines the choice, and the choice of a smaller amount is part of that
    of a larger one. Images without a label (−1) are left out.

    Args:
        source: images with labels.
        amount: share of the labelled images, above 0 and at most 1; or their number, a whole number above 1.
        seed: random seed of the choice; the global generator is not used.

    Raises:
        ValueError: the source has no labels, or fewer than `amount`, or more classes.
    """
    labels = torch.tensor([source.label(i) for i in range(len(source))])
    if source.classes is None or not (labels >= 0).any():
        raise ValueError("eval: the source has no labels to learn from")
    if amount == 1:
        return labelled(source)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    of_class = [order[labels[order] == label] for label in labels.unique().tolist() if label >= 0]
    images, classes = sum(map(len, of_class)), len(of_class)
    if amount < 1:
        each = max(1, round(amount * images / classes))
        return Subset(source, torch.cat([rows[:each] for rows in of_class]).sort().values.tolist())
    if not classes <= amount <= images:
        raise ValueError(
            f"eval: --labels must be at least the {classes} classes and at most the {images} labelled images, got "
            f"{amount:g}"
        )
    # In turns: each class gives its first image, then its second, and so on, classes in a random order.
    turns = torch.randperm(classes, generator=generator).tolist()
    rows = [of_class[c][turn] for turn in range(max(map(len, of_class))) for c in turns if turn < len(of_class[c])]
    return Subset(source, torch.stack(rows[: int(amount)]).sort().values.tolist())
