"""Batches of decoded and augmented images, which an engine gives to the loader."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastssl.text import printable

from .source import BadSource, Source

Layout = dict[str, tuple[np.dtype | torch.dtype, tuple[int, ...]]]  # dtype and shape of each array of an image


class Samples(NamedTuple):
    """A batch with uint8 pixels, on the device of the engine."""

    views: list[Tensor]  # one per view of the augmentation, each [B, 3, H, W] uint8
    index: Tensor  # type: ignore[assignment]  # [B] int64; hides the method of a tuple
    label: Tensor  # [B] int64
    seed: Tensor  # [B] int64
    extras: dict[str, Tensor]  # arrays of the source, each [B, …]
    bad: list[tuple[int, str]]  # (number, "PATH: reason") of the images that can't be decoded


class Engine(Protocol):
    """Reads, decodes and augments images: `torchvision.Engine`, `device.Engine` or `dali.Engine`."""

    def run(self, epoch: int, batches: list[np.ndarray]) -> Iterator[Samples]:
        """Makes the batches of these image numbers, in their order. An unfinished earlier run ends."""
        ...


def fill_in_rows(good: list[int], count: int) -> list[int]:
    """The good rows, repeated in turn until there are `count`: a batch keeps its size when images can't be decoded."""
    return (good * count)[:count]


def labels_of(source: Source, indices: np.ndarray) -> Tensor:
    """Labels [B] int64 of the images with these numbers [B]."""
    return torch.tensor([source.label(index) for index in indices.tolist()], dtype=torch.int64)


def stack_extras(source: Source, indices: np.ndarray, extras: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Extras of a batch as tensors [B, …].

    Args:
        source: names the images in errors.
        indices: [B] numbers of the images.
        extras: ``source.extras`` of each of them.

    Raises:
        BadSource: extras are no dict of arrays, differ in keys, shapes or dtypes, or have a dtype that torch lacks.
    """
    layouts = [_layout(arrays, source, index) for index, arrays in zip(indices.tolist(), extras)]
    for index, layout in zip(indices.tolist(), layouts):
        if layout != layouts[0]:
            name, first = (printable(source.name(number)) for number in (index, int(indices[0])))
            raise BadSource(
                f"data: extras must have the same keys, shapes and dtypes for every image, got {describe(layout)} for "
                f"{name} and {describe(layouts[0])} for {first}"
            )
    stacked = {key: np.stack([arrays[key] for arrays in extras]) for key in (layouts[0] if layouts else ())}
    try:
        return {key: torch.from_numpy(array) for key, array in stacked.items()}
    except TypeError as error:
        raise BadSource(f"data: extras must have dtypes that torch has, got {describe(layouts[0])}") from error


def _layout(arrays: dict[str, np.ndarray], source: Source, index: int) -> Layout:
    if not isinstance(arrays, dict):
        got = f"{arrays!r:.80} for {printable(source.name(index))}"
        raise BadSource(f"data: extras must be a dict of NumPy arrays, got {got}")
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):
            got = f"a {type(array).__name__} as {key!r} for {printable(source.name(index))}"
            raise BadSource(f"data: extras must be a dict of NumPy arrays, got {got}")
    return {key: (array.dtype, array.shape) for key, array in arrays.items()}


def describe(layout: Layout) -> str:
    """A layout as text, such as "tokens int64 [77]"."""
    arrays = (f"{key} {str(dtype).removeprefix('torch.')} {list(shape)}" for key, (dtype, shape) in layout.items())
    return ", ".join(arrays) or "none"
