"""The engine with torchvision's augmentations, which works on every machine, without the package torchvision.

Workers decode each image once, `resized_crops_` resamples every view of it as torchvision does, and `augment_` changes
the colours of a whole batch.
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
from .draws import Draws, draw_views, mix, windows_of_views
from .random_augment import random_augment_
from .samples import Samples, fill_in_rows, labels_of, stack_extras
from .shared import empty
from .source import BadImage, BadSource, Source, read_extras
from .workers import WAYS_OUT, LostWorker, Workers

FILES_IN_MEMORY = 16  # files of a batch that are in memory at a time


class Engine:
    """Makes batches in workers, on the CPU.

    Args:
        source: the images.
        augmentation: the views to make of each image.
        seed: seed of all draws.
        workers: processes or threads that make batches; 0 makes them in this process, with torch's threads.
        device: to which batches will be copied. For a GPU they lie in page-locked memory, copied while a step runs.
        fill_in: replace images that can't be decoded by others of the batch; else they are left out.
        batch_size: images of the largest batch.
        worker_kind: "process" or "thread".
    """

    def __init__(
        self,
        source: Source,
        augmentation: Augmentation,
        seed: int,
        *,
        workers: int,
        device: torch.device,
        fill_in: bool,
        batch_size: int,
        worker_kind: str = "process",
    ):
        batch_bytes = batch_size * sum(3 * view.size[0] * view.size[1] for view in augmentation.views)
        batches = Batches(source, augmentation, seed, fill_in, make_batch)
        self._stream = BatchStream(batches, batch_bytes, workers, worker_kind, device)

    def run(self, epoch: int, batches: list[np.ndarray]) -> Iterator[Samples]:
        """Makes the batches of these image numbers, in their order. An unfinished earlier run ends."""
        return self._stream.run(epoch, batches)


def make_batch(
    source: Source, augmentation: Augmentation, seed: int, epoch: int, indices: np.ndarray, fill_in: bool
) -> Samples:
    """Makes the batch of these image numbers [B].

    Memory: holds `FILES_IN_MEMORY` files and the pixels of one image at a time, since photographs may be large.
    """
    seeds = mix(seed, epoch, indices)
    draws = draw_views(augmentation, seeds)
    views = [empty(len(indices), 3, *view.size) for view in augmentation.views]
    extras: dict[int, dict[str, np.ndarray]] = {}  # by row of the batch, of the images that can be decoded
    bad: list[tuple[int, str]] = []
    for row, pixels, in_pixels, arrays in decode_images(source, augmentation, draws, indices, bad):
        extras[row] = arrays
        for view, window, batch in zip(augmentation.views, in_pixels, views):
            crop = batch[row : row + 1]
            resized_crops_(crop, [pixels], torch.tensor([window], dtype=torch.float64), view.interpolation)
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


def decode_images(
    source: Source, augmentation: Augmentation, draws: list[Draws], indices: np.ndarray, bad: list[tuple[int, str]]
) -> Iterator[tuple[int, Tensor, Sequence[Sequence[float]], dict[str, np.ndarray]]]:
    """Decodes the images of a batch one by one, reduced if the augmentation allows it.

    Args:
        source: the images.
        augmentation: the views that will be made.
        draws: of each view, for the whole batch.
        indices: [B] numbers of the images.
        bad: gets (number, "PATH: reason") of those that can't be decoded.

    Yields: of each of the others its row of the batch, pixels, the views' windows in them, and extras.
    """
    sizes = [view.size for view in augmentation.views]
    for first in range(0, len(indices), FILES_IN_MEMORY):
        files: dict[int, ImageFile] = {}  # by row
        for row in range(first, min(first + FILES_IN_MEMORY, len(indices))):
            try:
                files[row] = open_image(source, int(indices[row]))
            except BadImage as error:
                bad.append((int(indices[row]), str(error)))
        for row, in_file in _windows_of(augmentation, draws, files):
            try:
                file = files[row]
                decoded = decode_for_views(file, in_file, sizes) if augmentation.reduced else (file.raster(), in_file)
                extras = read_extras(source, int(indices[row]))
            except BadImage as error:
                bad.append((int(indices[row]), str(error)))
                continue
            yield row, *decoded, extras


def change_colours(pixels: Tensor, view: View, draws: Draws) -> None:
    """Changes the colours of a batch [B, 3, H, W] uint8 by its draws, in place."""
    jitter, order, grey, sigma, solarize, flip = map(torch.from_numpy, draws.colours)
    augment_(pixels, jitter, order, grey, sigma, solarize, flip, law_of(view))
    random_augment_(pixels, draws.changes)


def law_of(view: View) -> ColourLaw:
    """The formulas of a view's colours."""
    return ColourLaw(view.grayscale_first, **COLOUR_LAWS[view.colour_law])


def _windows_of(
    augmentation: Augmentation, draws: list[Draws], files: dict[int, ImageFile]
) -> Iterator[tuple[int, Sequence[Sequence[float]]]]:
    """(row, window of each view) for several files at once, to save calls of NumPy."""
    rows, sizes = list(files), np.array([file.size for file in files.values()]).reshape(-1, 2)
    taken = [drawn.take(rows) for drawn in draws]
    by_view = [found.tolist() for found in windows_of_views(augmentation, taken, sizes)]
    return zip(rows, zip(*by_view))


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


class BatchStream:
    """Batches that workers make, epoch by epoch.

    Args:
        batches: makes them.
        batch_bytes: size of the pixels of a batch; 0 where it is not known.
        workers: number of workers; 0 makes the batches in this process.
        worker_kind: "process" or "thread".
        device: to which batches will be copied; for a GPU they are in page-locked memory.
    """

    def __init__(self, batches: Batches, batch_bytes: int, workers: int, worker_kind: str, device: torch.device):
        self._sampler = _BatchSampler()
        self._workers = Workers(
            batches,
            workers=workers,
            batch_bytes=batch_bytes,
            kind=worker_kind,
            batch_size=None,
            sampler=self._sampler,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the global generator would advance in every epoch, and again after a resume
        )

    def run(self, epoch: int, batches: list[np.ndarray]) -> Iterator[Any]:
        """The batches of these image numbers, in their order, as `Batches.make` returns them."""
        self._sampler.epoch, self._sampler.batches = epoch, batches
        return iter(self._workers)


class _BatchSampler(Sampler):
    """A sampler of whole batches: (epoch, image numbers). The workers are persistent, so each batch has its epoch."""

    epoch: int = 0
    batches: list[np.ndarray] = []  # noqa: RUF012 - replaced, never changed

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return zip(itertools.repeat(self.epoch), self.batches)

    def __len__(self) -> int:
        return len(self.batches)
