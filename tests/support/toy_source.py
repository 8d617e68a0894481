"""A source from outside the package: noisy grey images whose brightness is their class."""

import numpy as np

COUNTS = {"train": 48, "test": 24}


class Brightness:
    """Images of 32×32 pixels of `classes` levels of brightness."""

    size, shards = (32, 32), None

    def __init__(self, split: str, classes: int = 3):
        self.classes = [f"level {level}" for level in range(classes)]
        self._split = split

    def __len__(self) -> int:
        return COUNTS[self._split]

    def read(self, index: int) -> np.ndarray:
        generator = np.random.default_rng([index, len(self._split)])
        noise = generator.integers(-20, 21, (32, 32, 3))
        level = 40 + 170 * self.label(index) // max(1, len(self.classes) - 1)
        return (noise + level).astype(np.uint8)

    def name(self, index: int) -> str:
        return f"{self._split} {index}"

    def label(self, index: int) -> int:
        return index % len(self.classes)


def open_split(argument: str, split: str) -> Brightness:
    if argument and not argument.isdigit():
        raise ValueError(f"toy_source: the argument must be a number of classes, got {argument!r}")
    return Brightness(split, int(argument or 3))
