"""Contact sheet of a augmentation: a row for each image, its views side by side, as many draws as fit."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .augmentation import Augmentation, View
from .loader import Loader
from .source import Source, Subset

GAP = 4  # pixels between tiles


def sheet(
    source: Source, augmentation: Augmentation, engine: str, rows: int = 4, columns: int = 4, seed: int = 0
) -> Image.Image:
    """`rows` images from all over the source, each in `columns` draws (epochs) of all views of the augmentation.

    What a method would see, with the normalisation undone. Images that can't be decoded are left out.
    """
    chosen = Subset(source, np.linspace(0, len(source) - 1, min(rows, len(source))).astype(int).tolist())
    loader = Loader(chosen, augmentation, rows, seed=seed, engine=engine, max_bad=1.0, train=False)
    shown = [batch for epoch in range(columns) for batch in loader.epoch(epoch)]  # one an epoch
    if not shown:
        raise ValueError("data: none of the images to show can be decoded")
    columns_of_tiles = [
        _bytes(pixels, view) for batch in shown for pixels, view in zip(batch.views, augmentation.views)
    ]
    tiles = list(zip(*columns_of_tiles))
    width = max(sum(tile.shape[2] + GAP for tile in row) for row in tiles) - GAP
    height = sum(max(tile.shape[1] for tile in row) + GAP for row in tiles) - GAP
    canvas, top = Image.new("RGB", (width, height), (255, 255, 255)), 0
    for row in tiles:
        left = 0
        for tile in row:
            canvas.paste(Image.fromarray(tile.permute(1, 2, 0).numpy()), (left, top))
            left += tile.shape[2] + GAP
        top += max(tile.shape[1] for tile in row) + GAP
    return canvas


def _bytes(pixels: Tensor, view: View) -> Tensor:
    mean, std = (torch.tensor(np.float32(values)).view(1, 3, 1, 1) for values in (view.mean, view.std))
    return ((pixels.cpu() * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)
