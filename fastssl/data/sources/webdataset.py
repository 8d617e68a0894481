"""`webdataset:SHARDS`: images in tar files, with a label or without, in the layout of the webdataset project.

    webdataset:PATH                          all *.tar of a folder
    webdataset:PATH/train-{000..146}.tar     brace ranges and lists: {000..146}, {a,b}
    webdataset:https://…/{000..146}.tar      fetched once, into ~/.cache/fastssl (or $XDG_CACHE_HOME)

A sample is what shares a name up to its first dot: `n01/7.jpg` and `n01/7.cls`, whose text is the number of the class.
In a folder, shards with `train` in their names and others with `val` or `test` are a split; else every fifth image is
the test split, where there are labels. The place of each image in its shard is remembered, so any can be read at once,
and an epoch goes on in its middle without reading what lies before. It takes the shards in a random order and shuffles
their images in a buffer, so the files are still read nearly from start to end.
"""

import hashlib
import itertools
import os
import re
import shutil
import tarfile
import urllib.request
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..source import MOST_CLASSES, BadImage, Strings, cache_folder, expanded, numbered
from .folder import SUFFIXES

SPLIT = "(?<![a-z])(train|validation|val|test)(?![a-z])"  # in a shard's name
TIMEOUT = 60  # seconds without a byte


class _Shard(NamedTuple):
    offsets: np.ndarray  # [N] int64, of the images, in bytes
    sizes: np.ndarray  # [N] int64
    labels: np.ndarray  # [N] int64, −1 where there is none
    names: np.ndarray  # [N] str


class WebDataset:
    size = None

    def __init__(self, paths: list[Path], shards: list[_Shard], keep: slice | None, drop: slice | None):
        """`keep`, `drop`: which images of all belong to this split; None for all and none."""
        columns = [np.concatenate(column) for column in zip(*shards)]
        file = np.repeat(np.arange(len(shards)), [len(shard.offsets) for shard in shards])
        rows = np.arange(len(file))
        rows = rows[keep] if keep else np.delete(rows, drop) if drop else rows
        offsets, sizes, labels, names = (column[rows] for column in columns)
        self._paths, self._names = [str(path) for path in paths], Strings(names.tolist())
        self._file, self._offsets, self._sizes, self._labels = file[rows], offsets, sizes, labels
        self.shards = np.concatenate([[0], np.cumsum(np.bincount(self._file, minlength=len(shards)))])
        labelled = (columns[2] >= 0).all()
        self.classes = numbered(columns[2], self._paths[0]) if labelled else None

    def __len__(self) -> int:
        return len(self._offsets)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def name(self, index: int) -> str:
        return f"{self._paths[self._file[index]]}: {self._names[index]}"

    def read(self, index: int) -> np.ndarray:
        path, size = self._paths[self._file[index]], int(self._sizes[index])
        try:
            data = np.fromfile(path, np.uint8, count=size, offset=int(self._offsets[index]))
        except OSError as error:
            raise BadImage(f"{self.name(index)}: {error.strerror or error}") from error
        if len(data) < size:
            raise BadImage(f"{self.name(index)}: the shard ends before the image does")
        return data


def open_split(argument: str, split: str) -> WebDataset:
    if not argument:
        raise ValueError("data: webdataset needs shards: webdataset:PATH or webdataset:PATH/train-{000..146}.tar")
    names, owned = _named(argument, split)
    paths = [_local(name) for name in names]
    shards = [_index(path) for path in paths]
    if not sum(len(shard.offsets) for shard in shards):
        raise ValueError(f"data: no image in {argument} ({', '.join(SUFFIXES)})")
    if owned:
        return WebDataset(paths, shards, None, None)
    if split == "test" and sum(len(shard.offsets) for shard in shards) < 5:
        raise ValueError(f"data: {argument} has fewer than 5 images, of which every fifth is the test split")
    every_fifth = slice(4, None, 5)
    labelled = all((shard.labels >= 0).all() for shard in shards)
    return WebDataset(paths, shards, every_fifth if split == "test" else None, every_fifth if labelled else None)


