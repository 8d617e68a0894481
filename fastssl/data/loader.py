"""Batches from a source by a recipe, in an order and with augmentations that depend on (seed, epoch, index) alone.

So a run that is resumed in the middle of an epoch sees exactly what it would have seen, whatever the number of workers.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .recipe import Recipe
from .source import BadImage, Source
from .torchvision import augmentation


class Batch(NamedTuple):
    """What a method gets, already on the device."""

    views: tuple[Tensor, ...]  # of the recipe, each [B, 3, H, W] float32, normalised
    index: Tensor  # [B] int64, number of the image in its source
    label: Tensor  # [B] int64, −1 where there is none; for evaluation, never for the loss
    seed: Tensor | None = None  # [B] int64, of (run, epoch, image): what a method draws from it, any rank would draw


class Loader:
    """Endless epochs of batches.

    Args:
        source: the images.
        recipe: the views to make of each.
        batch_size: samples a batch. In training the last, incomplete batch of an epoch is left out.
        seed: of the order and of the augmentations.
        workers: processes that decode and augment; 0 does it in this one.
        device: where the batches go; pixels travel as bytes and become normalised floats there.
        train: shuffled and without the incomplete batch; else in order and complete.
        bad_files: file that images which can't be decoded are named in; in training others of the batch stand in.
        max_bad: share of the source that may be bad; beyond it the run stops.

    Raises:
        ValueError: the batch is larger than the source, or, while iterating, too many images are bad.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        batch_size: int,
        *,
        seed: int = 0,
        workers: int = 0,
        device: torch.device | str = "cpu",
        train: bool = True,
        bad_files: Path | None = None,
        max_bad: float = 0.01,
    ):
        if train and batch_size > len(source):
            raise ValueError(f"data: the batch of {batch_size} is larger than the data, which has {len(source)} images")
        self.device = torch.device(device)
        self.recipe, self.bad_files, self.max_bad, self.total = recipe, bad_files, max_bad, len(source)
        self._bad: set[int] = set()
        self._order = _Order(len(source), batch_size, seed, train)
        self._batches = DataLoader(
            _Samples(source, recipe, seed),
            batch_sampler=self._order,
            num_workers=workers,
            collate_fn=functools.partial(_collate, fill=train),
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else each epoch would draw from the global one, and a resume once more
        )
        self._scale = [
            tuple(torch.tensor(v, device=self.device).view(1, 3, 1, 1) * 255 for v in (view.mean, view.std))
            for view in recipe.views
        ]

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._order)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number`, from batch `start` on."""
        self._order.epoch, self._order.start = number, start
        for views, index, label, seed, bad in self._batches:
            self._note(bad)
            if not len(index) and self._order.train:
                raise ValueError(
                    f"data: none of the {len(bad)} images of a batch can be decoded (the last: {bad[-1][1]})"
                )
            if len(index):
                yield Batch(
                    tuple(self._normalised(view, *scale) for view, scale in zip(views, self._scale)),
                    index.to(self.device, non_blocking=True),
                    label.to(self.device, non_blocking=True),
                    seed.to(self.device, non_blocking=True),
                )

    def _normalised(self, pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return pixels.to(self.device, non_blocking=True).float().sub_(mean).div_(std)

    def _note(self, bad: list[tuple[int, str]]) -> None:
        new = [(index, reason) for index, reason in bad if index not in self._bad]
        if not new:
            return
        self._bad.update(index for index, _ in new)
        if self.bad_files:
            with self.bad_files.open("a") as file:
                file.writelines(f"{reason}\n" for _, reason in new)
        if len(self._bad) > self.max_bad * self.total:
            where = f", see {self.bad_files}" if self.bad_files else ""
            raise ValueError(
                f"data: {len(self._bad)} of {self.total} images can't be decoded, more than the {self.max_bad:.1%} "
                f"allowed{where} (the last: {new[-1][1]})"
            )

    @property
    def bad(self) -> int:
        """Images that could not be decoded so far."""
        return len(self._bad)


class _Order:
    """Batch sampler: lists of (epoch, index). The epoch travels with each index to workers that outlive it."""

    def __init__(self, count: int, batch_size: int, seed: int, train: bool):
        self.count, self.batch_size, self.seed, self.train = count, batch_size, seed, train
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.count // self.batch_size if self.train else -(-self.count // self.batch_size)

    def __iter__(self):
        order = torch.arange(self.count)
        if self.train:
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(_mix(self.seed, self.epoch)))
        for batch in order.split(self.batch_size)[self.start : len(self)]:
            yield [(self.epoch, index) for index in batch.tolist()]


class _Samples(Dataset):
    def __init__(self, source: Source, recipe: Recipe, seed: int):
        self.source, self.seed = source, seed
        self.augment = [augmentation(view) for view in recipe.views]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        try:
            image = self.source.image(index)
        except BadImage as error:
            return index, str(error)
        # The transforms draw from torch's global generator, which is put back for a loader without workers.
        generator = torch.default_generator
        before = generator.get_state()
        seed = _mix(self.seed, epoch, index)
        generator.manual_seed(seed)
        views = [augment(image) for augment in self.augment]
        generator.set_state(before)
        return views, index, self.source.label(index), seed


def _collate(samples: list, fill: bool):
    bad = [sample for sample in samples if len(sample) == 2]
    good = [sample for sample in samples if len(sample) == 4]
    if fill and good:  # others of the batch again in the place of bad ones: a step never sees another batch size
        good = (good * len(samples))[: len(samples)]
    views, *numbers = zip(*good) if good else ((), (), (), ())
    stacked = [torch.stack(view) for view in zip(*views)]
    return stacked, *(torch.tensor(column, dtype=torch.int64) for column in numbers), bad


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers (SplitMix64's finaliser, chained): neighbours get unrelated streams."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state % 2**63
