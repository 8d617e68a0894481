"""Sources of images, opened by name: `NAME:ARGUMENT` on the command line and in `open_source`.

    folder:PATH                  a source of this package: the module `fastssl/data/sources/folder.py`
    folder:PATH::labels=none     the same with an option; several are divided by commas
    package.module:ARGUMENT      your own source: a name with a dot is imported as a Python module

A source module has the function ``open_split(argument, split)``. It gets the text after the colon (empty without one)
and the split, "train" or "test", and returns a `Source`. Your own module must be importable: installed, or in a folder
of PYTHONPATH.
"""

import importlib
import os
import pkgutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

import fastssl.data.sources
from fastssl.text import printable

SPLITS = ("train", "test")
MAX_CLASSES = 1_000_000


class BadImage(Exception):
    """Error of an image that can't be read or decoded, with the text "PATH: reason"."""


class BadSource(ValueError):
    """Error of a source that breaks the contract of `Source`, in one sentence."""


class Source(Protocol):
    """Images by number.

    A source is picklable, and the same number always gives the same image. A class that inherits from `Source` gets its
    `notes`, `identity`, `extras` and `captions`; others with the same attributes are sources too, also without these.
    """

    classes: list[str] | None  # names of the labels; None: no image has a label
    size: tuple[int, int] | None  # (height, width) of every image; None: sizes differ
    shards: np.ndarray | None  # [S + 1] first image of each shard, and the number of images; None: no shards
    notes: tuple[str, ...] = ()  # optional: sentences on how the data was understood and what was passed over

    def __len__(self) -> int:
        """Number of images."""
        ...

    def read(self, index: int) -> np.ndarray:
        """Pixels [H, W, 3], planes [3·H/2, W] (`decoding.py`) or the bytes [N] of an image file.

        They are uint8, writable and only read by others. `decoding.ImageFile` decodes all three.

        Raises:
            BadImage: the image can't be read.
        """
        ...

    def name(self, index: int) -> str:
        """Name of the image in messages, such as its path."""
        ...

    def label(self, index: int) -> int:
        """Class of the image; −1 without a label: the image trains, and evaluations leave it out."""
        ...

    def identity(self, index: int) -> str:
        """What tells the image from all others wherever the data lies, such as its path below the root.

        The held-out split and the fingerprint of a run's data follow it. By default the name of the image.
        """
        return self.name(index)

    def extras(self, index: int) -> dict[str, np.ndarray]:
        """Arrays that belong to the image, such as token ids or a depth map; none by default.

        Keys, shapes and dtypes are the same for every image. Loaders stack them to `Batch.extras`, unchanged: the
        augmentation changes pixels only.

        Raises:
            BadImage: the arrays can't be read; the image is then treated as one that can't be decoded.
        """
        return {}

    def captions(self, index: int) -> tuple[str, ...]:
        """Texts that describe the image, one or several; none by default.

        Blank ones do not count. Methods that learn from images and text train with one of them in each epoch.
        """
        return ()


def read_captions(source: Source, index: int) -> tuple[str, ...]:
    """``source.captions(index)`` without blank ones; () for a source without that method.

    Raises:
        BadSource: the captions are no tuple or list of texts.
    """
    if not hasattr(source, "captions"):
        return ()
    captions = source.captions(index)
    if not isinstance(captions, tuple | list) or not all(isinstance(caption, str) for caption in captions):
        name = printable(source.name(index))
        raise BadSource(
            f"data: captions of an image must be a tuple of texts, got {printable(repr(captions)[:80])} for {name}"
        )
    return tuple(caption for caption in captions if caption.strip())


def has_captions(source: Source) -> bool:
    """True if an image of the source has a caption. Reads captions up to the first one."""
    if getattr(getattr(source, "captions", None), "__func__", None) is Source.captions:
        return False
    return any(read_captions(source, index) for index in range(len(source)))


def read_extras(source: Source, index: int) -> dict[str, np.ndarray]:
    """``source.extras(index)``; an empty dict for a source without that method."""
    return source.extras(index) if hasattr(source, "extras") else {}


def identity(source: Source, index: int) -> str:
    """``source.identity(index)``; the image's name for a source without that method."""
    return source.identity(index) if hasattr(source, "identity") else source.name(index)


class Strings:
    """An immutable list of strings, stored as one array of bytes.

    The reference counts of a million Python strings would make every forked worker copy the memory that holds them.
    """

    def __init__(self, strings: Sequence[str]):
        text = "".join(strings)
        encoded = strings if text.isascii() else [os.fsencode(string) for string in strings]
        self._bytes = np.frombuffer(os.fsencode(text), np.uint8)
        self._ends = np.zeros(len(strings) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, encoded), np.int64, len(strings)), out=self._ends[1:])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


