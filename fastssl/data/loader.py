"""The loader: batches on a device, from a source and an augmentation.

Order and augmentations depend on (seed, epoch, index) alone. So the state of a loader is (epoch, batch): a run that is
resumed in the middle of an epoch gets exactly the batches that it would have got, with any engine and any number of
workers.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastssl.contract import Batch
from fastssl.ops import normalise
from fastssl.text import printable

from .augmentation import Augmentation, View
from .lab import rgb_to_lab
from .order import Order
from .samples import Engine, Layout, Samples, describe
from .source import BadSource, Source
from .token_table import TokenTable
from .workers import choose_kind

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENGINES = ("torchvision", "device", "dali")


class Loader:
    """Batches of augmented images, epoch by epoch.

    Args:
        source: the images.
        augmentation: the views to make of each image.
        batch_size: samples per batch on each rank. Training leaves out the last, incomplete batch of an epoch.
        seed: seed of the order and of the augmentations.
        workers: processes or threads (torchvision, device), or threads (DALI) that decode, and for torchvision and DALI
            augment; 0 works in this process.
        device: device of the batches. Pixels are copied as bytes and become normalised floats there.
        train: shuffle, and leave out the incomplete batch; else the source's order, complete.
        engine: "torchvision", "device" (crops and colours on the device of the batches) or "dali". All have the same
            order and the same draws. Pixels of the first two are equal; DALI's differ slightly, as it resamples by its
            own rules and decodes all JPEGs in full.
        rank, world: number of this rank, and number of ranks, see `Order`.
        bad_files: file to which the names of images that can't be decoded are appended. In training they are replaced
            by others of the batch, in evaluation they are left out.
        max_bad: largest share of the source (of this rank's part of it) that may be bad.
        worker_kind: "process", "thread", or "auto": threads on a Python without its global lock. DALI has threads.
        dtype: dtype of the views: float32, bfloat16 or float16, rounded once.
        tokens: token ids of the source's captions, which become ``extras["tokens"]`` of the batches.

    Raises:
        TypeError: the dtype is another one.
        ValueError: the batch is larger than the source, or the engine is unknown or not installed; while iterating, too
            many images are bad, the source's extras differ between images, or a worker process is lost (`LostWorker`).
    """

    def __init__(
        self,
        source: Source,
        augmentation: Augmentation,
        batch_size: int,
        *,
        seed: int = 0,
        workers: int = 0,
        device: torch.device | str = "cpu",
        train: bool = True,
        engine: str = "torchvision",
        rank: int = 0,
        world: int = 1,
        bad_files: Path | None = None,
        max_bad: float = 0.01,
        worker_kind: str = "auto",
        dtype: torch.dtype = torch.float32,
        tokens: TokenTable | None = None,
    ):
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("world", world, 1)):
            if value < least:
                raise ValueError(f"data: {name} must be at least {least}, got {value}")
        if not 0 <= rank < world:
            raise ValueError(f"data: rank must be one of 0 … {world - 1}, got {rank}")
        if train and batch_size * world > len(source):
            per_rank = f" on each of {world} ranks" if world > 1 else ""
            raise ValueError(
                f"data: the batch of {batch_size}{per_rank} is larger than the data, which has {len(source)} images"
            )
        if dtype not in DTYPES:
            raise TypeError(f"data: dtype must be float32, bfloat16 or float16, got {dtype}".replace("torch.", ""))
        self.device, self.dtype, self.tokens = torch.device(device), dtype, tokens
        self.augmentation, self.bad_files, self.max_bad, self.total = augmentation, bad_files, max_bad, len(source)
        self._bad: set[int] = set()
        self._order = Order(len(source), batch_size, seed, train, source.shards, rank, world)
        self._epochs_begun, self._world = 0, world
        self._layout: Layout | None = None  # of the source's extras, known from the first batch
        lab_views = {view for view in augmentation.views if view.colour_space == "lab"}
        self._lab_constants = {view: self._mean_and_std(view) for view in lab_views}
        self._engine = _build_engine(
            engine,
            source,
            augmentation,
            seed,
            workers=workers,
            worker_kind=choose_kind(worker_kind),
            device=self.device,
            fill_in=train,
            batch_size=batch_size,
        )

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._order)

    @property
    def bad_count(self) -> int:
        """Number of images so far that could not be decoded."""
        return len(self._bad)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number` from batch `start` on, of `len(loader)`. An unfinished earlier epoch ends."""
        if not 0 <= start <= len(self):
            raise ValueError(f"data: start must be a batch of the epoch, 0 … {len(self)}, got {start}")
        self._epochs_begun += 1
        samples = self._check_samples(self._engine.run(number, self._order.batches(number, start)), self._epochs_begun)
        return map(self.to_batch, samples) if self.device.type == "cpu" else self._on_copy_stream(samples)

    def _check_samples(self, batches: Iterator[Samples], epoch_begun: int) -> Iterator[Samples]:
        """The batches with at least one image, once bad images are noted and extras are checked."""
        while True:
            if epoch_begun != self._epochs_begun:
                raise RuntimeError("data: a later epoch ended this one: a loader runs one epoch at a time")
            if (samples := next(batches, None)) is None:
                return
            self._note_bad(samples.bad)
            if len(samples.index):
                self._check_extras(samples)
                yield samples
            elif samples.bad and self._order.train:
                raise ValueError(
                    f"data: none of the {len(samples.bad)} images of a batch can be decoded "
                    f"(the last: {printable(samples.bad[-1][1])})"
                )

    def to_batch(self, samples: Samples) -> Batch:
        """Copies a batch to the device; bytes become normalised floats."""
        views = tuple(
            self._to_floats(pixels.to(self.device, non_blocking=True), view)
            for pixels, view in zip(samples.views, self.augmentation.views)
        )
        # these are copied on a CPU too: a worker makes a later batch in the same memory
        index, label, seed, *extras = (
            tensor.to(self.device, non_blocking=True, copy=True)
            for tensor in (samples.index, samples.label, samples.seed, *samples.extras.values())
        )
        batch = Batch(views, index, label, seed, dict(zip(samples.extras, extras)))
        if self.tokens is not None:  # gathered here: no engine and no worker sees text
            tokens = self.tokens.gather(samples.index, samples.seed)
            batch.extras["tokens"] = tokens.to(self.device, non_blocking=True)
        return batch

    def _to_floats(self, pixels: Tensor, view: View) -> Tensor:
        """Normalised floats [B, 3, H, W] of bytes, in the view's colour space."""
        if view.colour_space == "rgb":
            return normalise(pixels, view.mean, view.std, self.dtype)
        mean, std = self._lab_constants[view]
        return rgb_to_lab(pixels.float() / 255).sub_(mean).div_(std).to(self.dtype)

    def _mean_and_std(self, view: View) -> tuple[Tensor, Tensor]:
        """Constants on the device, made once: making them there waits for it."""
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (view.mean, view.std))
        return mean, std

    def _on_copy_stream(self, batches: Iterator[Samples]) -> Iterator[Batch]:
        """Makes, copies and normalises on a separate stream, while the GPU computes the previous step."""
        stream, copied = torch.cuda.Stream(self.device), torch.cuda.Event()
        previous: Samples | None = None
        while True:
            with torch.cuda.stream(stream):  # on which an engine of the device makes its views
                samples = next(batches, None)
            if samples is None:
                return
            if previous is not None:
                copied.synchronize()  # usually no wait; after it DALI may reuse the memory of the previous samples
            with torch.cuda.stream(stream):
                batch, previous = self.to_batch(samples), samples
                copied.record()
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)
            for tensor in (*batch.views, batch.index, batch.label, batch.seed, *batch.extras.values()):
                if tensor is not None:
                    tensor.record_stream(current)  # its memory may not be reused before the step has read it
            yield batch

    def _check_extras(self, samples: Samples) -> None:
        """Compares extras with those of the first batch; the engines compare them within a batch."""
        layout: Layout = {key: (value.dtype, tuple(value.shape[1:])) for key, value in samples.extras.items()}
        if self._layout is None:
            self._layout = layout
            if self.tokens is not None and "tokens" in layout:
                raise BadSource("data: extras of a source with captions must have other keys than tokens")
        if layout != self._layout:
            raise BadSource(
                f"data: extras must have the same keys, shapes and dtypes for every image, got {describe(layout)} in a "
                f"batch after {describe(self._layout)} in another"
            )

    def _note_bad(self, bad: list[tuple[int, str]]) -> None:
        """Appends new bad images to the file of bad files.

        Raises:
            ValueError: there are more bad images than `max_bad` allows.
        """
        new = [(index, printable(reason)) for index, reason in bad if index not in self._bad]
        if not new:
            return
        self._bad.update(index for index, _ in new)
        if self.bad_files:
            known = set(self.bad_files.read_bytes().splitlines()) if self.bad_files.exists() else set()
            with self.bad_files.open("a", encoding="utf-8") as file:
                file.writelines(f"{reason}\n" for _, reason in new if reason.encode() not in known)
        if len(self._bad) > self.max_bad * self.total / self._world:
            location = f", see {self.bad_files}" if self.bad_files else ""
            raise ValueError(
                f"data: {len(self._bad)} of {self.total} images can't be decoded, more than the {self.max_bad:.1%} "
                f"that max_bad allows{location} (the last: {new[-1][1]})"
            )


def has_dali() -> bool:
    """True if NVIDIA DALI is installed."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def _build_engine(name: str, source: Source, augmentation: Augmentation, seed: int, **options: Any) -> Engine:
    """The engine with this name; `options` are those of the torchvision engine."""
    if name == "torchvision":
        from .torchvision import Engine as TorchvisionEngine

        return TorchvisionEngine(source, augmentation, seed, **options)
    if name == "device":
        from .device import Engine as DeviceEngine

        return DeviceEngine(source, augmentation, seed, **options)
    if name != "dali":
        raise ValueError(f"data: unknown engine {name!r}, there are {', '.join(ENGINES)}")
    if not has_dali():
        raise ValueError("data: the engine dali is not installed: pip install 'fastssl-engine[dali]' (Linux)")
    from .dali import Engine as DaliEngine

    del options["worker_kind"]  # DALI has threads
    return DaliEngine(source, augmentation, seed, threads=max(1, options.pop("workers")), **options)
