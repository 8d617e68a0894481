"""`webdataset:SHARDS`: images in tar files, with or without labels, in the layout of the webdataset project.

    webdataset:PATH                          every *.tar of a folder
    webdataset:PATH/train-{000..146}.tar     brace ranges and lists: {000..146}, {a,b}
    webdataset:https://…/{000..146}.tar      downloaded once to ~/.cache/fastssl (or $XDG_CACHE_HOME)

A sample is all files with the same name up to the first dot: `n01/7.jpg`, and `n01/7.cls` with the number of the class.
A sample without it, or with −1, has no label: its image trains, and evaluations leave it out. In a folder, shards whose
names have the word `train` and shards with `test`, `val` or another name of `split.TEST_NAMES` are the splits; else a
fifth of each class is held out, see `split.hold_out`. The position of each image in its shard is cached, so any
image can be read directly, and a run resumes in the middle of an epoch without reading the images before. An epoch
takes the shards in random order and shuffles their images in a buffer, so files are read almost from start to end.
"""

import hashlib
import itertools
import re
import shutil
import tarfile
import urllib.request
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastssl.files import write_atomically

from ..source import MAX_CLASSES, BadImage, Source, Strings, cache_folder, class_names, expand_user
from ..split import TEST_NAMES, TRAIN_NAMES, describe_labels, hold_out
from .folder import SUFFIXES

SPLIT = f"(?<![a-z])({'|'.join((*TRAIN_NAMES, *TEST_NAMES))})(?![a-z])"  # word in a shard's name that tells its split
TIMEOUT = 60  # seconds to wait for data from a server


class _Shard(NamedTuple):
    """Index of the images in a tar file, or in several."""

    offsets: np.ndarray  # [N] int64, position of the image in its file, bytes
    sizes: np.ndarray  # [N] int64, bytes
    labels: np.ndarray  # [N] int64, −1 without a label
    names: np.ndarray  # [N] str


class WebDataset(Source):
    """Images in tar files.

    Args:
        paths: the tar files.
        files: [N] number of the file of each image, ascending.
        images: index of all images [N] of these files.
        rows: [M] numbers of the images in this split, ascending.
    """

    def __init__(self, paths: list[Path], files: np.ndarray, images: _Shard, rows: np.ndarray):
        self._paths, self._names = [str(path) for path in paths], Strings(images.names[rows].tolist())
        self._files, self._labels = files[rows], images.labels[rows]
        self._offsets, self._sizes = images.offsets[rows], images.sizes[rows]
        self.classes = class_names(images.labels, self._paths[0])
        self.size = None
        self.shards = np.concatenate([[0], np.cumsum(np.bincount(self._files, minlength=len(paths)))])

    def __len__(self) -> int:
        return len(self._offsets)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def name(self, index: int) -> str:
        return f"{self._paths[self._files[index]]}: {self._names[index]}"

    def identity(self, index: int) -> str:
        return _identity(Path(self._paths[self._files[index]]), self._names[index])

    def read(self, index: int) -> np.ndarray:
        path, size = self._paths[self._files[index]], int(self._sizes[index])
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
    names, is_split = _shard_names(argument, split)
    paths = [_local_path(name) for name in names]
    shards = [_index(path) for path in paths]
    files = np.repeat(np.arange(len(shards)), [len(shard.offsets) for shard in shards])
    if not len(files):
        raise ValueError(f"data: no image in {argument} ({', '.join(SUFFIXES)})")
    images = _Shard(*(np.concatenate(column) for column in zip(*shards)))
    identities = (_identity(paths[file], name) for file, name in zip(files.tolist(), images.names.tolist()))
    rows = np.arange(len(files)) if is_split else hold_out(identities, images.labels, split, argument)
    source = WebDataset(paths, files, images, rows)
    source.notes += describe_labels(images.labels, source.classes, held_out=not is_split)
    return source


def _identity(shard: Path, member: str) -> str:
    """The shard's name and the sample: the same in any folder, and for whichever image of a sample is taken."""
    folder, _, base = member.rpartition("/")
    return f"{shard.name}: {folder}/{base.partition('.')[0]}"


def _shard_names(argument: str, split: str) -> tuple[list[str], bool]:
    """(paths or addresses of the shards, True if they are the requested split)."""
    folder = expand_user(argument.removeprefix("file:"))
    if not folder.is_dir():
        return _expand_braces(argument), False
    names = sorted(str(path) for path in folder.glob("*.tar"))
    if not names:
        raise ValueError(f"data: {folder} holds no *.tar")
    words = {name: re.findall(SPLIT, Path(name).name.lower())[:1] for name in names}
    train = [name for name in names if words[name] and words[name][0] in TRAIN_NAMES]
    test = [name for name in names if words[name] and words[name][0] in TEST_NAMES]
    unnamed = [name for name in names if not words[name]]
    if not (train and test) and not ((train or test) and unnamed):
        return names, False
    if unnamed:
        raise ValueError(f"data: {unnamed[0]} is neither named train nor test, as other shards are: use a pattern")
    return (train if split == "train" else test), True


