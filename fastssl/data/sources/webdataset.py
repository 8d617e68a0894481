"""`webdataset:SHARDS`: images in tar files, with or without labels, in the layout of the webdataset project.

    webdataset:PATH                          every *.tar of a folder
    webdataset:PATH/train-{000..146}.tar     brace ranges and lists: {000..146}, {a,b}
    webdataset:https://…/{000..146}.tar      downloaded once to ~/.cache/fastssl (or $XDG_CACHE_HOME)
    webdataset:PATH::image_key=left.jpg      the image of each sample, if it has several

A sample is all files with the same name up to the first dot: `n01/7.jpg`, and `n01/7.cls` with the number of the class.
Of several images the one without a further dot is taken, `7.jpg` before `7.left.jpg`, else the first by name.
Its captions are the text of `7.txt`, or the text or texts under "caption" or "captions" in `7.json`.
A sample without `7.cls`, or with −1, has no label: its image trains, and evaluations leave it out. In a folder, shards
whose names have the word `train` and shards with `test`, `val` or another name of `split.TEST_NAMES` are the splits;
else a fifth of each class is held out, or of all images if there are captions and no labels, see `split.hold_out`. The
position of each image in its shard is cached, so any image can be read directly, and a run resumes in the middle of an
epoch without reading the images before. An epoch takes the shards in random order and shuffles their images in a
buffer, so files are read almost from start to end.
"""

import hashlib
import http.client
import io
import itertools
import json
import math
import os
import re
import shutil
import tarfile
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastssl.files import write_atomically
from fastssl.text import printable

from ..captioned import decode_text, describe_dropped, usable_captions
from ..formats import SUFFIXES
from ..numpy_files import Npz
from ..reading import open_regular, read_image_file
from ..source import MAX_CLASSES, BadImage, Source, Strings, cache_folder, class_names, expand_user, split_options
from ..split import TEST_NAMES, TRAIN_NAMES, describe_labels, hold_out

SPLIT = f"(?<![a-z])({'|'.join((*TRAIN_NAMES, *TEST_NAMES))})(?![a-z])"  # word in a shard's name that tells its split
TIMEOUT = 60  # seconds to wait for data from a server
MAX_SHARDS = 1_000_000  # of a pattern
MAX_HEADER, MAX_LABEL = 2**20, 64  # bytes of a tar header with a long name, and of a label
CAPTIONS, MAX_TEXT = ("txt", "json"), 2**20  # extensions of captions; bytes of a longer file, which is passed over


class _Shard(NamedTuple):
    """Index of the images in a tar file, or in several."""

    offsets: np.ndarray  # [N] int64, position of the image in its file, bytes
    sizes: np.ndarray  # [N] int64, bytes
    labels: np.ndarray  # [N] int64, −1 without a label
    names: np.ndarray  # [N] str, as objects: a long name must not lengthen all others
    captions: np.ndarray  # [N] str, a JSON list of the captions of each image, "" for none
    taken: np.ndarray  # [K] str, extension and number of the images, such as "jpg 1000"
    passed: np.ndarray  # [L] str, the same of the members that are passed over
    dropped: np.ndarray  # [M] str, reason and number of the captions that can't be used, such as "blank 3"


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
        self._captions = Strings(images.captions[rows].tolist())
        self._offsets, self._sizes = images.offsets[rows], images.sizes[rows]
        self.classes = class_names(images.labels, self._paths[0])
        self.size = None
        self.shards = np.concatenate([[0], np.cumsum(np.bincount(self._files, minlength=len(paths)))])
        self.notes = (*_describe_members(images), *describe_dropped(_count(images.dropped)))

    def __len__(self) -> int:
        return len(self._offsets)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def name(self, index: int) -> str:
        return f"{self._paths[self._files[index]]}: {self._names[index]}"

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(json.loads(self._captions[index] or "[]"))

    def identity(self, index: int) -> str:
        return _identity(Path(self._paths[self._files[index]]), self._names[index])

    def read(self, index: int) -> np.ndarray:
        path, size = self._paths[self._files[index]], int(self._sizes[index])
        try:
            data = read_image_file(path, int(self._offsets[index]), size)
        except OSError as error:
            raise BadImage(f"{printable(self.name(index))}: {error.strerror or error}") from error
        if len(data) < size:
            raise BadImage(f"{printable(self.name(index))}: the shard ends before the image does")
        return data


