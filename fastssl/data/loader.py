"""Batches on the device, from a source by a augmentation.

Order and augmentations depend on (seed, epoch, index) alone. So the state of a loader is (epoch, batch): a run that is
resumed in the middle of an epoch sees exactly what it would have seen, whatever the engine and the number of workers.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch

from fastssl.contract import Batch

from .augmentation import Augmentation
from .order import Order
from .samples import Samples
from .source import Source

ENGINES = ("torchvision", "dali")


class Loader:
    """Endless epochs of batches.

    Args:
        source: the images.
        augmentation: the views to make of each.
        batch_size: samples a batch, on each rank. In training the last, incomplete batch of an epoch is left out.
        seed: of the order and of the augmentations.
        workers: processes (torchvision) or threads (dali) that decode and augment; 0 does it in this process.
        device: where the batches go; pixels travel as bytes and become normalised floats there.
        train: shuffled and without the incomplete batch; else in order and complete.
        engine: "torchvision" or "dali". Same order, same draws; pixels differ by what two ways to resample differ.
        rank, world: which part of every batch is wanted, see `Order`.
        bad_files: file that images which can't be decoded are named in; in training others of the batch stand in.
        max_bad: share of the source (of a rank's part of it) that may be bad; beyond it the run stops.

    Raises:
        ValueError: the batch is larger than the source, an engine is unknown or not installed, or, while iterating, too
            many images are bad.
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
    ):
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("world", world, 1)):
            if value < least:
                raise ValueError(f"data: {name} must be at least {least}, got {value}")
        if not 0 <= rank < world:
            raise ValueError(f"data: rank must be one of 0 … {world - 1}, got {rank}")
        if train and batch_size * world > len(source):
            each = f" on each of {world} ranks" if world > 1 else ""
            raise ValueError(
                f"data: the batch of {batch_size}{each} is larger than the data, which has {len(source)} images"
            )
        self.device = torch.device(device)
        self.augmentation, self.bad_files, self.max_bad, self.total = augmentation, bad_files, max_bad, len(source)
        self._bad: set[int] = set()
        self._order = Order(len(source), batch_size, seed, train, source.shards, rank, world)
        self._runs, self._world = 0, world
        self._engine = _build_engine(engine, source, augmentation, batch_size, seed, workers, self.device, train)
        self._scale = [
            tuple(torch.tensor(v, device=self.device).view(1, 3, 1, 1) * 255 for v in (view.mean, view.std))
            for view in augmentation.views
        ]

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._order)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number`, `len(loader)` of them, from batch `start` on. It ends one still under way."""
        if not 0 <= start <= len(self):
            raise ValueError(f"data: start must be a batch of the epoch, 0 … {len(self)}, got {start}")
        self._runs += 1
        samples = self._checked(self._engine.run(number, self._order.batches(number, start)), self._runs)
        return map(self._batch, samples) if self.device.type == "cpu" else self._beside_the_step(samples)

    def _checked(self, made: Iterator[Samples], run: int) -> Iterator[Samples]:
        while True:
            if run != self._runs:
                raise RuntimeError("data: this epoch was ended by a later one: a loader has one under way at a time")
            if (samples := next(made, None)) is None:
                return
            self._note(samples.bad)
            if len(samples.index):
                yield samples
            elif samples.bad and self._order.train:
                raise ValueError(
                    f"data: none of the {len(samples.bad)} images of a batch can be decoded "
                    f"(the last: {samples.bad[-1][1]})"
                )

    def _batch(self, samples: Samples) -> Batch:
        """Bytes to normalised floats, on the device."""
        views = (
            view.to(self.device, non_blocking=True).float().sub_(mean).div_(std)
            for view, (mean, std) in zip(samples.views, self._scale)
        )
        numbers = (samples.index, samples.label, samples.seed)  # copied: shared memory of a worker holds a file open
        return Batch(tuple(views), *(tensor.to(self.device, non_blocking=True, copy=True) for tensor in numbers))

    def _beside_the_step(self, made: Iterator[Samples]) -> Iterator[Batch]:
        """On a stream of its own: copy and normalisation pass while the GPU still computes the step before."""
        stream, read, before = torch.cuda.Stream(self.device), torch.cuda.Event(), None
        for samples in made:
            if before is not None:
                read.synchronize()  # long done; until then DALI may not have its memory back
            with torch.cuda.stream(stream):
                batch, before = self._batch(samples), samples
                read.record()
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(stream)
            for tensor in (*batch.views, *batch[1:]):
                tensor.record_stream(computing)  # its memory may not be used again before the step is through with it
            yield batch

    def _note(self, bad: list[tuple[int, str]]) -> None:
        new = [(index, reason) for index, reason in bad if index not in self._bad]
        if not new:
            return
        self._bad.update(index for index, _ in new)
        if self.bad_files:
            known = set(self.bad_files.read_text().splitlines()) if self.bad_files.exists() else set()
            with self.bad_files.open("a") as file:
                file.writelines(f"{reason}\n" for _, reason in new if reason not in known)
        if len(self._bad) > self.max_bad * self.total / self._world:
            where = f", see {self.bad_files}" if self.bad_files else ""
            raise ValueError(
                f"data: {len(self._bad)} of {self.total} images can't be decoded, more than the {self.max_bad:.1%} "
                f"that max_bad allows{where} (the last: {new[-1][1]})"
            )

    @property
    def bad(self) -> int:
        """Images that could not be decoded so far."""
        return len(self._bad)


def has_dali() -> bool:
    """True where NVIDIA's DALI is installed."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def _build_engine(name, source, augmentation, batch_size, seed, workers, device, train):
    if name == "torchvision":
        from .torchvision import Engine

        return Engine(source, augmentation, seed, workers=workers, pin=device.type == "cuda", fill=train)
    if name != "dali":
        raise ValueError(f"data: unknown engine {name!r}, there are {', '.join(ENGINES)}")
    if not has_dali():
        raise ValueError("data: the engine dali is not installed: pip install 'fastssl-engine[dali]' (Linux)")
    from .dali import Engine

    return Engine(source, augmentation, seed, batch_size=batch_size, threads=max(1, workers), device=device, fill=train)
