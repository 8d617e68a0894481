"""`pack:FILE`: images that `fastssl data pack` put into one file, with labels, names and both splits of their source.

The file is mapped into memory, so that any image is read without opening files or seeking, and workers share the pages.
Each image is checked against its checksum when it is read: a damaged one is treated like an image that can't be
decoded. A pack that is cut off, or whose index is damaged, opens with a sentence and the images that are intact.
"""

import mmap
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from fastssl.text import printable

from ..pack_format import Index, read_index
from ..reading import open_regular
from ..source import BadImage, Source, Strings, expand_user

SPLIT_NUMBERS = {"train": 0, "test": 1}


class Pack(Source):
    """Images of one split of a pack.

    Args:
        path: the file.
        index: its index.
        split: "train" or "test".
    """

    def __init__(self, path: Path, index: Index, split: str):
        columns, number = index.columns, SPLIT_NUMBERS[split]
        rows = np.flatnonzero(columns["split"] == number)
        self._path, self._columns = str(path), {name: columns[name][rows] for name in _COLUMNS}
        self._names, self._identities = (_strings(columns, name, rows) for name in ("name", "identity"))
        self.classes = index.header["classes"][number]
        sizes = {(h, w) for h, w in zip(self._columns["height"].tolist(), self._columns["width"].tolist())}
        self.size = next(iter(sizes)) if len(sizes) == 1 and (0, 0) not in sizes else None
        self.shards = None
        self.notes = (*index.header["notes"][number], *index.notes)
        if bad := int(columns["bad"][number]):
            total = index.header["images"][number]
            self.notes += (f"{bad:,} of {total:,} images could not be decoded when the pack was written",)
        self._data: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._columns["offset"])

    def name(self, index: int) -> str:
        return f"{self._path}: {self._names[index]}"

    def label(self, index: int) -> int:
        return int(self._columns["label"][index])

    def identity(self, index: int) -> str:
        return self._identities[index]

    def read(self, index: int) -> np.ndarray:
        offset, size, crc, height, width = (int(self._columns[name][index]) for name in _COLUMNS[:5])
        image = np.frombuffer(self._part(index, offset, size, crc), np.uint8).copy()
        if not height:
            return image
        if size != 3 * height * width:
            raise BadImage(f"{printable(self.name(index))}: {height}×{width} pixels must have 3 bytes each")
        return image.reshape(height, width, 3)

    def extras(self, index: int) -> dict[str, np.ndarray]:
        size, crc = (int(self._columns[name][index]) for name in ("extras_size", "extras_crc"))
        if not size:
            return {}
        start = int(self._columns["offset"][index] + self._columns["size"][index])
        return safetensors.numpy.load(self._part(index, start, size, crc))

    def _part(self, index: int, offset: int, size: int, crc: int) -> bytes:
        """Bytes of the file, checked."""
        if self._data is None:
            try:
                with open_regular(self._path) as file:
                    self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # of an empty file
                raise BadImage(f"{printable(self.name(index))}: {error}") from error
        part = self._data[offset : offset + size]
        if len(part) < size or zlib.crc32(part) != crc:
            raise BadImage(f"{printable(self.name(index))}: its checksum is wrong: this part of the pack is damaged")
        return part

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}  # each process maps the file for itself


_COLUMNS = ("offset", "size", "crc", "height", "width", "label", "extras_size", "extras_crc")


def _strings(columns: dict[str, np.ndarray], name: str, rows: np.ndarray) -> Strings:
    data, ends = columns[name].tobytes(), columns[f"{name}_end"].tolist()
    return Strings([data[ends[row] : ends[row + 1]].decode("utf-8", "surrogateescape") for row in rows.tolist()])


def open_split(argument: str, split: str) -> Pack:
    if not argument:
        raise ValueError("data: pack needs a file: pack:FILE, which `fastssl data pack SOURCE --out FILE` writes")
    path = expand_user(argument)
    try:
        index = read_index(path)
    except OSError as error:
        raise ValueError(f"data: {printable(path)} can't be read ({error.strerror or error})") from error
    pack = Pack(path, index, split)
    if not len(pack):
        raise ValueError(f"data: {printable(path)} holds no images of the {split} split")
    return pack