def open_split(argument: str, split: str) -> WebDataset:
    if not argument:
        raise ValueError("data: webdataset needs shards: webdataset:PATH or webdataset:PATH/train-{000..146}.tar")
    pattern, options = split_options(argument, {"image_key": None}, "webdataset")
    names, is_split = _shard_names(pattern, split)
    paths = [_local_path(name) for name in names]
    shards = [_index(path, options.get("image_key", "").lower()) for path in paths]
    files = np.repeat(np.arange(len(shards)), [len(shard.offsets) for shard in shards])
    if not len(files):
        raise ValueError(_describe_lack(pattern, options.get("image_key"), shards))
    images = _Shard(*(np.concatenate(column) for column in zip(*shards)))
    identities = (_identity(paths[file], name) for file, name in zip(files.tolist(), images.names.tolist()))
    labelled, captioned = bool((images.labels >= 0).any()), any(images.captions)
    labels = images.labels if labelled or not captioned else np.zeros(len(files), np.int64)
    rows = np.arange(len(files)) if is_split else hold_out(identities, labels, split, argument)
    source = WebDataset(paths, files, images, rows)
    if labelled or not captioned:
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
        return list(_expand_braces(argument)), False
    names = sorted(str(path) for path in folder.glob("*.tar"))
    if not names:
        raise ValueError(f"data: {printable(folder)} holds no *.tar")
    words = {name: re.findall(SPLIT, Path(name).name.lower())[:1] for name in names}
    train = [name for name in names if words[name] and words[name][0] in TRAIN_NAMES]
    test = [name for name in names if words[name] and words[name][0] in TEST_NAMES]
    unnamed = [name for name in names if not words[name]]
    if not (train and test) and not ((train or test) and unnamed):
        return names, False
    if unnamed:
        raise ValueError(f"data: {unnamed[0]} is neither named train nor test, as other shards are: use a pattern")
    return (train if split == "train" else test), True


def _expand_braces(pattern: str) -> Iterator[str]:
    """`a-{08..10}.tar` → a-08.tar, a-09.tar, a-10.tar; `{x,y}` → x, y; as a shell does."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if i % 2 == 0 else _choices(part) for i, part in enumerate(parts)]
    if (count := math.prod(map(_length, choices))) > MAX_SHARDS:
        raise ValueError(f"data: {printable(pattern)} must be at most {MAX_SHARDS:,} shards, got {count:.3g}")
    numbers = (map(choice.text, choice.range) if isinstance(choice, _Numbers) else choice for choice in choices)
    return map("".join, itertools.product(*numbers))


class _Numbers(NamedTuple):
    """Numbers in a pattern, such as 000..146."""

    range: range
    digits: int

    def text(self, number: int) -> str:
        return str(number).zfill(self.digits)


def _length(choices: "list[str] | _Numbers") -> int:
    if isinstance(choices, list):
        return len(choices)
    return (choices.range.stop - choices.range.start) // choices.range.step  # len() is limited to an int64


def _choices(text: str) -> "list[str] | _Numbers":
    if match := re.fullmatch(r"(\d{1,40})\.\.(\d{1,40})", text):
        first, last = map(int, match.groups())
        step = 1 if first <= last else -1
        return _Numbers(range(first, last + step, step), len(match[1]))
    return text.split(",")


def _local_path(name: str) -> Path:
    """The path of a local file, or of the copy of a remote one, which is downloaded once."""
    if not re.match("https?://", name):
        path = expand_user(name.removeprefix("file:"))
        if not path.is_file():
            raise ValueError(f"data: {printable(path)} {'is no file' if path.exists() else 'does not exist'}")
        return path
    copy = cache_folder() / hashlib.sha256(name.encode()).hexdigest()[:24] / name.rpartition("/")[2]
    if not copy.is_file():
        try:
            _download(name, copy)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if str(error).startswith("data: "):  # it ended too early
                raise
            reason = getattr(error, "reason", None) or error.args[-1:] or error
            reason = reason[0] if isinstance(reason, tuple) else reason
            raise ValueError(f"data: {printable(name)} can't be downloaded ({printable(reason)})") from error
    return copy


def _download(name: str, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(name, timeout=TIMEOUT) as response, write_atomically(copy, "wb") as file:
        shutil.copyfileobj(response, file)
        expected, received = response.headers.get("Content-Length"), file.tell()
        if expected is not None and received != int(expected):
            raise ValueError(f"data: {printable(name)} ended after {received:,} of {int(expected):,} bytes: try again")


def _index(path: Path, image_key: str) -> _Shard:
    """Index of a shard's images, cached until the size or the modification time of the file changes."""
    stat = path.stat()
    name = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {image_key} {SUFFIXES} captions"
    key = hashlib.sha256(os.fsencode(name)).hexdigest()[:24]
    cache = cache_folder() / f"shard-{key}.npz"
    try:
        return _read_index(cache, stat.st_size)
    except ValueError:  # no cache yet, or it is damaged
        pass
    shard = _scan(path, image_key)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(cache, "wb") as file:
            arrays: dict[str, Any] = {
                field: _as_bytes(x) if x.dtype == object else x for field, x in shard._asdict().items()
            }
            np.savez(file, **arrays)
    except OSError:  # no space or no permission: the next call scans again
        pass
    return shard


