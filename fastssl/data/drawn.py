"""Images that are drawn on demand from (seed, index): what their sources have in common."""

import numpy as np

from fastssl.text import printable

from .source import Source

LIMITS = {"count": (1, 100_000_000), "size": (8, 2048), "seed": (0, 2**63 - 1)}  # a larger size takes a gigabyte
TEST_OFFSET = 2**40  # the test split's random numbers start here, apart from all of the training split's


class DrawnImages(Source):
    """Drawn images of one split, whose classes follow each other by turns.

    Args:
        split: "train" or "test"; their images are drawn from different random numbers.
        count: number of images.
        size: height and width in pixels.
        seed: seed of all random numbers.
        classes: names of the classes.
    """

    def __init__(self, split: str, count: int, size: int, seed: int, classes: list[str]):
        self._count, self._side, self._seed = count, size, seed
        self._first = TEST_OFFSET if split == "test" else 0
        self.classes, self.size, self.shards = classes, (size, size), None

    def __len__(self) -> int:
        return self._count

    def label(self, index: int) -> int:
        return index % len(self.classes)

    def name(self, index: int) -> str:
        return f"{type(self).__name__.lower()}, image {index}"

    def random(self, index: int) -> np.random.Generator:
        """Random numbers of an image."""
        return random_numbers(self._seed, self._first + index)


def random_numbers(seed: int, number: int) -> np.random.Generator:
    """Random numbers that depend on the seed of a source and on a number of its own alone."""
    return np.random.Generator(np.random.Philox(key=[seed, number]))


def read_settings(argument: str, split: str, source: str) -> dict[str, int]:
    """The settings count, size and seed of a source of drawn images, from the text behind its colon.

    Raises:
        ValueError: a setting is unknown or out of its limits.
    """
    settings = {"count": 4096 if split == "train" else 1000, "size": 32, "seed": 0}
    for setting in filter(None, argument.split(",")):
        name, _, value = setting.partition("=")
        if name not in settings or not value.isdecimal():
            raise ValueError(f"data: {source} takes count=N, size=N and seed=N, got {printable(setting)!r}")
        low, high = LIMITS[name]
        number = int(value[:20])  # more digits are too many in any case
        if len(value) > 20 or not low <= number <= high:
            raise ValueError(f"data: {source} takes a {name} from {low:,} to {high:,}, got {printable(setting[:60])!r}")
        if name != "count" or split == "train":  # the size of the test split is fixed
            settings[name] = number
    return settings
