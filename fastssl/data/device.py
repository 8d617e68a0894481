"""The engine whose workers only decode: crops, flips and colours are made on the device of the batches.

A worker decodes the images of a batch, cuts from each the part that its views need, and sends all parts in one block of
memory. On a GPU that block is copied from page-locked memory in one transfer; `resized_crops_` and `augment_` make the
views there. Draws, windows and pixels are those of the torchvision engine.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastssl.ops import resized_crops_
from fastssl.ops.crops import planes_of

from .augmentation import Augmentation
from .draws import draw_views, mix
from .samples import Samples, fill_in_rows, labels_of, stack_extras
from .shared import empty
from .source import Source
from .torchvision import Batches, BatchStream, change_colours, decode_images


class Decoded(NamedTuple):
    """A batch of decoded images, on the CPU."""

    memory: Tensor  # [N] uint8, the parts of the images that their views need, one after the other
    images: Tensor  # [B, 4] int64, where each part is in the memory, see `images_in`
    windows: Tensor  # [views, B, 4] float64: top, left, height, width in the part
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
        workers: processes or threads that decode; 0 decodes in this process.
        device: device on which the views are made.
        fill_in: replace images that can't be decoded by others of the batch; else they are left out.
        batch_size: images of the largest batch.
        worker_kind: "process" or "thread".

    Memory: on the device, the parts of the images of a batch, and its views; in page-locked memory and in the shared
        memory of each worker two batches of parts.
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
        self._augmentation, self._device = augmentation, device
        batch_bytes = 3 * batch_size * math.prod(source.size) if source.size else 0  # at most, where it is known
        batches = Batches(source, augmentation, seed, fill_in, decode_batch)
        self._stream = BatchStream(batches, batch_bytes, workers, worker_kind, device)

    def run(self, epoch: int, batches: list[np.ndarray]) -> Iterator[Samples]:
        """Makes the batches of these image numbers, in their order. An unfinished earlier run ends."""
        return map(self._make_views, self._stream.run(epoch, batches))

    def _make_views(self, decoded: Decoded) -> Samples:
        """The views of a batch; on a GPU, on the current stream and without waiting for it."""
        images, views = images_in(decoded.memory.to(self._device, non_blocking=True), decoded.images), []
        draws = draw_views(self._augmentation, decoded.seed.numpy())
        for view, drawn, windows in zip(self._augmentation.views, draws, decoded.windows):
            pixels = torch.empty(len(images), 3, *view.size, dtype=torch.uint8, device=self._device)
            resized_crops_(pixels, images, windows, view.interpolation)
            change_colours(pixels, view, drawn)
            views.append(pixels)
        return Samples(views, decoded.index, decoded.label, decoded.seed, decoded.extras, decoded.bad)


def decode_batch(
    source: Source, augmentation: Augmentation, seed: int, epoch: int, indices: np.ndarray, fill_in: bool
) -> Decoded:
    """Decodes the images of these numbers [B].

    Memory: holds the files and pixels that `decode_images` does, and twice the parts that the views need.
    """
    seeds = mix(seed, epoch, indices)
    draws = draw_views(augmentation, seeds)
    parts: dict[int, Tensor] = {}  # by row of the batch, of the images that can be decoded
    windows: dict[int, Tensor] = {}
    extras: dict[int, dict[str, np.ndarray]] = {}
    bad: list[tuple[int, str]] = []
    for row, pixels, in_pixels, arrays in decode_images(source, augmentation, draws, indices, bad):
        parts[row], windows[row] = cut(pixels, torch.tensor(in_pixels, dtype=torch.float64))
        extras[row] = arrays
    good = list(parts)
    rows = fill_in_rows(good, len(indices)) if bad and fill_in else good
    images = dict(zip(good, _places(list(parts.values()))))
    memory = empty(sum(part.numel() for part in parts.values()))
    torch.cat([memory[:0], *(parts.pop(row).flatten() for row in good)], out=memory)
    indices, seeds, no_windows = indices[rows], seeds[rows], torch.zeros(len(draws), 0, 4, dtype=torch.float64)
    return Decoded(
        memory,
        torch.tensor([images[row] for row in rows], dtype=torch.int64).view(-1, 4),
        torch.stack([windows[row] for row in rows], 1) if rows else no_windows,
        torch.from_numpy(indices),
        labels_of(source, indices),
        torch.from_numpy(seeds),
        stack_extras(source, indices, [extras[row] for row in rows]),
        bad,
    )


def cut(image: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of the smallest part of an image that has all windows, and the windows in it.

    Args:
        image: RGB [H, W, 3], or planes [3·H/2, W]: then the part has even sides and begins at even pixels.
        windows: [views, 4] float64: top, left, height, width.
    """
    step = 1 if image.ndim == 3 else 2
    corner = (windows[:, :2].amin(0) / step).floor() * step
    end = ((windows[:, :2] + windows[:, 2:]).amax(0) / step).ceil() * step
    (top, left), (bottom, right) = corner.long().tolist(), end.long().tolist()
    moved = windows - torch.cat([corner, torch.zeros(2)])
    if image.ndim == 3:
        return image[top:bottom, left:right].clone(memory_format=torch.contiguous_format), moved
    luma, *chroma = planes_of(image)
    planes = [luma[top:bottom, left:right], *(x[top // 2 : bottom // 2, left // 2 : right // 2] for x in chroma)]
    return torch.cat([plane.flatten() for plane in planes]).view(-1, right - left), moved


def images_in(memory: Tensor, places: Tensor) -> list[Tensor]:
    """Images, RGB [H, W, 3] or planes [3·H/2, W], as views of the memory that holds them.

    Args:
        memory: [N] uint8.
        places: [B, 4] int64: where each begins, and its shape; 0 as the third number of that for planes.
    """
    return [
        memory[place : place + rows * columns * (channels or 1)].view((rows, columns, channels)[: 3 if channels else 2])
        for place, rows, columns, channels in places.tolist()
    ]


def _places(images: list[Tensor]) -> list[tuple[int, ...]]:
    """The rows of `images_in`'s table for images that lie one after the other."""
    ends = np.cumsum([image.numel() for image in images]).tolist()
    return [(end - image.numel(), *image.shape, *[0] * (3 - image.ndim)) for end, image in zip(ends, images)]
