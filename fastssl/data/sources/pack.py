"""`pack:FILE`: images that `fastssl data pack` put into one file, with labels, names and both splits of their source.

The file is mapped into memory, so that any image is read without opening files, seeking or copying, and workers share
the pages. An image is checked against its checksum when a process reads it for the first time: a damaged one is treated
like an image that can't be decoded. A pack that is cut off, or whose index is damaged, opens with a sentence and the
images that are intact. Shards are opened by the name that was given as --out, or by the path of one of them alone.
"""

import json
import mmap
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from fastssl.text import printable

from ..pack_format import Index, read_index, shape_of, shard_path
from ..reading import open_regular
from ..source import BadImage, BadSource, Source, Strings, expand_user

SPLIT_NUMBERS = {"train": 0, "test": 1}
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0x40)  # in mmap from Python 3.13 on


class Pack(Source):
    """Images of one split of a pack.

    Args:
        paths: its files.
        indices: their indices.
        split: "train" or "test".
    """

    def __init__(self, paths: list[Path], indices: list[Index], split: str):
        number = SPLIT_NUMBERS[split]
        rows = [np.flatnonzero(index.columns["split"] == number) for index in indices]
        self._paths = [str(path) for path in paths]
        self._file = np.repeat(np.arange(len(paths)), list(map(len, rows)))
        self._columns = {
            name: np.concatenate([index.columns[name][chosen] for index, chosen in zip(indices, rows)])
            for name in _COLUMNS
        }
        self._names, self._identities = (
            Strings([text for index, chosen in zip(indices, rows) for text in _strings(index.columns, name, chosen)])
            for name in ("name", "identity")
        )
        self._captions = Strings(
            [
                text
                for index, chosen in zip(indices, rows)
                for text in (
                    _strings(index.columns, "captions", chosen) if "captions" in index.columns else [""] * len(chosen)
                )
            ]
        )
        header = indices[0].header
        self.classes = header["classes"][number]
        sizes = {(h, w) for h, w in zip(self._columns["height"].tolist(), self._columns["width"].tolist())}
        self.size = next(iter(sizes)) if len(sizes) == 1 and (0, 0) not in sizes else None
        self.shards = None
        self.notes = (*header["notes"][number], *(note for index in indices for note in index.notes))
        if bad := sum(int(index.columns["bad"][number]) for index in indices):
            total = sum(index.header["images"][number] for index in indices)
            self.notes += (f"{bad:,} of {total:,} images could not be decoded when the pack was written",)
        self._maps: dict[int, mmap.mmap] = {}  # by number of the file
        self._verified = np.zeros(len(self), bool)  # images whose checksum this process has found right

    def __len__(self) -> int:
        return len(self._columns["offset"])

    def name(self, index: int) -> str:
        return f"{self._paths[self._file[index]]}: {self._names[index]}"

    def label(self, index: int) -> int:
        return int(self._columns["label"][index])

    def identity(self, index: int) -> str:
        return self._identities[index]

    def read(self, index: int) -> np.ndarray:
        offset, size, crc, height, width = (int(self._columns[name][index]) for name in _COLUMNS[:5])
        image = self._part(index, offset, size, None if self._verified[index] else crc)
        self._verified[index] = True
        shape = shape_of(size, height, width)
        if shape is None:
            raise BadImage(f"{printable(self.name(index))}: {height}×{width} pixels in {size:,} bytes, no RGB or 4:2:0")
        return image.reshape(shape)

    def extras(self, index: int) -> dict[str, np.ndarray]:
        size, crc = (int(self._columns[name][index]) for name in ("extras_size", "extras_crc"))
        if not size:
            return {}
        start = int(self._columns["offset"][index] + self._columns["size"][index])
        return safetensors.numpy.load(self._part(index, start, size, crc).tobytes())

    def captions(self, index: int) -> tuple[str, ...]:
        try:
            return tuple(json.loads(self._captions[index] or "[]"))
        except (ValueError, TypeError) as error:
            raise BadSource(f"data: {printable(self.name(index))}: its captions are damaged") from error

    def _part(self, index: int, offset: int, size: int, crc: int | None) -> np.ndarray:
        """Bytes [N] of the file, compared with a checksum. They are the mapped memory; writing to them copies it."""
        file = int(self._file[index])
        if file not in self._maps:
            try:
                with open_regular(self._paths[file]) as opened:
                    self._maps[file] = mmap.mmap(
                        opened.fileno(), 0, mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                    )
            except (OSError, ValueError) as error:  # of an empty file
                raise BadImage(f"{printable(self.name(index))}: {error}") from error
        data = self._maps[file]
        part = np.frombuffer(data, np.uint8, size, offset) if offset + size <= len(data) else np.empty(0, np.uint8)
        if len(part) < size or (crc is not None and zlib.crc32(part.data) != crc):
            raise BadImage(f"{printable(self.name(index))}: its checksum is wrong: this part of the pack is damaged")
        return part

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_verified": np.zeros(len(self), bool)}  # each process has its own


_COLUMNS = ("offset", "size", "crc", "height", "width", "label", "extras_size", "extras_crc")


def _strings(columns: dict[str, np.ndarray], name: str, rows: np.ndarray) -> list[str]:
    data, ends = columns[name].tobytes(), columns[f"{name}_end"].tolist()
    return [data[ends[row] : ends[row + 1]].decode("utf-8", "surrogateescape") for row in rows.tolist()]


def open_split(argument: str, split: str) -> Pack:
    if not argument:
        raise ValueError("data: pack needs a file: pack:FILE, which `fastssl data pack SOURCE --out FILE` writes")
    path = expand_user(argument)
    paths = [path] if path.exists() else _find_shards(path)
    indices = []
    for file in paths:
        try:
            indices.append(read_index(file))
        except OSError as error:
            raise ValueError(f"data: {printable(file)} can't be read ({error.strerror or error})") from error
    if any(_whole(index) != _whole(indices[0]) for index in indices):
        raise ValueError(f"data: the shards of {printable(path)} hold images of different sources or encodings")
    pack = Pack(paths, indices, split)
    if not len(pack):
        raise ValueError(f"data: {printable(path)} holds no images of the {split} split")
    return pack


def _find_shards(path: Path) -> list[Path]:
    """The files of a pack that was written in shards; the path itself if there are none.

    Raises:
        ValueError: some are missing, or there are several sets.
    """
    pattern = re.compile(rf"{re.escape(path.stem)}-\d{{5}}-of-(\d{{5}}){re.escape(path.suffix)}")
    try:
        matches = [match for file in path.parent.iterdir() if (match := pattern.fullmatch(file.name))]
    except OSError:
        return [path]
    counts = {int(match[1]) for match in matches} - {0}
    if not counts:
        return [path]
    name = printable(path)
    if len(counts) > 1:
        found = " and ".join(map(str, sorted(counts)))
        raise ValueError(f"data: {name} has shards of several calls, of {found} files: remove those of all but one")
    paths = [shard_path(path, shard, max(counts)) for shard in range(max(counts))]
    if missing := [file for file in paths if not file.exists()]:
        raise ValueError(
            f"data: {len(missing):,} of the {len(paths):,} shards of {name} are missing, the first "
            f"{printable(missing[0])}: write them again, or open the others one by one"
        )
    return paths


def _whole(index: Index) -> tuple[object, ...]:
    """What all shards of a pack have in common."""
    return tuple(index.header.get(name) for name in ("source", "encoding", "classes"))
