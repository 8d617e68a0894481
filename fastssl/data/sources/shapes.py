"""`shapes`: ten classes of drawn shapes, made on demand from (seed, index), labelled, of any size and number.

    shapes                                   4,096 training and 1,000 test images of 32×32
    shapes:count=20000,size=64,seed=1        another number of training images, size and seed

The other properties of an image are chosen so that a method must learn the shape:

* Position, size, rotation, colour and background vary from image to image, so raw pixels tell little about the class.
* Instance discrimination (MoCo, SimCLR) uses whatever tells images apart most easily. A different background for each
  image would be enough, and so would a pair of two colours from a palette, since colour jitter changes both and keeps
  their relation; the shape would not be used. So all images and classes share two backgrounds, dark grey and light
  grey: one bit for thousands of images. On a grey background there is no second colour, and jitter removes the hue.
* A random crop removes position and size as long as they vary less than the crop. So shapes are large, and the small
  preset of moco_v2 crops down to a quarter of the area. Rotations stay within 25°, so that they do not become the
  easiest way to tell images apart.
"""

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

from ..drawn import DrawnImages, read_settings

GREYS = (40, 215)  # the two backgrounds
MAX_ROTATION = math.radians(25)
SUPERSAMPLING = 3  # factor of the drawing's size, averaged down for smooth edges

Points = list[tuple[float, float]]


def _polygon(radius: float, corners: int, inner: float | None = None) -> Points:
    """A regular polygon, or a star whose every other corner has the radius `inner`."""
    count = corners if inner is None else 2 * corners
    radii = [radius if inner is None or i % 2 == 0 else inner for i in range(count)]
    angles = [2 * math.pi * i / count for i in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles)]


def _heart() -> Points:
    angles = [2 * math.pi * i / 40 for i in range(40)]
    return [
        (math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16)
        for a in angles
    ]


def _crescent() -> Points:
    outer = [(math.cos(a), math.sin(a)) for a in np.linspace(0.7, 2 * math.pi - 0.7, 30)]
    inner = [(0.35 + 0.75 * math.cos(a), 0.75 * math.sin(a)) for a in np.linspace(2 * math.pi - 1.02, 1.02, 30)]
    return outer + inner


UPPER_PLUS = [(1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3)]
# Outlines in units of the shape's radius; a second outline is a hole.
SHAPES: dict[str, tuple[Points, ...]] = {
    "disc": (_polygon(0.9, 40),),
    "triangle": (_polygon(1.0, 3),),
    "square": (_polygon(1.0, 4),),
    "star": (_polygon(1.0, 5, inner=0.4),),
    "plus": (UPPER_PLUS + [(-x, -y) for x, y in UPPER_PLUS],),
    "ring": (_polygon(0.95, 40), _polygon(0.55, 40)),
    "heart": (_heart(),),
    "crescent": (_crescent(),),
    "arrow": ([(1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3), (-1, -0.3), (0.1, -0.3), (0.1, -0.8)],),
    "bar": ([(1, 0.28), (-1, 0.28), (-1, -0.28), (1, -0.28)],),
}


class Shapes(DrawnImages):
    """Drawn shapes of one split; the arguments are those of `DrawnImages`."""

    def __init__(self, split: str, count: int, size: int, seed: int):
        super().__init__(split, count, size, seed, list(SHAPES))
        self._outlines = list(SHAPES.values())

    def read(self, index: int) -> np.ndarray:
        random = self.random(index)
        grey = GREYS[random.integers(len(GREYS))]
        hue = random.uniform()
        radius = random.uniform(0.26, 0.42)
        x, y = random.uniform(radius, 1 - radius, 2)
        angle = random.uniform(-MAX_ROTATION, MAX_ROTATION)
        return draw_shape(self._outlines[self.label(index)], self._side, grey, hue, radius, (x, y), angle)


def draw_shape(
    outlines: tuple[Points, ...],
    side: int,
    grey: int,
    hue: float,
    radius: float,
    centre: tuple[float, float],
    angle: float,
) -> np.ndarray:
    """Pixels [side, side, 3] uint8 of a coloured shape on a grey background.

    Args:
        outlines: one of `SHAPES`.
        side: height and width in pixels.
        grey: value of the background, 0 to 255.
        hue: colour of the shape, 0 to 1.
        radius: of the shape, as a share of the side.
        centre: of the shape (from the left, from the top), as shares of the side.
        angle: rotation in radians.
    """
    side *= SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), (grey, grey, grey))
    red, green, blue = (round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.75, 0.8))
    rotation = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    stencil = Image.new("L", canvas.size)
    draw = ImageDraw.Draw(stencil)
    for outline, fill in zip(outlines, (255, 0)):
        points = side * (np.asarray(centre) + radius * np.asarray(outline) @ rotation)
        draw.polygon([(x, y) for x, y in points], fill=fill)
    canvas.paste((red, green, blue), mask=stencil)
    return np.array(canvas.reduce(SUPERSAMPLING))


def open_split(argument: str, split: str) -> Shapes:
    return Shapes(split, **read_settings(argument, split, "shapes"))
