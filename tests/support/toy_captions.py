"""A source with captions from outside the package: noisy images of one colour, and two sentences about each.

Colours repeat, so that images share captions. Every `SILENT`th image has none.
"""

import numpy as np

COUNTS = {"train": 48, "test": 30}
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 220),
    "yellow": (220, 220, 30),
    "purple": (200, 30, 200),
    "orange": (240, 140, 20),
}
SILENT = 10


class Colours:
    """Images of 32×32 pixels of a colour, their class."""

    size, shards = (32, 32), None

    def __init__(self, split: str):
        self.classes = list(COLOURS)
        self._split = split

    def __len__(self) -> int:
        return COUNTS[self._split]

    def read(self, index: int) -> np.ndarray:
        generator = np.random.default_rng([index, len(self._split)])
        noise = generator.integers(-15, 16, (32, 32, 3))
        return (noise + np.array(COLOURS[self._name(index)])).clip(0, 255).astype(np.uint8)

    def name(self, index: int) -> str:
        return f"{self._split} {index}"

    def label(self, index: int) -> int:
        return index % len(COLOURS)

    def captions(self, index: int) -> tuple[str, ...]:
        if index % SILENT == SILENT - 1:
            return ()
        return f"a {self._name(index)} square", f"Number {index // 12} is {self._name(index)}."

    def _name(self, index: int) -> str:
        return self.classes[self.label(index)]


def open_split(argument: str, split: str) -> Colours:
    return Colours(split)
