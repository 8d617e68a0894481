"""Looks at every image of a source once: what `fastssl data check` reports."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from .decoding import open_image
from .source import BadImage, Source


class Findings(NamedTuple):
    """Of a whole source."""

    good: int
    formats: Counter  # "JPEG RGB", "PNG I;16", …, "pixels RGB"
    heights: np.ndarray  # [good] int64, pixels
    widths: np.ndarray  # [good] int64
    bytes: int  # of the files
    labels: Counter  # images of each class
    bad: list[str]  # "PATH: reason"


def check(source: Source, workers: int = 0) -> Findings:
    """Decodes every image, in `workers` processes."""
    formats, labels, sizes, held, bad = Counter(), Counter(), [], 0, []
    for index, found in enumerate(DataLoader(_Looked(source), batch_size=None, num_workers=workers, collate_fn=_same)):
        if isinstance(found, str):
            bad.append(found)
            continue
        kind, size, length = found
        formats[kind] += 1
        labels[source.label(index)] += 1
        sizes.append(size)
        held += length
    heights, widths = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    return Findings(len(sizes), formats, heights, widths, held, labels, bad)


class _Looked(Dataset):
    """(format and mode, (height, width), bytes) of each image, or why it is bad."""

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[str, tuple[int, int], int] | str:
        try:
            opened = open_image(self.source, index)
            size = tuple(opened.pixels().shape[1:])
            return f"{opened.format} {opened.mode}", size, opened.data.nbytes
        except BadImage as error:
            return str(error)


def _same(found):
    return found
