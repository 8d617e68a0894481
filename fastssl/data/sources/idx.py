"""`idx:PATH`: files in MNIST's format, gzipped or not: MNIST, Fashion-MNIST, KMNIST and others.

PATH is the folder that holds train-images-idx3-ubyte, train-labels-idx1-ubyte, and the same two of t10k. On Debian the
package `dataset-fashion-mnist` installs Fashion-MNIST: idx:/usr/share/datasets/fashion-mnist
"""

import math
import zlib
from io import FileIO
from pathlib import Path

import numpy as np

from fastssl.text import printable

from ..reading import open_regular, usable_memory
from ..source import expand_user
from .arrays import Arrays, make_source

GZIP = 31  # zlib's number for the largest window and a header of gzip
CHUNK = 2**16  # bytes that are read at a time
PREFIXES = {"train": "train", "test": "t10k"}


class _Gzip:
    """The bytes of a gzip file, of one member or of several.

    Python's gzip skips zeros behind a member one by one, which takes hours in a sparse file.
    """

    def __init__(self, file: FileIO):
        self._file, self._decoder = file, zlib.decompressobj(GZIP)

    def read(self, size: int) -> bytearray:
        """The next bytes, fewer than `size` at the end."""
        data = bytearray()
        while len(data) < size:
            packed = self._decoder.unconsumed_tail
            if self._decoder.eof:
                packed = (self._decoder.unused_data or self._file.read(CHUNK)).lstrip(b"\0")
                if not packed:
                    break
                self._decoder = zlib.decompressobj(GZIP)
            packed = packed or self._file.read(CHUNK)
            if not packed:
                break
            data += self._decoder.decompress(packed, size - len(data))
        return data


def open_split(argument: str, split: str) -> Arrays:
    root = expand_user(argument)
    if not argument or not root.is_dir():
        raise ValueError(f"data: idx needs a folder: idx:PATH, got {argument!r}")
    images, labels = (
        _read(root, f"{PREFIXES[split]}-{part}-ubyte", dims) for part, dims in (("images-idx3", 3), ("labels-idx1", 1))
    )
    return make_source(images, labels, split, is_split=True, name=str(root))


def _read(root: Path, name: str, dims: int) -> np.ndarray:
    """An array of bytes: two zeros, 8 for bytes, the number of dims, each size as a big-endian int32, then the values.

    Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits", file formats.
    """
    path = next((root / candidate for candidate in (name, f"{name}.gz") if (root / candidate).is_file()), None)
    if path is None:
        raise ValueError(f"data: {root} has no {name} or {name}.gz")
    start = 4 + 4 * dims
    try:
        with open_regular(path) as file:
            unpacked = _Gzip(file) if path.suffix == ".gz" else file
            header = unpacked.read(start)
            shape = np.frombuffer(header[4:], ">i4").tolist() if len(header) == start else [-1]
            if header[:4] != bytes((0, 0, 8, dims)) or min(shape) < 0:
                raise ValueError(f"data: {printable(path)} is no idx file of {dims} dims of bytes, or is truncated")
            size, memory = math.prod(shape), usable_memory()
            if size > memory:
                takes = f"{size / 1e9:,.1f} GB of memory, of which there are {memory / 1e9:,.1f}"
                raise ValueError(f"data: {printable(path)} takes {takes}: save it as .npy, see the source arrays")
            data = unpacked.read(size + 1)  # no more, whatever it unpacks to
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"data: {printable(path)} can't be read ({printable(reason)})") from error
    if len(data) != size:
        raise ValueError(f"data: {printable(path)} is no idx file of {dims} dims of bytes, or is truncated")
    return np.frombuffer(data, np.uint8).reshape(shape)
