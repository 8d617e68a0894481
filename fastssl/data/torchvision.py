"""The engine with torchvision's augmentations, which works on every machine.

Worker processes decode each image once, `resized_crops_` resamples every view of it as torchvision does, and `augment_`
changes the colours of a whole batch.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fastssl.ops import ColourLaw, augment_, resized_crops_

from .augmentation import COLOUR_LAWS, Augmentation, View
from .decoding import ImageFile, decode_for_views, open_image
from .draws import Draws, draw, mix, windows
from .samples import Samples, fill_in_rows, labels_of, stack_extras
from .source import BadImage, BadSource, Source, read_extras
from .workers import WAYS_OUT, LostWorker, Workers

FILES_IN_MEMORY = 16  # files of a batch that are in memory at a time


class Engine:
    """Makes batches with torchvision.

    Args:
        source: the images.
        augmentation: the views to make of each image.
        seed: seed of all draws.
        workers: processes that make batches; 0 makes them in this process, with torch's threads.
        pin: copy batches to page-locked memory, from which a GPU copies them asynchronously.
        fill_in: replace images that can't be decoded by others of the batch; else they are left out.
        batch_size: images of the largest batch.
    """

    def __init__(
        self,
        source: Source,
        augmentation: Augmentation,
        seed: int,
        *,
        workers: int,
        pin: bool,
        fill_in: bool,
        batch_size: int,
    ):
        batch_bytes = batch_size * sum(3 * view.size[0] * view.size[1] for view in augmentation.views)
        self._sampler = BatchSampler()
        self._batches = Workers(
            Batches(source, augmentation, seed, fill_in, make_batch),
            workers=workers,
            batch_bytes=batch_bytes,
            batch_size=None,
            sampler=self._sampler,
            persistent_workers=workers > 0,
            pin_memory=pin,
            generator=torch.Generator(),  # the global generator would advance in every epoch, and again after a resume
        )

    def run(self, epoch: int, batches: list[np.ndarray]) -> Iterator[Samples]:
        """Makes the batches of these image numbers, in their order."""
        self._sampler.epoch, self._sampler.batches = epoch, batches
        return iter(self._batches)


def make_batch(
    source: Source, augmentation: Augmentation, seed: int, epoch: int, indices: np.ndarray, fill_in: bool
) -> Samples:
    """Makes the batch of these image numbers [B].

    Memory: holds `FILES_IN_MEMORY` files and the pixels of one image at a time, since photographs may be large.
    """
    seeds = mix(seed, epoch, indices)
    draws = [draw(view, number, seeds) for number, view in enumerate(augmentation.views)]
    views = [torch.empty(len(indices), 3, *view.size, dtype=torch.uint8) for view in augmentation.views]
    extras: dict[int, dict[str, np.ndarray]] = {}  # by row of the batch, of the images that can be decoded
    bad: list[tuple[int, str]] = []
    for first in range(0, len(indices), FILES_IN_MEMORY):
        files: dict[int, ImageFile] = {}  # by row of the batch
        for row in range(first, min(first + FILES_IN_MEMORY, len(indices))):
            try:
                files[row] = open_image(source, int(indices[row]))
            except BadImage as error:
                bad.append((int(indices[row]), str(error)))
        for row, in_file in windows_of(augmentation, draws, files):
            try:
                pixels, in_pixels = decode(files[row], augmentation, in_file)
                extras[row] = read_extras(source, int(indices[row]))
            except BadImage as error:
                bad.append((int(indices[row]), str(error)))
                continue
            for view, window, batch in zip(augmentation.views, in_pixels, views):
                resized_crops_(
                    batch[row : row + 1], [pixels], torch.tensor([window], dtype=torch.float64), view.interpolation
                )
    rows = list(extras)
    if bad:
        rows = fill_in_rows(rows, len(indices)) if fill_in else rows
        indices, seeds = indices[rows], seeds[rows]
        views, draws = [view[rows] for view in views], [drawn.take(rows) for drawn in draws]
    for view, drawn, batch in zip(augmentation.views, draws, views):
        change_colours(batch, view, drawn)
    stacked = stack_extras(source, indices, [extras[row] for row in rows])
    labels = labels_of(source, indices)
    return Samples(views, torch.from_numpy(indices), labels, torch.from_numpy(seeds), stacked, bad)


def decode(
    image: ImageFile, augmentation: Augmentation, windows: Sequence[Sequence[float]]
) -> tuple[Tensor, Sequence[Sequence[float]]]:
    """Pixels of an image, reduced if the augmentation allows it, and the views' windows in them."""
    if augmentation.reduced:
        return decode_for_views(image, windows, [view.size for view in augmentation.views])
    return image.raster(), windows


def change_colours(pixels: Tensor, view: View, draws: Draws) -> None:
    """Changes the colours of a batch [B, 3, H, W] uint8 by its draws, in place."""
    jitter, order, grey, sigma, solarize, flip = map(torch.from_numpy, draws.colours)
    augment_(pixels, jitter, order, grey, sigma, solarize, flip, law_of(view))


def law_of(view: View) -> ColourLaw:
    """The formulas of a view's colours."""
    return ColourLaw(view.grayscale_first, **COLOUR_LAWS[view.colour_law])


def windows_of(
    augmentation: Augmentation, draws: list[Draws], files: dict[int, ImageFile]
) -> Iterator[tuple[int, Sequence[Sequence[float]]]]:
    """(row, window of each view) for several files at once, to save calls of NumPy."""
    rows, sizes = list(files), np.array([file.size for file in files.values()]).reshape(-1, 2)
    by_view = [windows(view, drawn.take(rows), sizes).tolist() for view, drawn in zip(augmentation.views, draws)]
    return zip(rows, zip(*by_view))


class BatchSampler(Sampler):
    """A sampler of whole batches: (epoch, image numbers). The workers are persistent, so each batch has its epoch."""

    epoch: int = 0
    batches: list[np.ndarray] = []  # noqa: RUF012 - replaced, never changed

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return zip(itertools.repeat(self.epoch), self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Batches(Dataset):
    """A dataset whose samples are whole batches, as `make` returns them.

    An error is returned, since a worker's exception would arrive with the worker's traceback as its text.
    """

    def __init__(self, source: Source, augmentation: Augmentation, seed: int, fill_in: bool, make: Callable[..., Any]):
        self.source, self.augmentation, self.seed, self.fill_in, self.make = source, augmentation, seed, fill_in, make

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Any:
        try:
            return self.make(self.source, self.augmentation, self.seed, *key, self.fill_in)
        except (ValueError, OSError) as error:
            return error if type(error) is BadSource else ValueError(str(error))  # others may not be picklable
        except MemoryError as error:
            return LostWorker(f"data: no memory for a batch ({error}): {WAYS_OUT}")
