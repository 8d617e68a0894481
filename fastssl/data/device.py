"""The engine whose workers only decode: crops, flips and colours are made on the device of the batches.

A worker decodes the images of a batch, cuts from each the part that its views need, and sends all parts in one block of
memory. On a GPU that block is copied from page-locked memory in one transfer; `resized_crops_` and `augment_` make the
views there. Draws, windows and pixels are those of the torchvision engine.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastssl.ops import resized_crops_

from .augmentation import Augmentation
from .decoding import ImageFile, open_image
from .draws import draw, mix
from .samples import Samples, fill_in_rows, labels_of, stack_extras
from .source import BadImage, Source, read_extras
from .torchvision import Batches, BatchSampler, change_colours, windows_of
from .workers import Workers

HEADERS = 8  # images whose sizes are looked at to know how much memory a batch takes


class Decoded(NamedTuple):
    """A batch of decoded images, on the CPU."""

    memory: Tensor  # [N] uint8, the parts of the images that their views need, one after the other
    images: Tensor  # [B, 3] int64, of each part: place in the memory, height, width
    windows: Tensor  # [views, B, 4] int64: top, left, height, width in the part
    index: Tensor  # type: ignore[assignment]  # [B] int64; hides the method of a tuple
    label: Tensor  # [B] int64
    seed: Tensor  # [B] int64
    extras: dict[str, Tensor]
    bad: list[tuple[int, str]]


class Engine:
    """Makes batches on a device, from images that worker processes decode.

    Args:
        source: the images.
        augmentation: the views to make of each image.
        seed: seed of all draws.
        workers: processes that decode; 0 decodes in this process.
        device: device on which the views are made.
        fill_in: replace images that can't be decoded by others of the batch; else they are left out.
        batch_size: images of the largest batch.

    Memory: on the device, the parts of the images of a batch, and its views; in page-locked memory and in the shared
        memory of each worker two batches of parts; in a worker also the files of a batch.
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
    ):
        self._augmentation, self._device, self._sampler = augmentation, device, BatchSampler()
        self._batches = Workers(
            Batches(source, augmentation, seed, fill_in, decode_batch),
            workers=workers,
            batch_bytes=batch_size * _mean_bytes(source) if workers else 0,
            batch_size=None,
            sampler=self._sampler,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # as in the torchvision engine
        )

    def run(self, epoch: int, batches: list[np.ndarray]) -> Iterator[Samples]:
        """Makes the batches of these image numbers, in their order. An unfinished earlier run ends."""
        self._sampler.epoch, self._sampler.batches = epoch, batches
        return map(self._make_views, iter(self._batches))

    def _make_views(self, decoded: Decoded) -> Samples:
        """The views of a batch; on a GPU, on the current stream and without waiting for it."""
        images, views = images_in(decoded.memory.to(self._device, non_blocking=True), decoded.images), []
        for number, (view, windows) in enumerate(zip(self._augmentation.views, decoded.windows)):
            pixels = torch.empty(len(images), 3, *view.size, dtype=torch.uint8, device=self._device)
            resized_crops_(pixels, images, windows, view.interpolation)
            change_colours(pixels, view, draw(view, number, decoded.seed.numpy()))
            views.append(pixels)
        return Samples(views, decoded.index, decoded.label, decoded.seed, decoded.extras, decoded.bad)


def decode_batch(
    source: Source, augmentation: Augmentation, seed: int, epoch: int, indices: np.ndarray, fill_in: bool
) -> Decoded:
    """Decodes the images of these numbers [B].

    Memory: holds the files of the batch, the parts that its views need, and the pixels of one image.
    """
    seeds = mix(seed, epoch, indices)
    draws = [draw(view, number, seeds) for number, view in enumerate(augmentation.views)]
    files: dict[int, ImageFile] = {}  # by row of the batch
    bad: list[tuple[int, str]] = []
    for row, index in enumerate(indices.tolist()):
        try:
            files[row] = open_image(source, index)
        except BadImage as error:
            bad.append((index, str(error)))
    windows = {row: np.array(of_views) for row, of_views in windows_of(augmentation, draws, files)}
    boxes = {row: _box(of_views) for row, of_views in windows.items()}
    places = np.cumsum([0, *(3 * height * width for _, _, height, width in boxes.values())]).tolist()
    memory = torch.empty(places[-1], dtype=torch.uint8)
    images: dict[int, tuple[int, int, int]] = {}  # of those that can be decoded: place, height, width
    extras: dict[int, dict[str, np.ndarray]] = {}
    for (row, (top, left, height, width)), place in zip(boxes.items(), places):
        try:
            pixels = files.pop(row).pixels().permute(1, 2, 0)
            extras[row] = read_extras(source, int(indices[row]))
        except BadImage as error:
            bad.append((int(indices[row]), str(error)))
            continue
        images[row] = place, height, width
        part = memory[place : place + 3 * height * width].view(height, width, 3)
        part.copy_(pixels[top : top + height, left : left + width])
        windows[row][:, :2] -= (top, left)
    rows = fill_in_rows(list(images), len(indices)) if bad and fill_in else list(images)
    indices, seeds, no_windows = indices[rows], seeds[rows], np.zeros((0, len(draws), 4), np.int64)
    return Decoded(
        memory,
        torch.tensor([images[row] for row in rows], dtype=torch.int64).view(-1, 3),
        torch.from_numpy(np.array([windows[row] for row in rows]) if rows else no_windows).transpose(0, 1).contiguous(),
        torch.from_numpy(indices),
        labels_of(source, indices),
        torch.from_numpy(seeds),
        stack_extras(source, indices, [extras[row] for row in rows]),
        bad,
    )


def images_in(memory: Tensor, places: Tensor) -> list[Tensor]:
    """Images [H, W, 3] as views of the memory that holds them.

    Args:
        memory: [N] uint8.
        places: [B, 3] int64: where each begins, height, width.
    """
    return [memory[p : p + 3 * height * width].view(height, width, 3) for p, height, width in places.tolist()]


def _box(windows: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, height and width of the smallest part of an image that has all windows [views, 4]."""
    top, left = windows[:, :2].min(0).tolist()
    bottom, right = (windows[:, :2] + windows[:, 2:]).max(0).tolist()
    return top, left, bottom - top, right - left


def _mean_bytes(source: Source) -> int:
    """Bytes of an image's pixels: of all, where they have one size, else the mean of the first that can be opened."""
    if source.size is not None:
        return 3 * source.size[0] * source.size[1]
    sizes = []
    for index in range(min(HEADERS, len(source))):
        with contextlib.suppress(BadImage):
            sizes.append(open_image(source, index).size)
    return sum(3 * height * width for height, width in sizes) // max(1, len(sizes))
