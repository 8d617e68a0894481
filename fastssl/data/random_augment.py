"""Two of ten changes of a view, drawn at random: ALBEF's RandomAugment, of strength 7 of 10.

Each is applied with probability 1/2, after the flip, to bytes, and gives bytes. Some of them move or brighten an image,
so they contradict captions that name places or brightness.

Source: Cubuk et al., "RandAugment", 2020, section 3; Li et al., 2021 (ALBEF), section 3.4, and its code.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.extras import need

COUNT = 2  # changes of an image
PROBABILITY = 0.5  # of each to be applied
FACTOR = 1.36  # of brightness and sharpness
SHEAR, SHIFT, ANGLE = 0.21, 7, math.radians(21)  # pixels a row, pixels, and radians, to either side
FILL = 128.0  # of what comes from beyond the border


POINTWISE = ("auto_contrast", "equalize", "brightness", "sharpness")
MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
CHANGES = ("identity", *POINTWISE, *MOVES)


def auto_contrast(x: Tensor) -> Tensor:
    """Each channel of uint8 images stretched from its darkest and brightest value to 0 and 255. In whole numbers, as in
    Pillow; torchvision divides twice and misses it by 1 in more pixels."""
    flat = x.flatten(2).int()
    low, high = flat.amin(2)[..., None, None], flat.amax(2)[..., None, None]
    return torch.where(high > low, (x - low) * 255 // (high - low).clamp(min=1), x).to(torch.uint8)


@functools.cache
def _pointwise() -> tuple[Callable[[Tensor], Tensor], ...]:
    """The operators of `POINTWISE`, from uint8 to uint8; torchvision's are loaded when needed, since that takes
    a second."""
    name = "torchvision.transforms.v2.functional"
    v2: Any = need(name, what="random_augment", extra="train", distribution="torchvision")
    brightness = functools.partial(v2.adjust_brightness, brightness_factor=FACTOR)
    return auto_contrast, v2.equalize, brightness, functools.partial(v2.adjust_sharpness, sharpness_factor=FACTOR)


def draw_changes(uniform: np.ndarray) -> np.ndarray:
    """Numbers of `CHANGES` [B, COUNT] int64, 0 for none, from uniform numbers [B, 3 · COUNT] in [0, 1).

    Those of moves to the other side are negative.
    """
    kind, chance, side = np.split(uniform, 3, axis=1)
    number = (kind * len(CHANGES)).astype(np.int64)
    return np.where(chance < PROBABILITY, np.where(side < 0.5, number, -number), 0)


def random_augment_(pixels: Tensor, changes: np.ndarray) -> None:
    """Changes views, in place. The host does not wait for a device.

    Args:
        pixels: [B, 3, H, W] uint8.
        changes: [B, COUNT] of `draw_changes`, made one after the other.
    """
    for column in changes.T:
        for number in np.intersect1d(abs(column), range(1, len(POINTWISE) + 1)):
            _replace(pixels, np.flatnonzero(abs(column) == number), _pointwise()[number - 1])
        _replace(pixels, moved := np.flatnonzero(abs(column) > len(POINTWISE)), _Move(column[moved]))


class _Move:
    """Moves the pixels of images, bilinearly.

    Args:
        numbers: [R] of `CHANGES`, negative to the other side.
    """

    def __init__(self, numbers: np.ndarray):
        self.numbers = numbers

    def __call__(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        maps = torch.from_numpy(np.stack([_source(int(number), height, width) for number in self.numbers]))
        rows, columns = (torch.arange(n, dtype=torch.float32, device=x.device) for n in (height, width))
        at = torch.stack([*torch.meshgrid(columns, rows, indexing="xy"), columns.new_ones(height, width)])
        sides = torch.tensor([[width], [height]], dtype=torch.float32)
        maps = (2 * maps + torch.tensor([0, 0, 1])) / sides - torch.tensor([0, 0, 1])  # from pixels to −1 … 1
        grid = torch.einsum("rij,jhw->rhwi", maps.to(x.device, non_blocking=True), at)
        return (F.grid_sample(x - FILL, grid, align_corners=False) + FILL).round_().clamp_(0, 255).to(torch.uint8)


def _source(number: int, height: int, width: int) -> np.ndarray:
    """The matrix [2, 3] float32 from a pixel (x, y, 1) to the place in the image where its value comes from."""
    move, sign = CHANGES[abs(number)], math.copysign(1, number)
    matrix = np.eye(2, 3)
    if move == "rotate":
        c, s = math.cos(ANGLE), math.sin(sign * ANGLE)
        centre = np.array([width / 2, height / 2])
        matrix[:, :2] = [[c, -s], [s, c]]
        matrix[:, 2] = centre - matrix[:, :2] @ centre
        return matrix.astype(np.float32)
    row = int(move.endswith("_y"))
    column, amount = (2, SHIFT) if move.startswith("translate") else (1 - row, -SHEAR)
    matrix[row, column] = sign * amount
    return matrix.astype(np.float32)


def _replace(pixels: Tensor, rows: np.ndarray, change: Callable[[Tensor], Tensor]) -> None:
    """Writes what a change makes of some images over them."""
    if len(rows):
        where = torch.from_numpy(rows).to(pixels.device, non_blocking=True)
        pixels[where] = change(pixels[where])
