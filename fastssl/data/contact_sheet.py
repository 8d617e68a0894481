"""Contact sheet of an augmentation: one row per image, with the views of several draws side by side."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .augmentation import Augmentation, View
from .loader import Loader
from .source import Source, Subset

GAP = 4  # pixels between tiles


def make_contact_sheet(
    source: Source, augmentation: Augmentation, engine: str, rows: int = 4, columns: int = 4, seed: int = 0
) -> Image.Image:
    """A picture of the views that a method gets, with the normalisation undone.

    Args:
        source: images, of which `rows` are shown, evenly spread over the source; bad ones are left out.
        augmentation: all its views are shown.
        engine: one of `loader.ENGINES`.
        rows: number of images.
        columns: number of draws (epochs) of each image.
        seed: seed of the draws.

    Raises:
        ValueError: none of the images can be decoded.
    """
    indices = shown_images(source, rows)
    loader = Loader(Subset(source, indices), augmentation, rows, seed=seed, engine=engine, max_bad=1.0, train=False)
    batches = [batch for epoch in range(columns) for batch in loader.epoch(epoch)]  # one batch per epoch
    if not batches:
        raise ValueError("data: none of the images to show can be decoded")
    tiles_by_column = [
        _to_bytes(pixels, view) for batch in batches for pixels, view in zip(batch.views, augmentation.views)
    ]
    tiles_by_row = list(zip(*tiles_by_column))
    width = max(sum(tile.shape[2] + GAP for tile in row) for row in tiles_by_row) - GAP
    height = sum(max(tile.shape[1] for tile in row) + GAP for row in tiles_by_row) - GAP
    canvas, top = Image.new("RGB", (width, height), (255, 255, 255)), 0
    for row in tiles_by_row:
        left = 0
        for tile in row:
            canvas.paste(Image.fromarray(tile.permute(1, 2, 0).numpy()), (left, top))
            left += tile.shape[2] + GAP
        top += max(tile.shape[1] for tile in row) + GAP
    return canvas


def shown_images(source: Source, rows: int) -> list[int]:
    """Numbers of the images in the rows of a contact sheet, but for bad ones."""
    return np.linspace(0, len(source) - 1, min(rows, len(source))).astype(int).tolist()


def _to_bytes(pixels: Tensor, view: View) -> Tensor:
    """Bytes of normalised pixels; of L, a and b as if they were red, green and blue, each over its whole range."""
    if view.colour_space == "lab":
        return ((pixels.cpu() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
    mean, std = (torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1) for values in (view.mean, view.std))
    return ((pixels.cpu() * std + mean) * 255).round_().clamp_(0, 255).to(torch.uint8)
