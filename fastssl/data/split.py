"""The held-out split of sources that have no test split of their own."""

import numpy as np

EVERY = 5  # every fifth image is held out


def hold_out(count: int, split: str, labelled: bool, name: str) -> np.ndarray:
    """Numbers [M] int64, ascending, of the images in a split: every fifth image (4, 9, 14, …) is the test split.

    Without labels nothing is held out from training, since there is nothing to evaluate: the training split then has
    every image.

    Args:
        count: images of the whole source.
        split: "train" or "test".
        labelled: whether every image has a label.
        name: the source in the error.

    Raises:
        ValueError: the test split would be empty.
    """
    rows = np.arange(count)
    held_out = rows[EVERY - 1 :: EVERY]
    if split == "test":
        if not len(held_out):
            raise ValueError(
                f"data: {name} must have at least {EVERY} images, as every fifth is the test split, got {count}"
            )
        return held_out
    return np.delete(rows, held_out) if labelled else rows
