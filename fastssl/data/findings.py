"""A scan of every image of a source: what `fastssl data check` reports."""

from collections import Counter
from typing import NamedTuple, TypeVar

import numpy as np
from torch.utils.data import Dataset

from .decoding import open_image
from .source import BadImage, Source
from .workers import Workers

T = TypeVar("T")


class Findings(NamedTuple):
    """Results of `scan`: counts and sizes over a whole source."""

    good: int  # images that can be decoded
    formats: Counter[str]  # images of each format and mode: "JPEG RGB", "PNG I;16", …, "pixels RGB"
    heights: np.ndarray  # [good] int64, pixels
    widths: np.ndarray  # [good] int64
    bytes: int  # size of all good files
    labels: Counter[int]  # images of each class
    bad: list[str]  # "PATH: reason" of the other images


def scan(source: Source, workers: int = 0) -> Findings:
    """Decodes every image of a source.

    Args:
        source: the images.
        workers: processes that decode; 0 decodes in this process.
    """
    formats: Counter[str] = Counter()
    labels: Counter[int] = Counter()
    sizes: list[tuple[int, int]] = []
    bad: list[str] = []
    total_bytes = 0
    facts = Workers(_Facts(source), workers=workers, collate=_identity, batch_size=None)
    for index, fact in enumerate(facts):
        if isinstance(fact, str):
            bad.append(fact)
            continue
        kind, size, length = fact
        formats[kind] += 1
        labels[source.label(index)] += 1
        sizes.append(size)
        total_bytes += length
    heights, widths = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    return Findings(len(sizes), formats, heights, widths, total_bytes, labels, bad)


class _Facts(Dataset):
    """Format and mode, (height, width) and bytes of each image, or "PATH: reason" of one that can't be decoded."""

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[str, tuple[int, int], int] | str:
        try:
            image = open_image(self.source, index)
            _, height, width = image.pixels().shape
            return f"{image.format} {image.mode}", (height, width), image.data.nbytes
        except BadImage as error:
            return str(error)


def _identity(fact: T) -> T:
    return fact
