"""The engine on NVIDIA's DALI: on a GPU the files are decoded and augmented there, and the pixels never leave it.

The graph takes what chance decided (`draws.py`) as inputs, so it makes the same views as the other engine, but for what
two ways to resample differ. What few samples drew (blur, solarize, jitter) is computed for those alone.

On a CPU, DALI decodes and resamples, and `augment_` does the colours: the exact turn of a hue takes DALI's CPU
operators 9 ms an image. `colours_in_graph=True` gives a CPU the whole graph of a GPU, which tests compare with.
"""

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

from fastssl.ops import augment_
from fastssl.ops.augment import BRIGHTNESS, CONTRAST, LUMA, SATURATION

from . import torchvision
from .augmentation import Augmentation, View
from .decoding import open_image
from .draws import Draws, draw, mix, windows
from .samples import Samples, stand_in
from .source import BadImage, Source

AHEAD = 2  # batches that are being made while another is used
# EXIF's orientation: whether rows and columns are exchanged, then left and right, then top and bottom.
TURNS = {1: (False, False, False), 2: (False, True, False), 3: (False, True, True), 4: (False, False, True),
         5: (True, False, False), 6: (True, True, False), 7: (True, True, True), 8: (True, False, True)}  # fmt: skip
INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


class Engine:
    """Makes batches by DALI.

    Args:
        source, augmentation, seed: what to read, what to make of it, and the seed of all draws.
        batch_size: images of the largest batch.
        threads: of the CPU, for reading and for DALI's operators.
        device: where the batches are made and stay.
        fill: others of the batch stand in for images that can't be decoded.
        colours_in_graph: DALI does the colours; always so on a GPU.
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
        fill: bool,
        colours_in_graph: bool = False,
    ):
        self.source, self.augmentation, self.seed, self.fill = source, augmentation, seed, fill
        self.colours = colours_in_graph or device.type == "cuda"
        gpu = None if device.type == "cpu" else device.index
        if device.type == "cuda" and gpu is None:
            gpu = torch.cuda.current_device()
        self._built = {"batch_size": batch_size, "num_threads": threads, "device_id": gpu, "prefetch_queue_depth": 1}
        self._pipeline: Pipeline | None = None
        self._under_way: deque[_Read] = deque()
        self._broken: dict[int, BadImage] = {}  # images that broke a pipeline: they shall do so once
        self._refused: set[int] = set()  # images that DALI can't decode, and Pillow can
        self._readers = ThreadPoolExecutor(2 * threads)

    def run(self, epoch: int, batches: list[np.ndarray]) -> Iterator[Samples]:
        """Makes these batches of image numbers, in their order. Ends a run that was left in its middle."""
        if self._under_way:  # what is in the pipeline belongs to nobody
            self._pipeline = None
        under_way = self._under_way = deque()
        for batch in batches:
            under_way.append(self._start(self._read(epoch, batch)))
            if len(under_way) > AHEAD:
                yield self._finish(under_way)
        while under_way:
            yield self._finish(under_way)

    def _read(self, epoch: int, batch: np.ndarray) -> "_Read":
        """The files of a batch. Those of other formats than JPEG are decoded here: DALI does not know all of them."""
        seeds = mix(self.seed, epoch, batch)
        files, bad = [], []
        for index, file in zip(batch.tolist(), self._readers.map(self._read_one, batch.tolist())):
            if isinstance(file, BadImage):
                bad.append((index, str(file)))
            files.append(file)
        good = [i for i, file in enumerate(files) if not isinstance(file, BadImage)]
        rows = stand_in(good, len(batch)) if self.fill else good
        draws = [draw(view, number, seeds).take(rows) for number, view in enumerate(self.augmentation.views)]
        inputs = dict(self._inputs([files[row] for row in rows], draws)) if rows else {}
        return _Read(epoch, batch, inputs, batch[rows], seeds[rows], draws, bad)

    def _read_one(self, index: int) -> "_File | BadImage":
        if index in self._broken:
            return self._broken[index]
        try:
            opened = open_image(self.source, index)
            if opened.format in ("JPEG", "MPO") and index not in self._refused:  # MPO: more pictures behind a JPEG
                return _File(opened.data, opened.size, opened.orientation)
            return _File(opened.pixels().permute(1, 2, 0).numpy(), opened.size)
        except BadImage as error:
            return error

    def _start(self, read: "_Read") -> "_Read":
        if read.inputs:
            self._pipeline = self._pipeline or _graph(self.augmentation, self.colours, **self._built)
            for name, column in read.inputs.items():
                self._pipeline.feed_input(name, column)
            self._pipeline.schedule_run()
        return read

    def _inputs(self, files: "list[_File]", draws: list[Draws]) -> Iterator[tuple[str, list[np.ndarray]]]:
        nothing, black = np.zeros(1, np.uint8), np.zeros((1, 1, 3), np.uint8)
        is_file = [file.data.ndim == 1 for file in files]
        yield "is_file", [np.array(x) for x in is_file]
        yield "file", [file.data if x else nothing for x, file in zip(is_file, files)]
        yield "pixels", [black if x else file.data for x, file in zip(is_file, files)]
        turns = np.array([TURNS[file.orientation] for file in files])
        yield "is_turned", [np.array(turn.any()) for turn in turns]
        yield "transposed", [np.array(turn[0]) for turn in turns]
        yield "mirrored", [np.array(turn[1], np.int32) for turn in turns]
        yield "upside_down", [np.array(turn[2], np.int32) for turn in turns]
        sizes = np.array([file.size for file in files])
        for number, (view, drawn) in enumerate(zip(self.augmentation.views, draws)):
            window = windows(view, drawn, sizes).astype(np.int32)
            yield f"start {number}", list(window[:, :2])
            yield f"end {number}", list(window[:, :2] + window[:, 2:])
            if self.colours:
                jittered = (drawn.jitter != np.float32([1, 1, 1, 0])).any(axis=1)
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

    def _finish(self, under_way: "deque[_Read]") -> Samples:
        """The oldest batch under way."""
        read = under_way.popleft()
        labels = torch.tensor([self.source.label(index) for index in read.index.tolist()], dtype=torch.int64)
        numbers = torch.from_numpy(read.index), labels, torch.from_numpy(read.seed)
        if not read.inputs:
            return Samples([], *numbers, read.bad)
        try:
            outputs = self._pipeline.share_outputs()
        except RuntimeError as error:
            return self._recovered(read, under_way, error)
        views = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        self._pipeline.release_outputs()  # dlpack keeps the memory alive
        if not self.colours:
            for view, drawn, pixels in zip(self.augmentation.views, read.draws, views):
                augment_(pixels, *map(torch.from_numpy, drawn.colours), grey_first=view.grayscale_first)
        return Samples(views, *numbers, read.bad)

    def _recovered(self, read: "_Read", under_way: "deque[_Read]", error: RuntimeError) -> Samples:
        """A batch that broke the pipeline, by the other engine, which names what can't be decoded. What Pillow decodes
        and DALI does not is found by trying each file alone, and decoded by Pillow from then on."""
        self._pipeline = None
        made = torchvision.make(self.source, self.augmentation, self.seed, read.epoch, read.batch, self.fill)
        self._broken |= {index: BadImage(reason) for index, reason in made.bad}
        files = dict(zip(read.index.tolist(), read.inputs["file"]))
        refused = {index for index, file in files.items() if index not in self._broken and not self._decodes(file)}
        if not made.bad and not refused:
            raise error
        self._refused |= refused
        again = [self._start(self._read(later.epoch, later.batch)) for later in under_way]
        under_way.clear()
        under_way.extend(again)
        return made

    def _decodes(self, file: np.ndarray) -> bool:
        if len(file) < 2:  # the place of one that is no JPEG
            return True
        alone = _decoding(**{**self._built, "batch_size": 1})
        alone.feed_input("file", [file])
        try:
            alone.run()
        except RuntimeError:
            return False
        return True


class _File(NamedTuple):
    data: np.ndarray  # bytes [N] of a JPEG, or pixels [H, W, 3]
    size: tuple[int, int]  # (height, width) as it is shown
    orientation: int = 1  # EXIF's


class _Read(NamedTuple):
    epoch: int
    batch: np.ndarray  # image numbers that were asked for
    inputs: dict[str, list[np.ndarray]]  # of the graph, which reads them where they lie: they must outlive it
    index: np.ndarray
    seed: np.ndarray
    draws: list[Draws]  # of each view
    bad: list[tuple[int, str]]


@pipeline_def(enable_conditionals=True, exec_dynamic=True)
def _graph(augmentation: Augmentation, colours: bool):
    """The views of a batch, each [B, 3, H, W] uint8. Decoded once, however many views there are."""
    on_gpu = Pipeline.current().device_id is not None
    pixels = _input("pixels", types.UINT8, 3, layout="HWC")
    if _input("is_file", types.BOOL, 0):
        image = _decoded(_input("file", types.UINT8, 1), on_gpu)
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
        made = fn.resize(window, size=view.size, interp_type=INTERPOLATION[view.interpolation], antialias=True)
        if colours:
            views.append(_coloured(made, view, number, on_gpu))
        else:
            views.append(fn.transpose(made, perm=[2, 0, 1]))
    return tuple(views)


@pipeline_def(exec_dynamic=True)
def _decoding():
    """One file alone."""
    return _decoded(_input("file", types.UINT8, 1), Pipeline.current().device_id is not None)


def _decoded(file: DataNode, on_gpu: bool) -> DataNode:
    """As it was stored: DALI, unlike Pillow, knows EXIF alone, and only where all of it is sound."""
    return fn.decoders.image(file, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False)


def _input(name: str, dtype: types.DALIDataType, ndim: int, **more) -> DataNode:
    return fn.external_source(name=name, dtype=dtype, ndim=ndim, no_copy=True, **more)


def _coloured(x: DataNode, view: View, number: int, on_gpu: bool) -> DataNode:
    """The contract of `fastssl.ops.augment_` in DALI's operators."""
    grey = _input(f"grey {number}", types.BOOL, 0)
    x = fn.cast(x, dtype=types.FLOAT)
    if view.grayscale_first:
        x = _greyed(x, grey)
    if _input(f"jittered {number}", types.BOOL, 0):
        order, factors = _input(f"order {number}", types.INT32, 1), _input(f"jitter {number}", types.FLOAT, 1)
        factors = factors.gpu() if on_gpu else factors
        for place in range(4):
            x = _jittered(x, order[place], factors)
    if not view.grayscale_first:
        x = _greyed(x, grey)
    if _input(f"blurred {number}", types.BOOL, 0):
        x = fn.gaussian_blur(x, sigma=_input(f"sigma {number}", types.FLOAT, 0))
    x = fn.cast(x, dtype=types.UINT8)  # rounds
    if _input(f"solarize {number}", types.BOOL, 0):
        x = dm.min(x, types.Constant(255, types.UINT8) - x)  # 255 − x where x ≥ 128
    return fn.crop_mirror_normalize(
        x, dtype=types.UINT8, output_layout="CHW", mirror=_input(f"flip {number}", types.INT32, 0)
    )


def _jittered(x: DataNode, step: DataNode, factors: DataNode) -> DataNode:
    if step == BRIGHTNESS:
        x = dm.clamp(x * factors[0], 0.0, 255.0)
    elif step == CONTRAST:
        x = _blend(x, fn.reductions.mean(_luma(x), axes=[0, 1], keep_dims=True), factors[1])
    elif step == SATURATION:
        x = _blend(x, _luma(x), factors[2])
    else:
        x = _hue_turned(x, factors[3])
    return x


def _greyed(x: DataNode, grey: DataNode) -> DataNode:
    if grey:
        luma = _luma(x)
        x = fn.cat(luma, luma, luma, axis=2)
    return x


def _luma(x: DataNode) -> DataNode:
    red, green, blue = LUMA
    return x[:, :, 0:1] * red + x[:, :, 1:2] * green + x[:, :, 2:3] * blue


def _blend(x: DataNode, other: DataNode, factor: DataNode) -> DataNode:
    return dm.clamp((x - other) * factor + other, 0.0, 255.0)


def _hue_turned(x: DataNode, turns: DataNode) -> DataNode:
    """See `fastssl.ops.augment`: fn.hue turns about the grey axis instead, up to 90 of 255 away from that."""
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
