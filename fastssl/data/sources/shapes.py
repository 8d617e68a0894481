"""`shapes`: ten classes of drawn shapes, made on the fly from (seed, index), any size and count, labelled.

    shapes                                   4,096 training and 1,000 test images of 32×32
    shapes:count=20000,size=64,seed=1        …of your choice

The nuisances are chosen so that a method must look at the form:

* Place, size, rotation, colour and background vary from image to image, so raw pixels say little about the class.
* Instance discrimination (MoCo, SimCLR) takes whatever tells images apart most cheaply. A background of its own for
  each image would do, and the shape would never be looked at; so would the pair of two colours out of a palette, since
  colour jitter moves both and keeps their relation. So there are two backgrounds, dark grey and light grey, shared by
  all images and all classes, one bit for thousands of images, and on a grey ground one colour stands in relation to
  nothing: jitter takes its hue.
* The crop takes place and size as long as they vary less than it does. So shapes are large, and the small preset of
  moco_v2 crops down to a quarter; with more room an encoder learns to tell places and sizes instead. The rotation stays
  within 25° so that it does not become the cheapest mark of an image itself. What is left is the form.
"""

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

GREYS = (40, 215)  # the two backgrounds
TILT = math.radians(25)  # largest rotation to either side
FINER = 3  # drawn at three times the size, then averaged down: smooth edges


def _ring(radius: float, corners: int, inner: float | None = None, turn: float = 0.0) -> list[tuple[float, float]]:
    """A regular polygon, or a star where every other corner lies at `inner`."""
    count = corners if inner is None else 2 * corners
    radii = [radius if inner is None or i % 2 == 0 else inner for i in range(count)]
    angles = [turn + 2 * math.pi * i / count for i in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles)]


def _heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / 40 for i in range(40)]
    return [
        (math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16)
        for a in angles
    ]


def _crescent() -> list[tuple[float, float]]:
    outer = [(math.cos(a), math.sin(a)) for a in np.linspace(0.7, 2 * math.pi - 0.7, 30)]
    inner = [(0.35 + 0.75 * math.cos(a), 0.75 * math.sin(a)) for a in np.linspace(2 * math.pi - 1.02, 1.02, 30)]
    return outer + inner


# Outlines in units of the shape's radius; the second, where there is one, is a hole.
SHAPES = {
    "disc": (_ring(0.9, 40),),
    "triangle": (_ring(1.0, 3),),
    "square": (_ring(1.0, 4),),
    "star": (_ring(1.0, 5, inner=0.4),),
    "plus": ([(s * x, t * y) for s, t, pts in (
        (1, 1, ((1, 0.3), (0.3, 0.3), (0.3, 1))), (-1, 1, ((0.3, 1), (0.3, 0.3), (1, 0.3))),
        (-1, -1, ((1, 0.3), (0.3, 0.3), (0.3, 1))), (1, -1, ((0.3, 1), (0.3, 0.3), (1, 0.3)))) for x, y in pts],),
    "ring": (_ring(0.95, 40), _ring(0.55, 40)),
    "heart": (_heart(),),
    "crescent": (_crescent(),),
    "arrow": ([(1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3), (-1, -0.3), (0.1, -0.3), (0.1, -0.8)],),
    "bar": ([(1, 0.28), (-1, 0.28), (-1, -0.28), (1, -0.28)],),
}  # fmt: skip


class Shapes:
    shards = None

    def __init__(self, split: str, count: int, size: int, seed: int):
        self._count, self._seed, self._first = count, seed, 2**40 if split == "test" else 0
        self.classes, self.size = list(SHAPES), (size, size)

    def __len__(self) -> int:
        return self._count

    def label(self, index: int) -> int:
        return index % len(SHAPES)

    def name(self, index: int) -> str:
        return f"shapes, image {index}"

    def read(self, index: int) -> np.ndarray:
        random = np.random.Generator(np.random.Philox(key=[self._seed, self._first + index]))
        side = self.size[0] * FINER
        grey = GREYS[random.integers(len(GREYS))]
        canvas = Image.new("RGB", (side, side), (grey, grey, grey))
        colour = tuple(round(255 * value) for value in colorsys.hsv_to_rgb(random.uniform(), 0.75, 0.8))
        radius = side * random.uniform(0.26, 0.42)
        x, y = random.uniform(radius, side - radius, 2)
        turn = random.uniform(-TILT, TILT)
        stencil = Image.new("L", canvas.size)
        draw = ImageDraw.Draw(stencil)
        for outline, fill in zip(SHAPES[self.classes[self.label(index)]], (255, 0)):
            points = (
                radius * np.asarray(outline) @ [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]
            )
            draw.polygon([(x + dx, y + dy) for dx, dy in points], fill=fill)
        canvas.paste(colour, mask=stencil)
        return np.array(canvas.reduce(FINER))


def open_split(argument: str, split: str) -> Shapes:
    settings = {"count": 4096 if split == "train" else 1000, "size": 32, "seed": 0}
    for part in filter(None, argument.split(",")):
        name, _, value = part.partition("=")
        if name not in settings or not value.isdecimal():
            raise ValueError(f"data: shapes takes count=N, size=N and seed=N, got {part!r}")
        if name != "count" or split == "train":  # the size of the test split stays
            settings[name] = int(value)
    if settings["count"] < 1 or settings["size"] < 8:
        raise ValueError(f"data: shapes needs count ≥ 1 and size ≥ 8, got {argument!r}")
    return Shapes(split, **settings)
