"""The engine on NVIDIA DALI: on a GPU, files are decoded and augmented there, and the pixels never leave it.

The graph gets the random draws (`draws.py`) as inputs, so it makes the same views as the other engine, except for small
differences in resampling. Blur, solarize and jitter are computed only for the samples that need them.

On a CPU, DALI decodes and resamples, and `augment_` changes the colours: the exact rotation of a hue takes DALI's CPU
operators 9 ms per image. `colours_in_graph=True` runs the whole graph of a GPU on a CPU, for comparisons in tests.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dm
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from fastssl.ops import ColourLaw
from fastssl.ops.augment import BRIGHTNESS, CONTRAST, LUMA, SATURATION

from . import torchvision
from .augmentation import Augmentation, View
from .decoding import open_image
from .draws import Draws, draw_views, mix, windows_of_views
from .random_augment import random_augment_
from .samples import Samples, fill_in_rows, labels_of, stack_extras
from .source import BadImage, Source, read_extras

PREFETCH = 2  # number of batches in the pipeline while another one is used
# EXIF's orientation: whether to transpose, then to mirror left and right, then to mirror top and bottom.
ORIENTATIONS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC, "lanczos": types.INTERP_LANCZOS3}


class _Image(NamedTuple):
    """An image as input of the graph."""

    data: np.ndarray  # bytes [N] of a JPEG, or pixels [H, W, 3]
    size: tuple[int, int]  # (height, width) of the upright image
    orientation: int  # EXIF's orientation of the JPEG
    extras: dict[str, np.ndarray]


class _Pending(NamedTuple):
    """A batch in the pipeline."""

    epoch: int
    requested: np.ndarray  # image numbers, bad images included
    inputs: dict[str, list[np.ndarray]]  # of the graph, which reads them in place: they must outlive its run
    indices: np.ndarray  # image numbers of the samples
    seeds: np.ndarray
    draws: list[Draws]  # of each view
    extras: dict[str, torch.Tensor]
    bad: list[tuple[int, str]]


class Engine:
    """Makes batches with DALI.

    Args:
        source: the images.
        augmentation: the views to make of each image.
        seed: seed of all draws.
        batch_size: images of the largest batch.
        threads: threads of the CPU, for DALI's operators; twice as many read files.
        device: device on which the batches are made.
        fill_in: replace images that can't be decoded by others of the batch; else they are left out.
        colours_in_graph: change the colours with DALI's operators, not by `augment_`; by default on a GPU alone.
    """

    def __init__(
        self,
        source: Source,
        augmentation: Augmentation,
        seed: int,
        *,
        batch_size: int,
        threads: int,
        device: torch.device,
        fill_in: bool,
        colours_in_graph: bool | None = None,
    ):
        self.source, self.seed, self.fill_in = source, seed, fill_in
        self.augmentation = dataclasses.replace(augmentation, reduced=False)  # in `_recover` too: DALI decodes in full
        self.colours = device.type == "cuda" if colours_in_graph is None else colours_in_graph
        gpu = None if device.type == "cpu" else device.index
        if device.type == "cuda" and gpu is None:
            gpu = torch.cuda.current_device()
        self._options = {"batch_size": batch_size, "num_threads": threads, "device_id": gpu, "prefetch_queue_depth": 1}
        self._pipeline: Pipeline | None = None
        self._pending: deque[_Pending] = deque()
        self._broken: dict[int, BadImage] = {}  # images that broke a pipeline, kept out of the next ones
        self._refused: set[int] = set()  # images that Pillow decodes and DALI does not
        self._readers = ThreadPoolExecutor(2 * threads)

    def run(self, epoch: int, batches: list[np.ndarray]) -> Iterator[Samples]:
        """Makes the batches of these image numbers, in their order. An unfinished earlier run ends."""
        if self._pending:  # its batches are in the pipeline: discard them with it
            self._pipeline = None
        pending = self._pending = deque()
        for batch in batches:
            pending.append(self._start(self._read(epoch, batch)))
            if len(pending) > PREFETCH:
                yield self._finish(pending)
        while pending:
            yield self._finish(pending)

    def _read(self, epoch: int, batch: np.ndarray) -> _Pending:
        """Reads the files of a batch. Formats other than JPEG are decoded here, since DALI lacks some of them."""
        seeds = mix(self.seed, epoch, batch)
        good: dict[int, _Image] = {}  # by row of the batch
        bad: list[tuple[int, str]] = []
        for row, image in enumerate(self._readers.map(self._read_image, batch.tolist())):
            if isinstance(image, BadImage):
                bad.append((int(batch[row]), str(image)))
            else:
                good[row] = image
        rows = fill_in_rows(list(good), len(batch)) if self.fill_in else list(good)
        images = [good[row] for row in rows]
        draws = [drawn.take(rows) for drawn in draw_views(self.augmentation, seeds)]
        inputs = dict(self._inputs(images, draws)) if images else {}
        extras = stack_extras(self.source, batch[rows], [image.extras for image in images])
        return _Pending(epoch, batch, inputs, batch[rows], seeds[rows], draws, extras, bad)

    def _read_image(self, index: int) -> _Image | BadImage:
        if index in self._broken:
            return self._broken[index]
        try:
            file, extras = open_image(self.source, index), read_extras(self.source, index)
            if file.format in ("JPEG", "MPO") and index not in self._refused:  # MPO: a JPEG followed by more pictures
                return _Image(file.data, file.size, file.orientation, extras)
            return _Image(file.pixels().permute(1, 2, 0).numpy(), file.size, 1, extras)
        except BadImage as error:
            return error

    def _start(self, batch: _Pending) -> _Pending:
        """Hands a batch to the pipeline."""
        if batch.inputs:
            self._pipeline = self._pipeline or _graph(self.augmentation, self.colours, **self._options)
            for name, column in batch.inputs.items():
                self._pipeline.feed_input(name, column)
            self._pipeline.schedule_run()
        return batch

    def _inputs(self, images: list[_Image], draws: list[Draws]) -> Iterator[tuple[str, list[np.ndarray]]]:
        """(name, a value for each sample) of the graph's inputs."""
        no_file, no_pixels = np.zeros(1, np.uint8), np.zeros((1, 1, 3), np.uint8)
        is_file = [image.data.ndim == 1 for image in images]
        yield "is_file", [np.array(x) for x in is_file]
        yield "file", [image.data if x else no_file for x, image in zip(is_file, images)]
        yield "pixels", [no_pixels if x else image.data for x, image in zip(is_file, images)]
        turns = np.array([ORIENTATIONS[image.orientation] for image in images])
        yield "is_turned", [np.array(turn.any()) for turn in turns]
        yield "transposed", [np.array(turn[0]) for turn in turns]
        yield "mirrored", [np.array(turn[1], np.int32) for turn in turns]
        yield "upside_down", [np.array(turn[2], np.int32) for turn in turns]
        sizes = np.array([image.size for image in images])
        found = windows_of_views(self.augmentation, draws, sizes)
        for number, (window, drawn) in enumerate(zip(found, draws)):
            window = window.astype(np.int32)
            yield f"start {number}", list(window[:, :2])
            yield f"end {number}", list(window[:, :2] + window[:, 2:])
            if self.colours:
                jittered = (drawn.jitter != np.array([1, 1, 1, 0], np.float32)).any(axis=1)
                fields = {
                    "jitter": drawn.jitter,
                    "order": drawn.order.astype(np.int32),
                    "grey": drawn.grey,
                    "jittered": jittered,
                    "blurred": drawn.sigma > 0,
                    "sigma": np.maximum(drawn.sigma, 1e-3),
                    "solarize": drawn.solarize,
                    "flip": drawn.flip.astype(np.int32),
                }
                yield from ((f"{name} {number}", list(map(np.asarray, column))) for name, column in fields.items())

    def _finish(self, pending: deque[_Pending]) -> Samples:
        """Takes the oldest batch out of the pipeline."""
        batch, views = pending.popleft(), []
        if batch.inputs:
            assert self._pipeline is not None
            try:
                outputs = self._pipeline.share_outputs()
            except RuntimeError as error:
                return self._recover(batch, pending, error)
            views = [torch.from_dlpack(output.as_tensor()) for output in outputs]
            self._pipeline.release_outputs()  # dlpack keeps the memory alive
            for view, drawn, pixels in zip(self.augmentation.views, batch.draws, views):
                if self.colours:
                    random_augment_(pixels, drawn.changes)
                else:
                    torchvision.change_colours(pixels, view, drawn)
        indices, seeds = torch.from_numpy(batch.indices), torch.from_numpy(batch.seeds)
        return Samples(views, indices, labels_of(self.source, batch.indices), seeds, batch.extras, batch.bad)

    def _recover(self, batch: _Pending, pending: deque[_Pending], error: RuntimeError) -> Samples:
        """Makes a batch that broke the pipeline with the other engine, which finds the images that can't be decoded.

        An image that Pillow decodes and DALI does not is found by decoding each file alone; Pillow decodes it from then
        on.
        """
        self._pipeline = None
        samples = torchvision.make_batch(
            self.source, self.augmentation, self.seed, batch.epoch, batch.requested, self.fill_in
        )
        self._broken |= {index: BadImage(reason) for index, reason in samples.bad}
        files = dict(zip(batch.indices.tolist(), batch.inputs["file"]))
        refused = {index for index, file in files.items() if index not in self._broken and not self._decodes(file)}
        if not samples.bad and not refused:
            raise error
        self._refused |= refused
        restarted = [self._start(self._read(later.epoch, later.requested)) for later in pending]
        pending.clear()
        pending.extend(restarted)
        return samples

    def _decodes(self, file: np.ndarray) -> bool:
        """True if DALI decodes a file, tried alone."""
        if len(file) < 2:  # a placeholder: DALI gets pixels for this image
            return True
        pipeline = _decoding(**{**self._options, "batch_size": 1})
        pipeline.feed_input("file", [file])
        try:
            pipeline.run()
        except RuntimeError:
            return False
        return True


