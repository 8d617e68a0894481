"""`digits`: 1,797 real handwritten digits, 8×8 grey, embedded in scikit-learn (UCI optical recognition of digits).

Every fifth image is the test split. Pixels are 0..16 in the data set and 0..255 here.
"""

import numpy as np


class Digits:
    size, shards = (8, 8), None

    def __init__(self, split: str):
        self.classes = [str(digit) for digit in range(10)]
        from sklearn.datasets import load_digits  # here, because scikit-learn takes a second to import

        data = load_digits()
        rows = np.arange(len(data.target)) % 5 == 4
        rows = rows if split == "test" else ~rows
        self._pixels = (data.images[rows] * (255 / 16)).round().astype(np.uint8)
        self._labels = data.target[rows]

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> np.ndarray:
        return np.repeat(self._pixels[index][..., None], 3, axis=2)

    def name(self, index: int) -> str:
        return f"digits, image {index}"

    def label(self, index: int) -> int:
        return int(self._labels[index])


def open_split(argument: str, split: str) -> Digits:
    if argument:
        raise ValueError(f"data: digits takes no argument, got {argument!r}")
    return Digits(split)
