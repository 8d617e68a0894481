"""Features of images with labels, numbers and names, and their files: .npz for NumPy, .parquet for data frames."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fastssl.extras import need
from fastssl.files import write_atomically

SUFFIXES = (".npz", ".parquet")


class Embedding(NamedTuple):
    """Features of N images."""

    features: Tensor  # [N, F] float32, on the CPU
    labels: Tensor  # [N] int64, −1 for no label
    indices: Tensor  # [N] int64, number of the image in its split
    names: list[str]  # N names: paths, if the source has files
    splits: list[str]  # N times "train" or "test"


def check_path(path: Path) -> None:
    """Checks that features can be written to a file, before they are computed.

    Raises:
        ValueError: the suffix is unknown or the folder does not exist.
        MissingExtra: the file is .parquet and pyarrow is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"embed: --out must end in {' or '.join(SUFFIXES)}, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"embed: --out must be in a folder that exists, got {path}")
    if path.suffix == ".parquet":
        need("pyarrow", what="embed --out FILE.parquet")


def write_embedding(embedding: Embedding, path: Path) -> None:
    """Writes the columns features, labels, indices, names and splits, one row per image, atomically."""
    check_path(path)
    features, labels, indices = (column.numpy() for column in embedding[:3])
    names = [name.encode(errors="backslashreplace").decode() for name in embedding.names]  # file names may be any bytes
    columns = {"labels": labels, "indices": indices, "names": names, "splits": embedding.splits}
    if path.suffix == ".npz":
        columns |= {name: np.array(columns[name], dtype=np.str_) for name in ("names", "splits")}
        with write_atomically(path, "wb") as file:
            np.savez(file, features=features, **columns)
        return
    arrow, parquet = (need(name, what="embed --out FILE.parquet") for name in ("pyarrow", "pyarrow.parquet"))
    rows = arrow.FixedSizeListArray.from_arrays(arrow.array(features.ravel()), features.shape[1])
    with write_atomically(path, "wb") as file:
        parquet.write_table(arrow.table({"features": rows, **columns}), file)
