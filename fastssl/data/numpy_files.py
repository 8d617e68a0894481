"""NumPy's files, .npy and .npz, read so that neither a damaged nor a hostile one can do more than raise an error.

A header is compared with the size of the file before an array is made, and pickled objects are refused.
"""

import io
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import fstat
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from fastssl.text import printable

from .reading import open_regular, usable_memory

LONGEST_HEADER = 1_000  # bytes, that of plain numbers has 118; NumPy takes seconds to see that a long one is damaged
LONGEST_REASON = 300  # characters of a reader's message, which may quote the file


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype


def map_npy(path: str | Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped and read-only.

    Raises:
        ValueError: the file can't be opened, or is no array of plain numbers; one sentence that names it.
    """
    with _errors_of(path), open_regular(path) as file:
        header = _read_header(file, fstat(file.fileno()).st_size)
        if 0 in header.shape:  # can't be mapped
            return np.empty(header.shape, header.dtype)
        order = "F" if header.fortran_order else "C"
        return np.memmap(file, header.dtype, "r", file.tell(), header.shape, order)  # type: ignore[call-overload]


class Npz:
    """The arrays of a .npz file by name; a context manager.

    Raises:
        ValueError: the file can't be opened or is no .npz file, or, when an array is read, it is damaged or too large
            for the memory; one sentence that names the file.
    """

    def __init__(self, path: str | Path):
        self.path = path
        with _errors_of(path):
            self._file = open_regular(path)
            try:
                self._zip = zipfile.ZipFile(io.BufferedReader(self._file))
            except BaseException:
                self._file.close()
                raise
        self.names = [name.removesuffix(".npy") for name in self._zip.namelist()]

    def __enter__(self) -> "Npz":
        return self

    def __exit__(self, *exception: object) -> None:
        self._zip.close()
        self._file.close()

    def read(self, name: str) -> np.ndarray:
        """An array, in memory."""
        with _errors_of(self.path, name):
            member = self._zip.getinfo(f"{name}.npy")
            with self._zip.open(member) as stream:
                header = _read_header(stream, member.file_size)
                size, memory = math.prod(header.shape) * header.dtype.itemsize, usable_memory()
                if size > memory:
                    raise ValueError(
                        f"it takes {size / 1e9:,.1f} GB of memory, of which there are {memory / 1e9:,.1f}: "
                        "save it as a .npy file, which is read where it lies"
                    )
            with self._zip.open(member) as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
                if stream.read(1):  # also compares the checksum, at the end
                    raise ValueError("it is longer than its header states")
                return array


def _read_header(file: IO[bytes] | io.FileIO, length: int) -> _Header:
    """Header of a .npy file of `length` bytes; the file is left at the first byte of the array."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version[0]}.{version[1]} of the format, which plain numbers don't need")
    header = _Header(*readers[version](file, max_header_size=LONGEST_HEADER))
    if header.dtype.hasobject or header.dtype.names:
        raise ValueError(f"it holds {'objects' if header.dtype.hasobject else 'records'}")
    if any(side < 0 for side in header.shape):
        raise ValueError(f"its header states the shape {list(header.shape)}")
    size, rest = math.prod(header.shape) * header.dtype.itemsize, length - file.tell()
    if size > rest:
        raise ValueError(
            f"its header states {header.dtype} {list(header.shape)}, {size:,} bytes, of which it has {rest:,}"
        )
    return header


@contextmanager
def _errors_of(path: str | Path, name: str = "") -> Iterator[None]:
    """Turns whatever a reader raises on a damaged file into one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"data: {printable(path)} does not exist") from error
    except Exception as error:  # zipfile, zlib and NumPy raise anything from EOFError to NotImplementedError
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        reason = reason[:LONGEST_REASON]
        array = f", array {printable(name)}," if name else ""
        raise ValueError(
            f"data: {printable(path)}{array} is no NumPy file of plain numbers ({printable(reason)})"
        ) from error