@pipeline_def(enable_conditionals=True, exec_dynamic=True)
def _graph(augmentation: Augmentation, colours: bool) -> tuple[DataNode, ...]:
    """The views of a batch, each [B, 3, H, W] uint8. An image is decoded once for all its views."""
    on_gpu = Pipeline.current().device_id is not None
    pixels = _input("pixels", types.UINT8, 3, layout="HWC")
    if _input("is_file", types.BOOL, 0):
        image = _decode(_input("file", types.UINT8, 1), on_gpu)
    else:
        image = pixels.gpu() if on_gpu else pixels
    if _input("is_turned", types.BOOL, 0):
        if _input("transposed", types.BOOL, 0):
            image = fn.transpose(image, perm=[1, 0, 2], transpose_layout=False)
        image = fn.flip(
            image, horizontal=_input("mirrored", types.INT32, 0), vertical=_input("upside_down", types.INT32, 0)
        )
    views = []
    for number, view in enumerate(augmentation.views):
        window = fn.slice(
            image,
            start=_input(f"start {number}", types.INT32, 1),
            end=_input(f"end {number}", types.INT32, 1),
            axes=[0, 1],
        )
        resized = fn.resize(window, size=view.size, interp_type=INTERPOLATION[view.interpolation], antialias=True)
        if colours:
            views.append(_change_colours(resized, view, number, on_gpu))
        else:
            views.append(fn.transpose(resized, perm=[2, 0, 1]))
    return tuple(views)


