"""Parts of a page; page.html defines the layout of each kind."""

from dataclasses import dataclass, field
from typing import Any

SHORT = 60  # largest number of characters of a name in a legend or beside a picture


@dataclass
class Picture:
    """A drawing for light and dark pages, as data URIs, with title and legend."""

    title: str
    alt: str
    light: str  # for a light page
    dark: str
    values: list[tuple[str, str]] = field(default_factory=list)  # (colour or "", number) beside the title
    legend: list[tuple[str, str, str]] = field(default_factory=list)  # (colour, class of the mark in page.html, name)
    kind = "picture"


@dataclass
class Tile:
    """One image as a data URI."""

    source: str
    alt: str
    mark: str = ""  # "query" or "other": its frame


@dataclass
class Tiles:
    """Rows of images with the name of each row."""

    rows: list[tuple[str, list[Tile]]]
    crisp: bool  # show pixels as squares
    stacked: bool = False  # names above the images
    kind = "tiles"


@dataclass
class Answers:
    """Images, each beside the texts that were found for it, with marks."""

    rows: list[tuple[Tile, list[tuple[str, bool]]]]  # (image, [(text, whether it is right)])
    crisp: bool  # show pixels as squares
    kind = "answers"


@dataclass
class Table:
    """A table of text; numbers are aligned right."""

    head: list[str]
    rows: list[list[str]]
    numbers: set[int] = field(default_factory=set)  # columns of numbers
    shares: dict[int, list[float]] = field(default_factory=dict)  # column: lengths 0..1 of bars before its cells
    same: set[int] = field(default_factory=set)  # rows in which all runs are equal
    kind = "table"


@dataclass
class Text:
    """A paragraph, with `code` in a monospaced font and `items` as a list below."""

    text: str = ""
    code: str = ""
    items: list[str] = field(default_factory=list)
    kind = "text"


@dataclass
class Section:
    """A heading, parts for all runs together, and a column (run or None, parts) for each run."""

    anchor: str
    title: str
    text: str = ""
    parts: list[Any] = field(default_factory=list)
    columns: list[tuple[Any, list[Any]]] = field(default_factory=list)


def short(name: str, most: int = SHORT) -> str:
    """A name on one line of at most `most` characters, unprintable ones as escapes."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(name.split()))
    return line if len(line) <= most else line[: most - 1] + "…"