class Subset(Source):
    """Images of a source selected by their numbers, renumbered from 0.

    Args:
        source: the images.
        indices: numbers of the selected ones.
        shards: first of the selected images of each shard, and their number, see `Source.shards`.
    """

    def __init__(self, source: Source, indices: Sequence[int], shards: np.ndarray | None = None):
        self.source, self.indices, self.classes, self.size = source, indices, source.classes, source.size
        self.shards = shards

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> np.ndarray:
        return self.source.read(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def label(self, index: int) -> int:
        return self.source.label(self.indices[index])

    def identity(self, index: int) -> str:
        return identity(self.source, self.indices[index])

    def extras(self, index: int) -> dict[str, np.ndarray]:
        return read_extras(self.source, self.indices[index])

    def captions(self, index: int) -> tuple[str, ...]:
        return read_captions(self.source, self.indices[index])


def source_names() -> list[str]:
    """Names of the sources in this package."""
    return sorted(module.name for module in pkgutil.iter_modules(fastssl.data.sources.__path__))


def cache_folder() -> Path:
    """Folder for cached file lists and downloads: $XDG_CACHE_HOME/fastssl or ~/.cache/fastssl.

    A user without a home folder gets a temporary folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastssl")
    except RuntimeError:
        return Path(tempfile.gettempdir(), f"fastssl-{os.getuid()}")


def expand_user(path: str) -> Path:
    """The path with ~ and ~user replaced by home folders, as in a shell.

    Raises:
        ValueError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"data: {path}: {error}") from error


def class_names(labels: np.ndarray, name: str) -> list[str] | None:
    """Names "0", "1", … of classes that are given by numbers, up to the largest label; None if all are −1.

    Args:
        labels: [N] integers, −1 for an image without a label; at least one.
        name: the source in the error.

    Raises:
        ValueError: a label is below −1, or `MAX_CLASSES` or larger.
    """
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest < -1 or largest >= MAX_CLASSES:
        raise ValueError(
            f"data: {name}: labels must be class numbers from 0 to {MAX_CLASSES - 1:,}, or -1 for no label, got "
            f"{smallest if smallest < -1 else largest}"
        )
    return [str(label) for label in range(largest + 1)] or None


def split_options(argument: str, choices: Mapping[str, Sequence[str] | None], name: str) -> tuple[str, dict[str, str]]:
    """Divides ``PATH::key=value,key=value`` into the path and {key: value}; the options may be missing.

    A path that has ``::`` itself is written with ``::`` behind it.

    Args:
        argument: the text after the source's name and colon.
        choices: the keys that the source knows, each with the values it takes, or None for any text.
        name: the source in errors.

    Raises:
        ValueError: a key or a value is unknown, a key is given twice, or the text is no option.
    """
    path, separator, text = argument.rpartition("::")
    if not separator:
        return argument, {}
    options: dict[str, str] = {}
    for option in text.split(",") if text else ():
        key, _, value = option.partition("=")
        if key not in choices or not value or value not in (choices[key] or (value,)) or key in options:
            known = " and ".join(f"{key}={'|'.join(values or ('VALUE',))}" for key, values in choices.items())
            got = f"{key} twice" if key in options else repr(option)
            raise ValueError(
                f"data: {name} takes the options {known} after ::, got {got} (a path with :: in it ends with ::)"
            )
        options[key] = value
    return path, options


def open_source(spec: str, split: str = "train") -> Source:
    """Opens the source named by `NAME`, `NAME:ARGUMENT` or `package.module:ARGUMENT`.

    Args:
        spec: name and argument of the source, such as folder:PATH.
        split: "train" or "test".

    Raises:
        ValueError: the source does not exist, can't be imported or refuses the argument; one sentence.
    """
    if split not in SPLITS:
        raise ValueError(f"data: split must be {' or '.join(SPLITS)}, got {split!r}")
    name, _, argument = spec.partition(":")
    if name in source_names():
        return importlib.import_module(f"fastssl.data.sources.{name}").open_split(argument, split)
    if "." not in name or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(
            f"data: unknown source {name!r}, there are {', '.join(source_names())} (folder:PATH for your images, "
            f"package.module:ARGUMENT for a source of your own)"
        )
    return _open_module(name, argument, split)


def _open_module(name: str, argument: str, split: str) -> Source:
    """The source of a module outside this package."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"data: the source module {name} can't be imported ({error}): install it, or add its folder to PYTHONPATH"
        ) from error
    if not callable(getattr(module, "open_split", None)):
        raise ValueError(f"data: the source module {name} must have a function open_split(argument, split), got none")
    source = module.open_split(argument, split)
    required = ("classes", "size", "shards", "__len__", "read", "name", "label")
    if missing := [attribute for attribute in required if not hasattr(source, attribute)]:
        raise BadSource(
            f"data: {name}.open_split must return a source, got {type(source).__name__} without {', '.join(missing)}"
        )
    return source
