"""Where a loader's time goes: each part of its work alone, on a sample, with one thread of this process."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from .augmentation import Augmentation
from .decoding import ImageFile
from .draws import draw_views, mix
from .loader import Loader
from .samples import Samples
from .source import BadImage, Source
from .torchvision import change_colours, decode_images, make_batch

BYTES = 1 << 28  # of a sample at most, as the source gives it


class Parts(NamedTuple):
    """Milliseconds per image of each part of a loader's work, for all views of it."""

    read: float  # wall time, as a disk or a network may be waited for; the others are processor time
    decode: float
    crop: float  # crop, resize, draws and labels
    colours: float  # jitter, grayscale, blur, solarize and flip
    normalise: float  # bytes to normalised floats; with the copy to the GPU, if there is one

    @property
    def a_core(self) -> float:
        """Images per second of one core that does it all; a GPU normalises by itself."""
        return 1000 / sum(self)

    @property
    def a_worker(self) -> float:
        """Images per second of one worker, which does all but normalise."""
        return 1000 / (sum(self) - self.normalise)


class Sample(NamedTuple):
    """Some images of a source."""

    images: Source  # the bytes or pixels that the source gives, in memory
    read: float  # seconds to read them, once: a second time they would come from the system's memory
    sides: list[int]  # shorter side of each, in pixels

    @property
    def side(self) -> int:
        """Median of the shorter sides."""
        return int(np.median(self.sides))


class _InMemory(Source):
    """Images that were read."""

    classes, size, shards = None, None, None

    def __init__(self, images: list[np.ndarray]):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> np.ndarray:
        return self._images[index]

    def name(self, index: int) -> str:
        return f"image {index}"

    def label(self, index: int) -> int:
        return -1


def take_sample(source: Source, count: int, seed: int = 0) -> Sample:
    """Reads images from all over a source, at most `count`, and fewer if they are large.

    Raises:
        ValueError: none of them can be decoded.
    """
    images, sides, seconds, total = [], [], 0.0, 0
    for index in np.random.default_rng(seed).permutation(len(source))[:count].tolist():
        start = time.perf_counter()
        try:
            data = source.read(index)
            seconds += time.perf_counter() - start
            image = ImageFile(data, source.name(index))
            image.raster()
        except BadImage:
            continue
        images.append(data)
        sides.append(min(image.size))
        total += data.nbytes
        if total > BYTES:
            break
    if not images:
        raise ValueError("bench: none of the images to measure can be decoded, see fastssl data check")
    return Sample(_InMemory(images), seconds, sides)


def measure_parts(sample: Sample, augmentation: Augmentation, device: torch.device, seconds: float) -> Parts:
    """Measures each part for about a quarter of `seconds`, and takes the fastest time.

    Images are in memory. Crops take what a whole batch takes longer than decoding and colours alone.
    """
    count = len(sample.sides)
    indices, seeds = np.arange(count), mix(0, 0, np.arange(count))
    views = [torch.empty(count, 3, *view.size, dtype=torch.uint8) for view in augmentation.views]
    draws = draw_views(augmentation, seeds)

    def make() -> Samples:
        return make_batch(sample.images, augmentation, 0, 0, indices, True)

    def decode() -> None:
        for _ in decode_images(sample.images, augmentation, draws, indices, []):
            pass

    def colours() -> None:
        for view, drawn, pixels in zip(augmentation.views, draws, views):
            change_colours(pixels, view, drawn)

    loader, samples = Loader(sample.images, augmentation, count, device=device), make()

    def normalise() -> None:
        loader.to_batch(samples)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with _one_thread():
        work = (make, decode, colours, normalise)
        whole, decoded, coloured, normalised = (_fastest(part, seconds / 4) for part in work)
    parts = (sample.read, decoded, whole - decoded - coloured, coloured, normalised)
    return Parts(*(1000 * max(0.0, part) / count for part in parts))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fastest(part: Callable[[], object], seconds: float) -> float:
    """Least processor time of this thread, in seconds, of several calls."""
    part()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.thread_time()
        part()
        times.append(time.thread_time() - start)
    return min(times)
