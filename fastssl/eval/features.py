"""Features of a whole source, computed once."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastssl.data.loader import Loader
from fastssl.data.recipe import evaluation
from fastssl.data.source import Source


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(features [N, F] float32, labels [N], indices [N]) of every image that can be decoded, in `size`.

    `features` maps normalised images [B, 3, H, W] to [B, F]; a method's ``features`` in evaluation mode does. Of images
    it sees the middle, undistorted, 224 pixels of a side of 256; those that are no larger than `size`, as much as its
    aspect admits.
    """
    small = source.size is not None and max(source.size) <= max(size)
    recipe = evaluation(size, centre=1.0 if small else 0.875)
    loader = Loader(source, recipe, batch_size, workers=workers, device=device, train=False, engine=engine, max_bad=1.0)
    parts = [(features(batch.views[0]).float(), batch.label, batch.index) for batch in loader.epoch(0)]
    if not parts:
        raise ValueError("features: none of the images can be decoded")
    return tuple(torch.cat(column) for column in zip(*parts))