def _as_bytes(strings: np.ndarray) -> np.ndarray:
    """Strings [N] as bytes, with a NUL behind each; names in a tar have none."""
    return np.frombuffer(b"".join(os.fsencode(string) + b"\0" for string in strings.tolist()), np.uint8)


def _as_strings(data: np.ndarray) -> np.ndarray:
    strings = np.empty(int((data == 0).sum()), object)
    strings[:] = [os.fsdecode(string) for string in data.tobytes().split(b"\0")[:-1]]
    return strings


def _read_index(cache: Path, length: int) -> _Shard:
    """An index from the cache.

    Raises:
        ValueError: there is none, or its images don't lie in a file of `length` bytes.
    """
    with Npz(cache) as file:
        shard = _Shard(*(file.read(field) for field in _Shard._fields))
    if any(x.ndim != 1 or x.dtype != (np.int64 if i < 3 else np.uint8) for i, x in enumerate(shard)):
        raise ValueError(f"data: {printable(cache)} is no index of a shard")
    shard = _Shard(*shard[:3], *map(_as_strings, shard[3:]))
    fits = len({len(column) for column in shard[:5]}) == 1 and all(
        re.fullmatch(r"(?s).* \d{1,15}", count) for count in (*shard.taken, *shard.passed, *shard.dropped)
    )
    fits = fits and all(map(_is_list_of_texts, shard.captions.tolist()))
    inside = (shard.offsets >= 0) & (shard.sizes >= 0) & (shard.sizes <= length - shard.offsets)
    if not fits or not inside.all() or ((shard.labels < -1) | (shard.labels >= MAX_CLASSES)).any():
        raise ValueError(f"data: {printable(cache)} is no index of this shard")
    return shard


