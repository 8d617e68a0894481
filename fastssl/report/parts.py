"""What a page is made of: page.html knows how each kind looks, the other modules fill them in."""

from dataclasses import dataclass, field
from typing import Any

SHORT = 60  # characters of a name in a legend or beside a picture


@dataclass
class Picture:
    """A drawing in two inks, as data URIs, and what stands around it."""

    title: str
    alt: str
    light: str  # for a light page
    dark: str
    values: list[tuple[str, str]] = field(default_factory=list)  # (colour or "", number): beside the title
    legend: list[tuple[str, str, str]] = field(default_factory=list)  # (colour, mark, name); mark: disc, diamond, dash
    kind = "picture"


@dataclass
class Tile:
    """One image as a data URI."""

    source: str
    alt: str
    mark: str = ""  # "query" or "other": how it is framed


@dataclass
class Tiles:
    """Rows of images, each with its name before it: [(name, tiles)]."""

    rows: list[tuple[str, list[Tile]]]
    crisp: bool  # few pixels: they are shown as squares
    kind = "tiles"


@dataclass
class Table:
    """Cells are text; numbers stand at the right."""

    head: list[str]
    rows: list[list[str]]
    numbers: set[int] = field(default_factory=set)  # columns
    shares: dict[int, list[float]] = field(default_factory=dict)  # bars 0..1 before the cells of a column
    same: set[int] = field(default_factory=set)  # rows in which the runs agree
    kind = "table"


@dataclass
class Text:
    """A paragraph; `code` is set as what one types, `items` as a list below."""

    text: str = ""
    code: str = ""
    items: list[str] = field(default_factory=list)
    kind = "text"


@dataclass
class Section:
    """A heading, what concerns all runs, and a column for each run: (the run if there are several, its parts)."""

    anchor: str
    title: str
    text: str = ""
    parts: list[Any] = field(default_factory=list)
    columns: list[tuple[Any, list[Any]]] = field(default_factory=list)


def short(name: str, most: int = SHORT) -> str:
    """A name on one line, of `most` characters at most, with what can't be printed shown as an escape."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(name.split()))
    return line if len(line) <= most else line[: most - 1] + "…"