@pipeline_def(exec_dynamic=True)
def _decoding() -> DataNode:
    """Decodes a single file."""
    return _decode(_input("file", types.UINT8, 1), Pipeline.current().device_id is not None)


def _decode(file: DataNode, on_gpu: bool) -> DataNode:
    """Pixels of a file as stored: DALI reads the orientation from undamaged EXIF only, Pillow also from XMP."""
    return fn.decoders.image(file, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False)


def _input(name: str, dtype: types.DALIDataType, ndim: int, layout: str | None = None) -> DataNode:
    return fn.external_source(name=name, dtype=dtype, ndim=ndim, layout=layout, no_copy=True)


def _change_colours(x: DataNode, view: View, number: int, on_gpu: bool) -> DataNode:
    """Equals `fastssl.ops.augment_`, in DALI's operators."""
    grey, law = _input(f"grey {number}", types.BOOL, 0), torchvision.law_of(view)
    x = fn.cast(x, dtype=types.FLOAT)
    if view.grayscale_first:
        x = _grayscale(x, grey, law)
    if _input(f"jittered {number}", types.BOOL, 0):
        order, factors = _input(f"order {number}", types.INT32, 1), _input(f"jitter {number}", types.FLOAT, 1)
        factors = factors.gpu() if on_gpu else factors
        for position in range(4):
            x = _jitter(x, order[position], factors, law)
    if not view.grayscale_first:
        x = _grayscale(x, grey, law)
    if _input(f"blurred {number}", types.BOOL, 0):
        x = _blur(x, _input(f"sigma {number}", types.FLOAT, 0), law.blur_radius(view.size[0]), view.size)
    x = fn.cast(x, dtype=types.UINT8)  # rounds
    if _input(f"solarize {number}", types.BOOL, 0):
        x = dm.min(x, types.Constant(255, types.UINT8) - x)  # 255 − x where x ≥ 128
    return fn.crop_mirror_normalize(
        x, dtype=types.UINT8, output_layout="CHW", mirror=_input(f"flip {number}", types.INT32, 0)
    )


