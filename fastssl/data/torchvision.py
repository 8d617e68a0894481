"""The engine for every machine and every source: worker processes decode once, torchvision resamples every view of it,
and `augment_` does the colours of a whole batch."""

import gc
import itertools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastssl.ops import augment_

from .augmentation import Augmentation, View
from .decoding import Opened, open_image
from .draws import Draws, draw, mix, windows
from .samples import Samples, stand_in
from .source import BadImage, Source

HELD = 16  # files of a batch that are in memory at a time


class Engine:
    """Makes batches by torchvision.

    Args:
        source, augmentation, seed: what to read, what to make of it, and the seed of all draws.
        workers: processes that make batches; 0 makes them here, with torch's threads.
        pin: into page-locked memory, from which a GPU fetches while the host goes on.
        fill: others of the batch stand in for images that can't be decoded.
    """

    def __init__(self, source: Source, augmentation: Augmentation, seed: int, *, workers: int, pin: bool, fill: bool):
        self._plan, self._forks = _Plan(), workers > 0
        self._batches = DataLoader(
            _Maker(source, augmentation, seed, fill),
            batch_size=None,
            sampler=self._plan,
            num_workers=workers,
            collate_fn=_as_it_is,
            persistent_workers=workers > 0,
            pin_memory=pin,
            worker_init_fn=_keep_garbage,
            generator=torch.Generator(),  # else each epoch would draw from the global one, and a resume once more
        )

    def run(self, epoch: int, batches: list[np.ndarray]) -> Iterator[Samples]:
        """Makes these batches of image numbers, in their order."""
        self._plan.epoch, self._plan.batches = epoch, batches
        if self._forks:  # once: the workers stay
            gc.collect()
            self._forks = False
        return iter(self._batches)


def make(source: Source, augmentation: Augmentation, seed: int, epoch: int, indices: np.ndarray, fill: bool) -> Samples:
    """One batch. Files are held a few at a time and pixels one at a time: large photographs would fill the memory."""
    seeds = mix(seed, epoch, indices)
    draws = [draw(view, number, seeds) for number, view in enumerate(augmentation.views)]
    views = [torch.empty(len(indices), 3, *view.size, dtype=torch.uint8) for view in augmentation.views]
    good, bad = [], []
    for first in range(0, len(indices), HELD):
        opened: dict[int, Opened] = {}  # by the row of the batch
        for row in range(first, min(first + HELD, len(indices))):
            try:
                opened[row] = open_image(source, int(indices[row]))
            except BadImage as error:
                bad.append((int(indices[row]), str(error)))
        for row, shown in _windows(augmentation, draws, opened):
            try:
                pixels = opened[row].pixels()
            except BadImage as error:
                bad.append((int(indices[row]), str(error)))
                continue
            good.append(row)
            for view, window, made in zip(augmentation.views, shown, views):
                made[row] = resampled(pixels, view, window)
    if bad:
        rows = stand_in(good, len(indices)) if fill else good
        indices, seeds = indices[rows], seeds[rows]
        views, draws = [view[rows] for view in views], [drawn.take(rows) for drawn in draws]
    for view, drawn, made in zip(augmentation.views, draws, views):
        augment_(made, *map(torch.from_numpy, drawn.colours), grey_first=view.grayscale_first)
    labels = np.array([source.label(index) for index in indices.tolist()], dtype=np.int64)
    return Samples(views, *map(torch.from_numpy, (indices, labels, seeds)), bad)


def resampled(image: Tensor, view: View, window: list[int]) -> Tensor:
    """[3, h, w]: the window (top, left, height, width) of an image [3, H, W] in the view's size, antialiased."""
    top, left, height, width = window
    shown = image[None, :, top : top + height, left : left + width]
    return F.interpolate(shown, view.size, mode=view.interpolation, antialias=True)[0]


def _windows(augmentation: Augmentation, draws: list[Draws], opened: dict[int, Opened]) -> Iterator[tuple[int, tuple]]:
    """(row, the window of each view) of opened images; of several at once, since numpy's calls take long."""
    rows, sizes = list(opened), np.array([image.size for image in opened.values()]).reshape(-1, 2)
    shown = [windows(view, drawn.take(rows), sizes).tolist() for view, drawn in zip(augmentation.views, draws)]
    return zip(rows, zip(*shown))


class _Plan:
    """A sampler of whole batches. The epoch travels with each to workers that outlive it."""

    epoch, batches = 0, ()

    def __iter__(self):
        return zip(itertools.repeat(self.epoch), self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _keep_garbage(worker: int) -> None:
    """What was garbage when a worker was forked is not collected there: the end of a pipeline of DALI would wait for
    its threads, which a fork does not have."""
    gc.freeze()


class _Maker(Dataset):
    """A data set whose samples are whole batches."""

    def __init__(self, source: Source, augmentation: Augmentation, seed: int, fill: bool):
        self.source, self.augmentation, self.seed, self.fill = source, augmentation, seed, fill

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Samples:
        return make(self.source, self.augmentation, self.seed, *key, self.fill)


def _as_it_is(samples: Samples) -> Samples:
    return samples
