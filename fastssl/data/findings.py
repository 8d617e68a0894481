"""A scan of every image of a source: what `fastssl data check` reports."""

from collections import Counter
from typing import NamedTuple, TypeVar

import numpy as np
from torch.utils.data import Dataset

from .decoding import open_image
from .source import BadImage, Source, read_captions
from .workers import Workers

EXAMPLES = 3  # captions that are shown
T = TypeVar("T")


class Range(NamedTuple):
    """Stored values of the images of one format and mode."""

    low: float  # smallest value
    high: float  # largest value
    rules: Counter[str]  # images by the rule that makes bytes of their values: "8 bits", …

    def __add__(self, other: "Range") -> "Range":  # type: ignore[override]
        return Range(min(self.low, other.low), max(self.high, other.high), self.rules + other.rules)


class Findings(NamedTuple):
    """Results of `scan`: counts and sizes over a whole source."""

    good: int  # images that can be decoded
    formats: Counter[str]  # images of each format and mode: "JPEG RGB", "PNG I;16", …, "pixels RGB"
    values: dict[str, Range]  # of each format and mode
    heights: np.ndarray  # [good] int64, pixels
    widths: np.ndarray  # [good] int64
    bytes: int  # size of all good files
    labels: Counter[int]  # images of each class, bad ones too; −1 for no label
    bad: list[str]  # "PATH: reason" of the images that can't be decoded
    captions: np.ndarray  # [len(source)] int64, captions of each image
    words: np.ndarray  # words of each caption
    examples: list[str]  # captions of the first captioned images


def scan(source: Source, workers: int = 0) -> Findings:
    """Decodes every image of a source.

    Args:
        source: the images.
        workers: processes that decode; 0 decodes in this process.
    """
    formats: Counter[str] = Counter()
    values: dict[str, Range] = {}
    sizes: list[tuple[int, int]] = []
    bad: list[str] = []
    total_bytes = 0
    facts = Workers(_Facts(source), workers=workers, collate=_identity, batch_size=None)
    for fact in facts:
        if isinstance(fact, str):
            bad.append(fact)
            continue
        kind, stored, size, length = fact
        formats[kind] += 1
        values[kind] = values[kind] + stored if kind in values else stored
        sizes.append(size)
        total_bytes += length
    heights, widths = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    labels = Counter(source.label(index) for index in range(len(source)))
    return Findings(len(sizes), formats, values, heights, widths, total_bytes, labels, bad, *_scan_captions(source))


def _scan_captions(source: Source) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(captions of each image, words of each caption, the first captions)."""
    counts = np.zeros(len(source), np.int64)
    words: list[int] = []
    examples: list[str] = []
    for index in range(len(source)):
        captions = read_captions(source, index)
        counts[index] = len(captions)
        words += [len(caption.split()) for caption in captions]
        if captions and len(examples) < EXAMPLES:
            examples.append(captions[0])
    return counts, np.array(words, dtype=np.int64), examples


class _Facts(Dataset):
    """Facts of each image, or "PATH: reason" of one that can't be decoded."""

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[str, Range, tuple[int, int], int] | str:
        """(format and mode, stored values, (height, width), bytes)."""
        try:
            image = open_image(self.source, index)
            pixels = image.pixels()
        except BadImage as error:
            return str(error)
        _, height, width = pixels.shape
        low, high, rule = image.values(pixels)
        stored = Range(low, high, Counter({rule: 1}))
        return f"{image.format} {image.mode}", stored, (height, width), image.data.nbytes


def _identity(fact: T) -> T:
    return fact
