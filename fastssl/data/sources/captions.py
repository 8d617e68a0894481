"""`captions`: drawn shapes with captions, such as "a small red star on a dark background, upper left", made on demand.

    captions                                 4,096 training and 1,000 test images of 32×32
    captions:count=20000,size=64,seed=1      another number of training images, size and seed

Each image has one of ten shapes, eight colours, two sizes, two backgrounds and nine places: 2,880 combinations, each in
three phrasings. Training images have random combinations; those of the test split are all different, so that there is
one right answer when captions are searched. The label is the shape. Captions name places and colours, so a method must
neither flip images nor change their colours, and crop little.
"""

from collections.abc import Iterable

import numpy as np

from ..drawn import TEST_OFFSET, DrawnImages, random_numbers, read_settings
from .shapes import GREYS, MAX_ROTATION, SHAPES, draw_shape

HUES = {"red": 0, "orange": 28, "yellow": 55, "green": 120, "cyan": 180, "blue": 225, "purple": 275, "pink": 320}
HUE_SPREAD = 5  # degrees around those above
RADII = {"small": (0.12, 0.15), "large": (0.22, 0.25)}  # shares of the side
BACKGROUNDS = dict(zip(("dark", "light"), GREYS))
PLACES = {  # centre of the shape from the left and from the top, shares of the side
    f"{row} {column}": (x, y)
    for row, y in (("upper", 0.26), ("centre", 0.5), ("lower", 0.74))
    for column, x in (("left", 0.26), ("middle", 0.5), ("right", 0.74))
}
PLACE_SPREAD = 0.02
COMBINATIONS = (len(HUES), len(RADII), len(BACKGROUNDS), len(PLACES))
ORDERS = TEST_OFFSET + 2**32  # the random numbers of the test split's order start here
PHRASINGS = (
    "a {size} {hue} {shape} on a {background} background, {place}",
    "{place}: one {hue} {shape}, {size}, the background is {background}",
    "a {background} picture with one {shape} in the {place}, {hue} and {size}",
)


class Captions(DrawnImages):
    """Drawn shapes of one split with captions; the arguments are those of `DrawnImages`.

    The test split has at most 2,880 images.
    """

    def __init__(self, split: str, count: int, size: int, seed: int):
        super().__init__(split, count, size, seed, list(SHAPES))
        self._outlines, self._is_test, total = list(SHAPES.values()), split == "test", int(np.prod(COMBINATIONS))
        shuffles = (random_numbers(seed, ORDERS + label).permutation(total) for label in range(len(SHAPES)))
        self._test_order = np.stack(list(shuffles))  # combinations of the test images of each shape

    def captions(self, index: int) -> tuple[str, ...]:
        hue, size, background, place = self._combination(index, self.random(index))
        words = {"shape": self.classes[self.label(index)], "hue": hue, "size": size, "background": background}
        return tuple(phrasing.format(place=place, **words) for phrasing in PHRASINGS)

    def read(self, index: int) -> np.ndarray:
        random = self.random(index)
        hue, size, background, place = self._combination(index, random)
        degrees = HUES[hue] + random.uniform(-HUE_SPREAD, HUE_SPREAD)
        radius = random.uniform(*RADII[size])
        x, y = np.asarray(PLACES[place]) + random.uniform(-PLACE_SPREAD, PLACE_SPREAD, 2)
        angle = random.uniform(-MAX_ROTATION, MAX_ROTATION)
        outlines, grey = self._outlines[self.label(index)], BACKGROUNDS[background]
        return draw_shape(outlines, self._side, grey, degrees % 360 / 360, radius, (x, y), angle)

    def _combination(self, index: int, random: np.random.Generator) -> tuple[str, str, str, str]:
        """Colour, size, background and place, drawn first of an image's random numbers."""
        number = random.integers(self._test_order.shape[1])
        if self._is_test:
            number = self._test_order[self.label(index), index // len(SHAPES)]
        choices: tuple[Iterable[str], ...] = (HUES, RADII, BACKGROUNDS, PLACES)
        hue, size, background, place = (
            list(names)[chosen] for names, chosen in zip(choices, np.unravel_index(number, COMBINATIONS))
        )
        return hue, size, background, place


def open_split(argument: str, split: str) -> Captions:
    return Captions(split, **read_settings(argument, split, "captions"))
