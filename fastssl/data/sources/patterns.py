"""`patterns`: ten classes of printed patterns, made on demand from (seed, index), labelled, of any size and number.

    patterns                                   4,096 training and 1,000 test images of 32×32
    patterns:count=20000,size=64,seed=1        another number of training images, size and seed

Stripes, checks, dots … fill the image in two tones of one colour. Raw pixels and random encoders know little of the
class, and pretraining finds it within minutes, by design:

* Hue, light, tint, offset, rotation, scale and which of the tones is darker vary from image to image, so that images of
  a class have few pixels in common.
* Instance discrimination (MoCo, SimCLR) uses whatever tells images apart and survives the augmentation. Colour jitter
  removes the colour, crops remove the offset and most of the scale, and rotations stay within 30°: what is left to tell
  images apart is the pattern. There are no backgrounds, because they tell images apart as well: two photographs are
  enough to slow the learning of the class.
* Every crop shows the pattern, and convolutions see a trace of it before they have learned anything, so that learning
  starts at once. Outlines of single objects (`shapes`) take several times as many steps.
"""

import colorsys
import math
from collections.abc import Callable

import numpy as np

from ..drawn import DrawnImages, read_settings

SUPERSAMPLING = 2  # factor of the drawing's size, averaged down for smooth edges
PERIOD = (5.5 / 32, 8 / 32)  # shortest and longest period of a pattern, as shares of the side
MAX_ROTATION = math.radians(30)
SATURATION, BRIGHTNESS, DARK = 0.75, 0.9, 0.3  # of the bright tone; factor of the dark one
LIGHT, TINT = 0.4, 0.2  # largest logarithms of the factors of all channels and of single ones


def _share(x: np.ndarray) -> np.ndarray:
    """The fractional part, 0 to 1, of negative numbers, too."""
    return x - np.floor(x)


def _stroke(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Short horizontal strokes on a square lattice: a cross together with those of exchanged u and v."""
    return (np.abs(_share(0.7 * u) - 0.5) < 0.36) & (np.abs(_share(0.7 * v) - 0.5) < 0.12)


def _checks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (_share(0.7 * u) < 0.5) != (_share(0.7 * v) < 0.5)


def _zigzag(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _share(u + 1.2 * np.abs(_share(0.7 * v) - 0.5)) < 0.5


def _bricks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    row = 1.1 * v
    return (_share(row) < 0.25) | (_share(0.55 * u + 0.5 * np.floor(row)) < 0.15)


# Where a pattern has its first tone, by coordinates in periods from a point of the image.
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda u, v: np.zeros(u.shape, bool),
    "stripes": lambda u, v: _share(u) < 0.5,
    "checks": _checks,
    "dots": lambda u, v: (_share(u) - 0.5) ** 2 + (_share(v) - 0.5) ** 2 < 0.09,
    "rings": lambda u, v: _share(np.sqrt(u * u + v * v)) < 0.5,
    "zigzag": _zigzag,
    "grid": lambda u, v: (_share(0.8 * u) < 0.25) | (_share(0.8 * v) < 0.25),
    "bricks": _bricks,
    "spokes": lambda u, v: _share(np.arctan2(v, u) * 5 / math.tau) < 0.5,
    "crosses": lambda u, v: _stroke(u, v) | _stroke(v, u),
}


class Patterns(DrawnImages):
    """Drawn patterns of one split; the arguments are those of `DrawnImages`."""

    def __init__(self, split: str, count: int, size: int, seed: int):
        super().__init__(split, count, size, seed, list(PATTERNS))
        self._drawings = list(PATTERNS.values())

    def read(self, index: int) -> np.ndarray:
        random = self.random(index)
        bright = 255 * np.array(colorsys.hsv_to_rgb(random.uniform(), SATURATION, BRIGHTNESS))
        bright *= np.exp(random.uniform(-LIGHT, LIGHT) + random.uniform(-TINT, TINT, 3))
        tones = random.permutation([1, DARK])
        x, y = random.uniform(0, 1, 2)
        angle, period = random.uniform(-MAX_ROTATION, MAX_ROTATION), random.uniform(*PERIOD)

        side = SUPERSAMPLING * self._side
        places = (np.arange(side) + 0.5) / side
        along, across = (places - x) / period, (places[:, None] - y) / period
        u = math.cos(angle) * along + math.sin(angle) * across
        v = math.cos(angle) * across - math.sin(angle) * along
        inside = self._drawings[self.label(index)](u, v)
        # numbers of pixels that are inside, added by rows and columns: exact, unlike a mean
        covered = inside.reshape(self._side, SUPERSAMPLING, self._side, SUPERSAMPLING).sum((1, 3), dtype=np.uint8)
        levels = np.arange(SUPERSAMPLING**2 + 1)[:, None] / SUPERSAMPLING**2
        palette = (tones[1] + (tones[0] - tones[1]) * levels) * bright
        return palette.clip(0, 255).astype(np.uint8)[covered]


def open_split(argument: str, split: str) -> Patterns:
    return Patterns(split, **read_settings(argument, split, "patterns"))
