"""The held-out split of sources that have no test split of their own, and sentences on labels.

The rule looks at each image's identity (`Source.identity`), not at its place in a list: any order of the files gives
the same split, labels that repeat with a period do not matter, and an image that is added or removed moves at most one
other image of its class to the other side.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

from fastssl.text import listed

NOTHING_HELD_OUT = "without labels no image is held out: the held-out split shows a fifth of the training split again"
PARTS = 5  # a fifth of each class is held out
TRAIN_NAMES = ("train", "training")  # names of folders and shards that hold a training split, in lower case
TEST_NAMES = ("test", "testing", "val", "valid", "validation", "eval", "evaluation")  # a test split; the best first


def hold_out(identities: Iterable[str], labels: np.ndarray | None, split: str, name: str) -> np.ndarray:
    """Numbers [M] int64, ascending, of the images in a split.

    The test split has a fifth of each class, rounded, and at least one image of a class with two or more: those whose
    identities have the smallest hashes (BLAKE2b, the same on every machine). Images without a label are all in the
    training split. If no image has a label, nothing is held out from training, since there is nothing to evaluate: the
    training split then has every image, and the test split shows a fifth of them.

    Args:
        identities: N texts, one of each image.
        labels: [N] integers, −1 for an image without a label; None if no image has one.
        split: "train" or "test".
        name: the source in the error.

    Raises:
        ValueError: the test split would be empty.
    """
    hashes = _hashes(identities)
    labels = np.full(len(hashes), -1) if labels is None else np.asarray(labels, dtype=np.int64)
    labelled = bool((labels >= 0).any())
    rank, size = _ranks(hashes, labels)
    quota = np.maximum((2 * size + PARTS) // (2 * PARTS), size >= (2 if labelled else 1))  # a rounded fifth
    held_out = (rank < quota) & ((labels >= 0) | (not labelled))
    if split == "test":
        if not held_out.any():
            raise ValueError(
                f"data: {name} must have a class with two labelled images or more, as a fifth of each class is held "
                f"out for evaluation, got {len(labels)} images without such a class: use it without labels, or give it "
                "a test split of its own"
            )
        return np.flatnonzero(held_out)
    return np.flatnonzero(~held_out) if labelled else np.arange(len(labels))


def _hashes(identities: Iterable[str]) -> np.ndarray:
    """[N] uint64: 10 million identities take 6 seconds."""
    digests = (blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in identities)
    return np.frombuffer(b"".join(digests), "<u8")


def _ranks(hashes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place [N] of each image in its class by hash, from 0; number [N] of images in its class)."""
    order = np.lexsort((hashes, labels))
    starts = np.flatnonzero(np.diff(labels[order], prepend=labels.min(initial=0) - 1))
    counts = np.diff(starts, append=len(order))
    rank, size = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    rank[order], size[order] = np.arange(len(order)) - np.repeat(starts, counts), np.repeat(counts, counts)
    return rank, size


def describe_labels(labels: np.ndarray | None, classes: Sequence[str] | None, held_out: bool = True) -> tuple[str, ...]:
    """Sentences on the labels of a source: images without a label, and classes that are not evaluated.

    Args:
        labels: [N] integers, −1 for an image without a label; None if no image has one.
        classes: names of the labels; None: no image has one.
        held_out: True if `hold_out` divides these images, False if they are a split already.
    """
    if classes is None or labels is None:
        return (NOTHING_HELD_OUT,) if held_out else ()
    told = []
    if missing := int((labels < 0).sum()):
        rest = "has no label: it trains, and evaluations leave it out"
        if missing > 1:
            rest = "have no label: they train, and evaluations leave them out"
        told.append(f"{missing:,} of {len(labels):,} images {rest}")
    counts = np.bincount(labels[labels >= 0].astype(np.int64), minlength=len(classes))
    lone = [classes[label] for label in np.flatnonzero(counts == 1).tolist()]
    if held_out and lone:
        told.append(f"no image is held out of classes that have only one: {listed(lone)}")
    return tuple(told)


def describe_sides(has_labels: dict[str, bool]) -> tuple[str, ...]:
    """A sentence if one split has labels and the other one has none.

    Args:
        has_labels: {"training" and "held-out", or one of them: True if an image of it has a label}.
    """
    if len({*has_labels.values()}) < 2:
        return ()
    with_labels, without = (next(side for side, has in has_labels.items() if has == value) for value in (True, False))
    return (f"the {without} split has no labels, unlike the {with_labels} split: nothing can be evaluated",)