def _expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}.tar` → a-08.tar, a-09.tar, a-10.tar; `{x,y}` → x, y; as a shell does."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if i % 2 == 0 else _choices(part) for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(text: str) -> list[str]:
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        first, last = match.groups()
        return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return text.split(",")


def _local_path(name: str) -> Path:
    """The path of a local file, or of the copy of a remote one, which is downloaded once."""
    if not re.match("https?://", name):
        path = expand_user(name.removeprefix("file:"))
        if not path.is_file():
            raise ValueError(f"data: {path} does not exist")
        return path
    copy = cache_folder() / hashlib.sha256(name.encode()).hexdigest()[:24] / name.rpartition("/")[2]
    if not copy.is_file():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(name, timeout=TIMEOUT) as response, write_atomically(copy, "wb") as file:
            shutil.copyfileobj(response, file)
            expected, received = response.headers.get("Content-Length"), file.tell()
            if expected is not None and received != int(expected):
                raise ValueError(f"data: {name} ended after {received:,} of {int(expected):,} bytes: try again")
    return copy


def _index(path: Path) -> _Shard:
    """Index of a shard's images, cached until the size or the modification time of the file changes."""
    stat = path.stat()
    name = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    cache = cache_folder() / f"shard-{hashlib.sha256(name.encode()).hexdigest()[:24]}.npz"
    try:
        with np.load(cache, allow_pickle=False) as arrays:
            return _Shard(*(arrays[field] for field in _Shard._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # no cache yet, or it is damaged
        pass
    shard = _scan(path)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(cache, "wb") as file:
            np.savez(file, **shard._asdict())
    except OSError:  # no space or no permission: the next call scans again
        pass
    return shard


def _scan(path: Path) -> _Shard:
    positions: dict[str, tuple[int, int]] = {}  # (offset, size) of each member; a hard link has those of its target
    images: dict[str, tuple[int, int, str]] = {}  # by sample
    labels: dict[str, int] = {}  # by sample
    ignored = 0
    try:
        with tarfile.open(path, "r:") as tar:  # without compression, so that members have positions in the file
            for member in tar:
                if member.islnk():
                    positions[member.name] = positions.get(member.linkname, (0, 0))
                else:
                    positions[member.name] = (member.offset_data, member.size)
                folder, _, base = member.name.rpartition("/")
                key, _, extension = base.partition(".")
                extension, sample = extension.lower(), f"{folder}/{key}"
                if not (member.isfile() or member.islnk()) or not key:
                    continue
                if extension == "cls":
                    labels[sample] = _parse_label(tar, member, path)
                elif f".{extension}" in SUFFIXES and sample not in images:
                    images[sample] = (*positions[member.name], member.name)
                else:
                    ignored += extension.endswith(SUFFIXES) or f".{extension}" in SUFFIXES
            end = tar.offset
        with path.open("rb") as opened:
            opened.seek(end)
            complete = opened.read(512) == bytes(512)
    except tarfile.TarError as error:
        raise ValueError(f"data: {path} is no tar file, or is compressed or truncated ({error})") from error
    if not complete:
        raise ValueError(f"data: {path} is damaged or truncated at byte {end:,}")
    if ignored:
        rule = "a sample, all files with the same name up to the first dot, has one image"
        warnings.warn(f"{path}: {ignored} images are ignored: {rule}", stacklevel=2)
    offsets, sizes, names = zip(*images.values()) if images else ((), (), ())
    return _Shard(
        np.array(offsets, dtype=np.int64),
        np.array(sizes, dtype=np.int64),
        np.array([labels.get(sample, -1) for sample in images], dtype=np.int64),
        np.array(names, dtype=str),
    )


def _parse_label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    content = tar.extractfile(member)
    text = b"" if content is None else content.read()
    try:
        label = int(text)
    except ValueError as error:
        raise ValueError(f"data: {path}: {member.name} must hold the number of a class ({error})") from error
    if not -1 <= label < MAX_CLASSES:
        raise ValueError(
            f"data: {path}: {member.name} must hold the number of a class below {MAX_CLASSES:,}, or -1 for no label, "
            f"got {label}"
        )
    return label