class _Headers(io.BufferedReader):
    """A tar file of whose headers a hostile one can't make a reader fill its memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.TarError(f"a header of {size:,} bytes")
        return super().read(size)


def _scan(path: Path, image_key: str) -> _Shard:
    positions: dict[str, tuple[int, int]] = {}  # (offset, size) of each member; a hard link has those of its target
    images: dict[str, tuple[tuple[bool, str], int, int, str]] = {}  # by sample: (rank, offset, size, name)
    labels: dict[str, int] = {}  # by sample
    captions: dict[str, tuple[str, list[str]]] = {}  # by sample: the extension, and what it gave
    dropped: Counter[str] = Counter()
    found: Counter[str] = Counter()  # members by extension
    try:
        with open_regular(path) as opened, _Headers(opened) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:  # without compression, so that members have positions in the file
                if member.size < 0 or tar.offset <= member.offset:
                    raise tarfile.TarError(f"{printable(member.name[:200])} has a size of {member.size:,} bytes")
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
                    continue
                if extension in CAPTIONS and not member.issparse() and member.size <= MAX_TEXT:
                    texts = _parse_captions(tar, member, extension)
                    before, earlier = captions.get(sample, ("", []))
                    if texts is not None and (not earlier or (before, extension) == ("json", "txt")):
                        usable = usable_captions(texts, dropped)
                        if usable or not before:  # a blank .txt leaves what .json has
                            captions[sample] = (extension, usable)
                found[extension if not member.issparse() else f"{extension} (sparse)"] += 1
                rank = ("." in extension, extension)
                is_chosen = extension == image_key if image_key else f".{extension}".endswith(SUFFIXES)
                if is_chosen and not member.issparse() and (sample not in images or rank < images[sample][0]):
                    images[sample] = (rank, *positions[member.name], member.name)
            end = tar.offset
            file.seek(end)
            complete = file.read(512) == bytes(512)
    except tarfile.TarError as error:
        raise ValueError(f"data: {printable(path)} is no tar file, or is compressed or truncated ({error})") from error
    except Exception as error:  # of damaged headers: OverflowError, RecursionError and others
        if str(error).startswith("data: "):  # of a label, with names of members
            raise ValueError(printable(error)) from error
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ValueError(f"data: {printable(path)} can't be read ({printable(reason)})") from error
    if not complete:
        raise ValueError(f"data: {printable(path)} is damaged or truncated at byte {end:,}")
    ranks, offsets, sizes, names = zip(*images.values()) if images else ((), (), (), ())
    taken = Counter(extension for _, extension in ranks)
    used = Counter(captions[sample][0] for sample in images if sample in captions)
    return _Shard(
        np.array(offsets, dtype=np.int64),
        np.array(sizes, dtype=np.int64),
        np.array([labels.get(sample, -1) for sample in images], dtype=np.int64),
        np.array(names, dtype=object),
        np.array([json.dumps(captions[sample][1]) if sample in captions else "" for sample in images], dtype=object),
        *(
            np.array([f"{name} {count}" for name, count in counts.items()], dtype=object)
            for counts in (taken, found - taken - used, dropped)
        ),
    )


def _count(counts: np.ndarray) -> Counter[str]:
    """The sum of texts such as "jpg 1000" by extension."""
    total: Counter[str] = Counter()
    for text in counts.tolist():
        extension, _, count = text.rpartition(" ")
        total[extension] += int(count)
    return total


def _list_counts(counts: dict[str, int], most: int = 10) -> str:
    """Extensions by their counts, such as ".jpg (1,000), .json (1,000)"."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = [f".{printable(name[:60])} ({count:,})" for name, count in ordered[:most]]
    return ", ".join(listed) + (f" and {len(ordered) - most} other extensions" if len(ordered) > most else "")


def _describe_members(shard: _Shard) -> tuple[str, ...]:
    """A sentence on the members that are images, if others are passed over."""
    if not len(shard.passed):
        return ()
    taken, passed = (_list_counts(_count(counts)) for counts in (shard.taken, shard.passed))
    return (f"images are the members {taken}; passed over: {passed} (::image_key=EXTENSION for another image)",)


def _describe_lack(pattern: str, image_key: str | None, shards: list[_Shard]) -> str:
    """The refusal of shards without an image."""
    wanted = (
        f"the extension {printable(image_key)}, which image_key names"
        if image_key
        else f"the suffix of an image ({', '.join(SUFFIXES)})"
    )
    found = _list_counts(_count(np.concatenate([shard.passed for shard in shards])))
    has = f"its members are {found}" if found else "there are no members"
    return f"data: {printable(pattern)} must have members with {wanted}; {has}"


def _parse_label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    content = tar.extractfile(member)
    text = b"" if content is None else content.read(MAX_LABEL)
    try:
        label: int | None = int(text)
    except ValueError:
        label = None
    if label is None or not -1 <= label < MAX_CLASSES:
        got = repr(text.decode(errors="replace")) if label is None else f"{label:,}"
        raise ValueError(
            f"data: {path}: {member.name} must hold the number of a class from 0 to {MAX_CLASSES - 1:,}, or -1 for no "
            f"label, got {got}"
        )
    return label


def _parse_captions(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> list[Any] | None:
    """The captions in a member as they were read; None if it is JSON without captions."""
    content = tar.extractfile(member)
    text = decode_text(b"" if content is None else content.read(MAX_TEXT))
    if extension == "txt":
        return [text]
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = [facts[key] for key in ("caption", "captions") if key in facts] if isinstance(facts, dict) else []
    return None if not found else found[0] if isinstance(found[0], list) else found[:1]


def _is_list_of_texts(text: str) -> bool:
    """True for what `_scan` writes for the captions of an image."""
    try:
        texts = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return False
    return isinstance(texts, list) and all(isinstance(caption, str) for caption in texts)
