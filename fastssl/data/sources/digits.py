"""`digits`: 1,797 real handwritten digits, 8×8 grey, from scikit-learn (UCI optical recognition of digits).

A fifth of each digit is held out, see `split.hold_out`. Pixels are 0 … 16 in the dataset and 0 … 255 here.
"""

import numpy as np

from fastssl.extras import need

from ..source import Source
from ..split import hold_out


class Digits(Source):
    """Images and labels of one split, in memory."""

    def __init__(self, split: str):
        # imported here, because scikit-learn takes a second
        datasets = need("sklearn.datasets", what="the source digits", extra="train", distribution="scikit-learn")
        data = datasets.load_digits()
        rows = hold_out(map(str, range(len(data.target))), data.target, split, name="digits")
        self.classes, self.size, self.shards = [str(digit) for digit in range(10)], (8, 8), None
        self._pixels = (data.images[rows] * (255 / 16)).round().astype(np.uint8)
        self._labels, self._rows = data.target[rows], rows

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> np.ndarray:
        return np.repeat(self._pixels[index][..., None], 3, axis=2)

    def name(self, index: int) -> str:
        return f"digits, image {index}"

    def identity(self, index: int) -> str:
        return str(self._rows[index])

    def label(self, index: int) -> int:
        return int(self._labels[index])


def open_split(argument: str, split: str) -> Digits:
    if argument:
        raise ValueError(f"data: digits takes no argument, got {argument!r}")
    return Digits(split)
