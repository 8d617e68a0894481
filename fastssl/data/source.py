"""Where images come from. A source is a module of this folder: `folder:PATH` is opened by `data/folder.py`.

Each such module has ``open_split(argument, split)``, with split "train" or "test", which returns a `Source`.
"""

import importlib
import pkgutil
from typing import Protocol

from PIL import Image

import fastssl.data

NOT_SOURCES = {"loader", "recipe", "source", "torchvision"}


class BadImage(Exception):
    """An image that can't be decoded. Its text is "PATH: reason"."""


class Source(Protocol):
    """Images by number. It must be picklable, and the same number must always give the same image."""

    classes: list[str] | None  # names of the labels, or None where there are none
    size: tuple[int, int] | None  # (height, width) of every image, or None where they differ

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """RGB. Raises `BadImage` where it can't be decoded."""

    def label(self, index: int) -> int:
        """The class of the image, or −1 where the source has no labels."""


def names() -> list[str]:
    """The sources there are."""
    return sorted(m.name for m in pkgutil.iter_modules(fastssl.data.__path__) if m.name not in NOT_SOURCES)


def open_source(spec: str, split: str = "train") -> Source:
    """Opens `NAME` or `NAME:ARGUMENT`; what the argument means is the source's own business.

    Raises:
        ValueError: there is no source of that name, or it refuses the argument; one sentence.
    """
    name, _, argument = spec.partition(":")
    if name not in names():
        raise ValueError(f"data: unknown source {name!r}, there are {', '.join(names())} (folder:PATH for your images)")
    return importlib.import_module(f"fastssl.data.{name}").open_split(argument, split)
