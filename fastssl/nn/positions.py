"""Fixed positional tables of MAE and MoCo v3, and interpolation of a table for another grid of patches."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops.dispatch import acc_dtype


def sincos_positions(dim: int, grid: tuple[int, int], prefix_tokens: int = 1, row_first: bool = False) -> Tensor:
    """Fixed positional table [1, prefix_tokens + rows·columns, dim], float32 from float64 arithmetic.

    One half of the dims encodes the column, the other the row; each half is sin and then cos of
    position / 10000^(i / (dim/4)). MAE has the column in the first half (its comment says the reverse), MoCo v3 the
    row: the tables are not interchangeable.

    Args:
        dim: divisible by 4.
        grid: rows and columns of patches.
        prefix_tokens: rows of zeros in front, for tokens without a position: class token, registers.
        row_first: MoCo v3's order of the halves; MAE's if False.

    Source: Vaswani et al., 2017, section 3.5, in two dimensions; He et al., 2021 (MAE), appendix A.1; Chen et al., 2021
        (MoCo v3), section 4.3.
    """
    if dim % 4:
        raise ValueError(f"sincos_positions: dim must be divisible by 4, got {dim}")
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid)
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    order = (row, column) if row_first else (column, row)
    halves = [torch.outer(coordinate.flatten(), omega) for coordinate in order]
    table = torch.cat([part for half in halves for part in (half.sin(), half.cos())], dim=1).float()
    return torch.cat([torch.zeros(prefix_tokens, dim), table]).unsqueeze(0)


def interpolate_positions(
    table: Tensor,
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    prefix_tokens: int = 1,
    antialias: bool = True,
    offset: float = 0.0,
) -> Tensor:
    """A positional table for another grid of patches, bicubic in float32 (float64 for float64). Gradient to `table`.

    Args:
        table: [1, prefix_tokens + rows·columns, D]. The rows of prefix tokens stay.
        grid, new_grid: rows and columns of patches.
        antialias: smooth where the new grid is smaller: True in timm and DINOv2's models with registers, False in MAE.
        offset: the scale is (new + offset) / old instead of new / old: 0.1 in DINO, iBOT and DINOv2's models without
            registers, whose positions differ by it.

    Returns: [1, prefix_tokens + new rows·columns, D] in the dtype of `table`; `table` itself where the grids are equal.

    Source: Dosovitskiy et al., 2021 (ViT), section 3.2: interpolation when the resolution changes.
    """
    if tuple(grid) == tuple(new_grid):
        return table
    image = table[:, prefix_tokens:].to(acc_dtype(table)).transpose(1, 2).unflatten(2, tuple(grid))
    size = {"size": tuple(new_grid)}
    if offset:
        size = {"scale_factor": tuple((new + offset) / old for old, new in zip(grid, new_grid))}
    image = F.interpolate(image, **size, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([table[:, :prefix_tokens], image.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def fit_positions(table: Tensor, grid: tuple[int, int], prefix_tokens: int = 1) -> Tensor:
    """A checkpoint's positional table for a model with another grid of patches, interpolated as in MAE's code.

    A fixed table (`sincos_positions`) is recognised and interpolated from the grid it was made for, even if the number
    of patches is the same. Any other table is returned unchanged if its length fits, else taken for a square grid.

    Args:
        table: [1, prefix_tokens + L, D].
        grid: rows and columns of patches in the model.

    Returns: [1, prefix_tokens + rows·columns, D].

    Raises:
        ValueError: the table is not a fixed one, and its L neither fits nor is a square.
    """
    length = table.shape[1] - prefix_tokens
    fixed = _fixed_grid(table, prefix_tokens)
    if fixed is None and length == grid[0] * grid[1]:
        return table
    side = math.isqrt(max(0, length))
    if fixed is None and side * side != length:
        raise ValueError(
            f"positions: a table of {length} patches that is neither fixed nor of a square can't be fitted to another "
            "grid: interpolate it yourself, or build the model for the image size it was trained with"
        )
    return interpolate_positions(table, fixed or (side, side), grid, prefix_tokens, antialias=False)


def _fixed_grid(table: Tensor, prefix_tokens: int) -> tuple[int, int] | None:
    """The grid for which `table` is a fixed table; None if it is not a fixed table."""
    length, dim = table.shape[1] - prefix_tokens, table.shape[2]
    for rows in (n for n in range(1, length + 1) if length % n == 0 and dim % 4 == 0):
        for row_first in (False, True):
            fixed = sincos_positions(dim, (rows, length // rows), prefix_tokens, row_first).to(table)
            if torch.allclose(table, fixed, atol=1e-2):
                return rows, length // rows
    return None
