"""Drawings and images as data URIs, so that a page is one file."""

import base64
import io
from collections.abc import Callable, Iterable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from .parts import Picture, Tile, Tiles

matplotlib.use("agg")  # without a window system

COLOURS = ("#3b7dd8", "#e07b39", "#2f9e6e", "#c9485b", "#8a63d2", "#b08d1e", "#1f9bb0", "#d162a4", "#6f8f2f", "#8d6e63")
GREY = "#8a919c"  # colour of comparisons; all colours are visible on light and on dark pages
INKS = {"light": ("#4a525c", "#d9dce1"), "dark": ("#b3bac4", "#3a4149")}  # (text, grid)
WIDTH = 3.4  # inches of a drawing, one column on a phone
LARGEST = 112  # pixels of the longer side of a tile on the page
CRISP = 64  # pixels of the longer side up to which a tile is lossless and its pixels are shown as squares


def draw(title: str, alt: str, plot: Callable[[Axes], None], height: float = 2.0, **texts) -> Picture:
    """A drawing of one pair of axes by `plot(axes)`, for light and for dark pages.

    Args:
        title, alt, texts: fields of the `Picture`. They are text of the page; the axes have no text from outside, and
            nothing is parsed as a formula.
        plot: draws on the axes.
        height: inches.
    """
    light = dark = _svg(plot, height, *INKS["light"])
    for old, new in zip(INKS["light"], INKS["dark"]):
        dark = dark.replace(old, new)
    return Picture(title, alt, *(_uri("image/svg+xml", svg.encode()) for svg in (light, dark)), **texts)


def _svg(plot: Callable[[Axes], None], height: float, ink: str, line: str) -> str:
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
        plot(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, dpi=200, metadata={"Date": None, "Creator": None})
    return buffer.getvalue().replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")  # the font of the page


def tiles(rows: Iterable[tuple[str, np.ndarray, list[str]]]) -> Tiles:
    """Tiles of rows (name, images uint8 [N, H, W, 3], description of each image)."""
    tiled = [
        (name, [tile(image, alt) for image, alt in zip(images, alts)], max(images.shape[1:3]))
        for name, images, alts in rows
    ]
    return Tiles([row[:2] for row in tiled], crisp=all(side <= CRISP for *_, side in tiled))


def tile(image: np.ndarray, alt: str, mark: str = "") -> Tile:
    """A tile of an image uint8 [H, W, 3]: lossless for small images, else a JPEG of the size on the page."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    if max(picture.size) <= CRISP:
        picture.save(buffer, "PNG", optimize=True)
        return Tile(_uri("image/png", buffer.getvalue()), alt, mark)
    picture.thumbnail((LARGEST, LARGEST))
    picture.save(buffer, "JPEG", quality=80)
    return Tile(_uri("image/jpeg", buffer.getvalue()), alt, mark)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
