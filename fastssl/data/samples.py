"""What an engine hands to the loader."""

from typing import NamedTuple

from torch import Tensor


class Samples(NamedTuple):
    """A batch in bytes."""

    views: list[Tensor]  # of the augmentation, each [B, 3, H, W] uint8
    index: Tensor  # [B] int64
    label: Tensor  # [B] int64
    seed: Tensor  # [B] int64
    bad: list[tuple[int, str]]  # images that could not be decoded, and why


def stand_in(good: list[int], count: int) -> list[int]:
    """`count` rows out of the good ones, each as often as the others: a step never sees another batch size."""
    return (good * count)[:count]