def _named(argument: str, split: str) -> tuple[list[str], bool]:
    """The shards' names, and whether they are this split's own."""
    folder = expanded(argument.removeprefix("file:"))
    if not folder.is_dir():
        return _expanded(argument), False
    names = sorted(str(path) for path in folder.glob("*.tar"))
    if not names:
        raise ValueError(f"data: {folder} holds no *.tar")
    said = {name: re.search(SPLIT, Path(name).name.lower()) for name in names}
    train = [name for name in names if said[name] and said[name][0] == "train"]
    test = [name for name in names if said[name] and said[name][0] != "train"]
    if not (train and test):
        return names, False
    if others := [name for name in names if not said[name]]:
        raise ValueError(f"data: {others[0]} is of neither split, beside train and test: name shards by a pattern")
    return (train if split == "train" else test), True


def _expanded(pattern: str) -> list[str]:
    """`a-{08..10}.tar` → a-08.tar, a-09.tar, a-10.tar; `{x,y}` → x, y; as a shell does."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if i % 2 == 0 else _choices(part) for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(text: str) -> list[str]:
    if found := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        first, last = found.groups()
        return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return text.split(",")


def _local(name: str) -> Path:
    """The file itself, or a copy of what an address names."""
    if not re.match("https?://", name):
        path = expanded(name.removeprefix("file:"))
        if not path.is_file():
            raise ValueError(f"data: {path} does not exist")
        return path
    kept = cache_folder() / hashlib.sha256(name.encode()).hexdigest()[:24] / name.rpartition("/")[2]
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        try:
            with urllib.request.urlopen(name, timeout=TIMEOUT) as there, partial.open("wb") as here:
                shutil.copyfileobj(there, here)
                announced, came = there.headers.get("Content-Length"), here.tell()
            if announced is not None and came != int(announced):
                raise ValueError(f"data: {name} ended after {came:,} of {int(announced):,} bytes: try again")
            partial.replace(kept)
        finally:
            partial.unlink(missing_ok=True)
    return kept


def _index(path: Path) -> _Shard:
    """Where the images of a shard lie: read once, then remembered as long as its size and time stay."""
    found = path.stat()
    name = f"{path.resolve()} {found.st_size} {found.st_mtime_ns}"
    cache = cache_folder() / f"shard-{hashlib.sha256(name.encode()).hexdigest()[:24]}.npz"
    try:
        with np.load(cache, allow_pickle=False) as known:
            return _Shard(*(known[field] for field in _Shard._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none yet, or damaged
        pass
    shard = _scanned(path)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, **shard._asdict())
        partial.replace(cache)
    except OSError:  # no room or no right: it is read again next time
        pass
    return shard


def _scanned(path: Path) -> _Shard:
    places: dict[str, tuple[int, int]] = {}  # of all members: a hard link has that of its target
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    passed_over = 0
    try:
        with tarfile.open(path, "r:") as tar:  # uncompressed alone: only there an image has a place
            for member in tar:
                places[member.name] = (
                    places.get(member.linkname, (0, 0)) if member.islnk() else (member.offset_data, member.size)
                )
                folder, _, base = member.name.rpartition("/")
                key, _, extension = base.partition(".")
                extension, sample = extension.lower(), f"{folder}/{key}"
                if not (member.isfile() or member.islnk()) or not key:
                    continue
                if extension == "cls":
                    labels[sample] = _label(tar.extractfile(member).read(), path, member.name)
                elif f".{extension}" in SUFFIXES and sample not in images:
                    images[sample] = *places[member.name], member.name
                else:
                    passed_over += extension.endswith(SUFFIXES) or f".{extension}" in SUFFIXES
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            whole = file.read(512) == bytes(512)
    except tarfile.TarError as error:
        raise ValueError(f"data: {path} is no tar file, is compressed or cut short ({error})") from error
    if not whole:
        raise ValueError(f"data: {path} is damaged or cut short at byte {end:,}")
    if passed_over:
        rule = "a sample, all that has the same name up to its first dot, has one"
        warnings.warn(f"{path}: {passed_over} images are passed over: {rule}", stacklevel=2)
    offsets, sizes, names = zip(*images.values()) if images else ((), (), ())
    numbers = [np.array(column, dtype=np.int64) for column in (offsets, sizes, [labels.get(key, -1) for key in images])]
    return _Shard(*numbers, np.array(names, dtype=str))


def _label(text: bytes, path: Path, member: str) -> int:
    try:
        label = int(text)
    except ValueError as error:
        raise ValueError(f"data: {path}: {member} must hold the number of a class ({error})") from error
    if not 0 <= label < MOST_CLASSES:
        raise ValueError(f"data: {path}: {member} must hold the number of a class below {MOST_CLASSES:,}, got {label}")
    return label