def _jitter(x: DataNode, step: DataNode, factors: DataNode, law: ColourLaw) -> DataNode:
    if step == BRIGHTNESS:
        x = dm.clamp(x + (factors[0] - 1.0) * 255.0 if law.additive else x * factors[0], 0.0, 255.0)
    elif step == CONTRAST:
        kept = x if law.tensorflow else _luma(x)
        x = _blend(x, fn.reductions.mean(kept, axes=[0, 1], keep_dims=True), factors[1])
    elif step == SATURATION:
        x = _saturate(x, factors[2]) if law.tensorflow else _blend(x, _luma(x), factors[2])
    else:
        x = _rotate_hue(x, factors[3])
    return x


def _blur(x: DataNode, sigma: DataNode, radius: int | None, size: tuple[int, int]) -> DataNode:
    """Gaussian blur; with a radius there are zeros beyond the border, which is reflected otherwise."""
    if radius is None:
        return fn.gaussian_blur(x, sigma=sigma)
    height, width = size
    if radius == 0:
        return x
    padded = _window(x, -radius, (height + 2 * radius, width + 2 * radius))
    return _window(fn.gaussian_blur(padded, sigma=sigma, window_size=2 * radius + 1), radius, size)


def _window(x: DataNode, start: int, size: tuple[int, int]) -> DataNode:
    """A window of an image, with zeros outside of it."""
    return fn.slice(
        x, start=[start, start], shape=list(size), axes=[0, 1], out_of_bounds_policy="pad", fill_values=[0.0]
    )


def _grayscale(x: DataNode, grey: DataNode, law: ColourLaw) -> DataNode:
    if grey:
        luma = _luma(x, law.luma)
        x = fn.cat(luma, luma, luma, axis=2)
    return x


def _luma(x: DataNode, weights: tuple[float, float, float] = LUMA) -> DataNode:
    red, green, blue = weights
    return x[:, :, 0:1] * red + x[:, :, 1:2] * green + x[:, :, 2:3] * blue


def _blend(x: DataNode, other: DataNode, factor: DataNode) -> DataNode:
    return dm.clamp((x - other) * factor + other, 0.0, 255.0)


def _saturate(x: DataNode, factor: DataNode) -> DataNode:
    """Saturation in HSV times a factor, as in `fastssl.ops.augment`."""
    red, green, blue = x[:, :, 0:1], x[:, :, 1:2], x[:, :, 2:3]
    top, low = dm.max(dm.max(red, green), blue), dm.min(dm.min(red, green), blue)
    scale = dm.min(top / dm.max(top - low, 1e-6), factor)
    return dm.clamp(top - (top - x) * scale, 0.0, 255.0)


def _rotate_hue(x: DataNode, turns: DataNode) -> DataNode:
    """Rotation of the hue as in `fastssl.ops.augment`. fn.hue rotates about the grey axis: up to 90 of 255 apart."""
    red, green, blue = x[:, :, 0:1], x[:, :, 1:2], x[:, :, 2:3]
    top, low = dm.max(dm.max(red, green), blue), dm.min(dm.min(red, green), blue)
    spread = top - low
    is_red = fn.cast(red == top, dtype=types.FLOAT)
    is_green = fn.cast(green == top, dtype=types.FLOAT) * (1.0 - is_red)
    sixths = (
        (green - blue) * is_red
        + (blue - red + 2.0 * spread) * is_green
        + (red - green + 4.0 * spread) * (1.0 - is_red - is_green)
    )
    hue = sixths / dm.max(spread, 1e-6) + 6.0 * turns
    channels = []
    for start in (5.0, 3.0, 1.0):
        k = hue + start
        k = k - dm.floor(k * (1 / 6)) * 6.0
        channels.append(top - spread * dm.clamp(dm.min(k, 4.0 - k), 0.0, 1.0))
    return fn.cat(*channels, axis=2)
