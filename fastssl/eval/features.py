"""Features of a whole source, computed once."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastssl.data.augmentation import evaluation
from fastssl.data.loader import Loader
from fastssl.data.source import Source
from fastssl.distributed import all_gather, all_gather_object, rank, world_size
from fastssl.nn import ViT


@torch.no_grad()
def extract(
    features: Callable[[Tensor], Tensor],
    source: Source,
    size: tuple[int, int],
    *,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
    engine: str = "torchvision",
    part: tuple[int, int] = (0, 1),
) -> tuple[Tensor, Tensor, Tensor]:
    """(features [N, F] float32, labels [N], indices [N]) of every image that can be decoded, in `size`.

    `features` maps normalised images [B, 3, H, W] to [B, F]; a method's ``features`` in evaluation mode does. Of images
    it sees the middle, undistorted, 224 pixels of a side of 256; those that are no larger than `size`, as much as its
    aspect admits. `part` is (rank, world): which images to take, where each rank extracts some; N may be 0 there.
    """
    small = source.size is not None and max(source.size) <= max(size)
    augmentation = evaluation(size, centre=1.0 if small else 0.875)
    number, world = part
    loader = Loader(
        source,
        augmentation,
        batch_size,
        workers=workers,
        device=device,
        train=False,
        engine=engine,
        rank=number,
        world=world,
        max_bad=world,
    )
    parts = [(features(batch.views[0]).float(), batch.label, batch.index) for batch in loader.epoch(0)]
    if not parts and world == 1:
        raise ValueError("features: none of the images can be decoded")
    if not parts:  # the others must know how wide nothing is
        none = torch.empty(0, dtype=torch.int64, device=device)
        return features(torch.zeros(1, 3, *size, device=device))[:0].float(), none, none
    return tuple(torch.cat(column) for column in zip(*parts))


def extract_together(
    features: Callable[[Tensor], Tensor], source: Source, size: tuple[int, int], **where
) -> tuple[Tensor, Tensor]:
    """`extract`'s (features, labels) on every rank alike, in the source's order; each extracts its part."""
    mine = extract(features, source, size, part=(rank(), world_size()), **where)
    x, labels, index = map(all_gather_uneven, mine)
    if not len(x):
        raise ValueError("features: none of the images can be decoded")
    order = index.argsort()
    return x[order], labels[order]


def all_gather_uneven(x: Tensor) -> Tensor:
    """[B, …] of every rank, B different on each, → all of them in rank order; no gradient."""
    sizes = all_gather_object(len(x))
    if len(sizes) == 1:
        return x
    padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])])
    return torch.cat([theirs[:size] for theirs, size in zip(all_gather(padded).chunk(len(sizes)), sizes)])


def features_of(method: nn.Module, pool: str | None = None) -> Callable[[Tensor], Tensor]:
    """The method's ``features``; with `pool` "token" or "avg" those of its ViT, pooled that way.

    Raises:
        ValueError: `pool` is given and there is no ViT.
    """
    if pool is None:
        return method.features
    if (vit := vit_of(method)) is None:
        raise ValueError(f"eval: --pool is for ViTs, and {type(method).__name__} has another backbone here")
    return functools.partial(vit.features, pool=pool)


def vit_of(method: nn.Module) -> ViT | None:
    """The encoder if it is a `ViT`: a MAE itself, of a MoCo v3 the base encoder."""
    return next((m for m in (method, getattr(method, "base_encoder", None)) if isinstance(m, ViT)), None)
