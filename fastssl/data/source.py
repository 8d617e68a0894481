"""Where images come from. A source is a module of `sources`: `folder:PATH` is opened by `sources/folder.py`.

Each such module has ``open_split(argument, split)``, with split "train" or "test", which returns a `Source`.
"""

import importlib
import os
import pkgutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

import fastssl.data.sources

MOST_CLASSES = 1_000_000


class BadImage(Exception):
    """An image that can't be decoded. Its text is "PATH: reason"."""


class Source(Protocol):
    """Images by number. It must be picklable, and the same number must always give the same image."""

    classes: list[str] | None  # names of the labels, or None where there are none
    size: tuple[int, int] | None  # (height, width) of every image, or None where they differ
    shards: np.ndarray | None  # first image of each file that is best read in a row, and the end; None: any order

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray:
        """uint8, writable: pixels [H, W, 3], or the bytes [N] of a file, which `decoding.Opened` turns into pixels.

        Raises:
            BadImage: it can't be read.
        """

    def name(self, index: int) -> str:
        """What a user would look for: a path."""

    def label(self, index: int) -> int:
        """The class of the image, or −1 where the source has no labels."""


class Strings:
    """A list of strings as one run of bytes: of a million Python strings, whose references are counted where they lie,
    every worker would come to own a copy."""

    def __init__(self, strings: Sequence[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._bytes, self._ends = np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


class Subset:
    """Some images of a source, as a source."""

    shards = None

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices, self.classes, self.size = source, indices, source.classes, source.size

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> np.ndarray:
        return self.source.read(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def label(self, index: int) -> int:
        return self.source.label(self.indices[index])


def names() -> list[str]:
    """The sources there are."""
    return sorted(module.name for module in pkgutil.iter_modules(fastssl.data.sources.__path__))


def cache_folder() -> Path:
    """Where a source may keep what took long to find out: $XDG_CACHE_HOME/fastssl or ~/.cache/fastssl; a temporary
    folder for those who have no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastssl")
    except RuntimeError:
        return Path(tempfile.gettempdir(), f"fastssl-{os.getuid()}")


def expanded(path: str) -> Path:
    """With ~ and ~user as a shell has them."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"data: {path}: {error}") from error


def numbered(labels: np.ndarray, what: str) -> list[str]:
    """Names of classes that are numbers: "0", "1", … up to the largest label."""
    if (most := int(labels.max())) >= MOST_CLASSES:
        raise ValueError(f"data: {what}: labels must be numbers of classes below {MOST_CLASSES:,}, got {most}")
    return [str(label) for label in range(most + 1)]


def open_source(spec: str, split: str = "train") -> Source:
    """Opens `NAME` or `NAME:ARGUMENT`; what the argument means is the source's own business.

    Raises:
        ValueError: there is no source of that name, or it refuses the argument; one sentence.
    """
    name, _, argument = spec.partition(":")
    if name not in names():
        raise ValueError(f"data: unknown source {name!r}, there are {', '.join(names())} (folder:PATH for your images)")
    return importlib.import_module(f"fastssl.data.sources.{name}").open_split(argument, split)
