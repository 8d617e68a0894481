"""`idx:PATH`: files in MNIST's format, gzipped or not: MNIST, Fashion-MNIST, KMNIST and others.

PATH is the folder that holds train-images-idx3-ubyte, train-labels-idx1-ubyte, and the same two of t10k. On Debian the
package `dataset-fashion-mnist` installs Fashion-MNIST: idx:/usr/share/datasets/fashion-mnist
"""

import gzip
import zlib
from pathlib import Path

import numpy as np

from ..source import expand_user
from .arrays import Arrays, make_source

PREFIXES = {"train": "train", "test": "t10k"}


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
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data: {path} can't be read ({error})") from error
    shape = np.frombuffer(data[4 : 4 + 4 * dims], ">i4").tolist() if len(data) >= 4 + 4 * dims else []
    if data[:4] != bytes((0, 0, 8, dims)) or min(shape, default=-1) < 0 or len(data) != 4 + 4 * dims + np.prod(shape):
        raise ValueError(f"data: {path} is no idx file of {dims} dims of bytes, or is truncated")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)
