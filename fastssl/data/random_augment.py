"""Two of ten changes of a view, drawn at random: ALBEF's RandomAugment, of strength 7 of 10.

Each is applied with probability 1/2, after the flip, to bytes, and gives bytes. Some of them move or brighten an image,
so they contradict captions that name places or brightness.

Source: Cubuk et al., "RandAugment", 2020, section 3; Li et al., 2021 (ALBEF), section 3.4, and its code.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

COUNT = 2  # changes of an image
PROBABILITY = 0.5  # of each to be applied
FACTOR = 1.36  # of brightness and sharpness
SHEAR, SHIFT, ANGLE = 0.21, 7, math.radians(21)  # pixels a row, pixels, and radians, to either side
FILL = 128.0  # of what comes from beyond the border


def auto_contrast(x: Tensor) -> Tensor:
    """Each channel stretched along a line from its darkest and brightest value to 0 and 255."""
    flat = x.flatten(2).float()
    low, high = flat.amin(2)[..., None, None], flat.amax(2)[..., None, None]
    return torch.where(high > low, (x - low) * 255 / (high - low).clamp(min=1), x.float())


def equalize(x: Tensor) -> Tensor:
    """Each channel with values of nearly even frequency, by Pillow's integer rule."""
    planes = x.flatten(0, 1).flatten(1).long()
    ones = planes.new_ones(1).expand_as(planes)
    counts = planes.new_zeros(len(planes), 256).scatter_add_(1, planes, ones)
    brightest = planes.amax(1, keepdim=True)
    step = (planes.shape[1] - counts.gather(1, brightest)) // 255
    below = counts.cumsum(1) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=x.device))
    return table.gather(1, planes).view(x.shape).float()


def brightness(x: Tensor) -> Tensor:
    """All values times a factor."""
    return x * FACTOR


def sharpness(x: Tensor) -> Tensor:
    """Differences from a smooth copy times a factor, but for the pixels of the border."""
    out = x.float()
    if min(x.shape[2:]) < 3:
        return out
    kernel = torch.ones(3, 1, 3, 3, device=x.device)
    kernel[:, :, 1, 1] = 5
    smooth = (F.conv2d(out, kernel, groups=3) / 13).round_()
    inner = out[:, :, 1:-1, 1:-1]
    inner.copy_(smooth + FACTOR * (inner - smooth))
    return out


POINTWISE: tuple[Callable[[Tensor], Tensor], ...] = (auto_contrast, equalize, brightness, sharpness)
MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
CHANGES = ("identity", *(change.__name__ for change in POINTWISE), *MOVES)


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
        for number, change in enumerate(POINTWISE, 1):
            _replace(pixels, np.flatnonzero(abs(column) == number), change)
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
        return (F.grid_sample(x - FILL, grid, align_corners=False) + FILL).round_()


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
        changed = change(pixels[where])
        pixels[where] = changed.clamp_(0, 255).to(torch.uint8)
