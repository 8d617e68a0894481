"""Drawings and images as data URIs: nothing of a page lies outside its file."""

import base64
import io
from collections.abc import Callable, Iterable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from .parts import Picture, Tile, Tiles

matplotlib.use("agg")  # no window system needed

COLOURS = ("#3b7dd8", "#e07b39", "#2f9e6e", "#c9485b", "#8a63d2", "#b08d1e", "#1f9bb0", "#d162a4", "#6f8f2f", "#8d6e63")
GREY = "#8a919c"  # of what is there for comparison; it and the colours can be seen on light and on dark
INKS = {"light": ("#4a525c", "#d9dce1"), "dark": ("#b3bac4", "#3a4149")}  # text, grid
WIDTH = 3.4  # inches of a drawing; one column on a phone, where the text must still be read
LARGEST = 112  # pixels of a side of a tile: what a page shows is no larger
CRISP = 64  # pixels of a side up to which a tile is shown as squares, and kept as it is


def draw(title: str, alt: str, onto: Callable[[Axes], None], height: float = 2.0, **around) -> Picture:
    """A drawing of one pair of axes, made by `onto(axes)`, in either ink.

    Args:
        title, alt, around: of the `Picture`. They are text of the page; on the axes themselves stands nothing that
            came from outside, and nothing is read as a formula.
        height: inches.
    """
    light = dark = _svg(onto, height, *INKS["light"])
    for old, new in zip(INKS["light"], INKS["dark"]):
        dark = dark.replace(old, new)
    return Picture(title, alt, *(_uri("image/svg+xml", svg.encode()) for svg in (light, dark)), **around)


def _svg(onto: Callable[[Axes], None], height: float, ink: str, line: str) -> str:
    style = {
        "font.size": 8,
        "axes.labelsize": 8,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "text.parse_math": False,
        "text.color": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.edgecolor": line,
        "axes.grid": True,
        "grid.color": line,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "svg.fonttype": "none",
        "svg.hashsalt": "fastssl",
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        onto(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, dpi=200, metadata={"Date": None, "Creator": None})
    return buffer.getvalue().replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")  # the font of the page around it


def tiles(rows: Iterable[tuple[str, np.ndarray, list[str]]]) -> Tiles:
    """Rows of images: (name, uint8 [N, H, W, 3], what each image shows)."""
    made = [
        (name, [tile(image, alt) for image, alt in zip(images, alts)], max(images.shape[1:3]))
        for name, images, alts in rows
    ]
    return Tiles([row[:2] for row in made], crisp=all(side <= CRISP for *_, side in made))


def tile(image: np.ndarray, alt: str, mark: str = "") -> Tile:
    """An image, uint8 [H, W, 3]: small ones exactly, of larger ones a JPEG no larger than what is shown."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    if max(picture.size) <= CRISP:
        picture.save(buffer, "PNG", optimize=True)
        return Tile(_uri("image/png", buffer.getvalue()), alt, mark)
    picture.thumbnail((LARGEST, LARGEST))
    picture.save(buffer, "JPEG", quality=80)
    return Tile(_uri("image/jpeg", buffer.getvalue()), alt, mark)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
