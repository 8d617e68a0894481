"""Fixed positional tables of MAE and MoCo v3, and fitting a table to another grid."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_positions(dim: int, grid: tuple[int, int], cls_token: bool = True, row_first: bool = False) -> Tensor:
    """Fixed positional table [1, (1 +) rows·columns, dim], float32 from float64 arithmetic.

    One half of the dims encodes the column, the other the row; each half is sin and then cos of
    position / 10000^(i / (dim/4)). The class token's row is zero. MAE has the column in the first half (its comment
    says the reverse), MoCo v3 the row: the tables are not interchangeable.

    Args:
        dim: divisible by 4.
        grid: rows and columns of patches.
        cls_token: begin with a row of zeros for the class token.
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
    halves = [torch.outer(place.flatten(), omega) for place in order]
    table = torch.cat([part for half in halves for part in (half.sin(), half.cos())], dim=1).float()
    return torch.cat([torch.zeros(int(cls_token), dim), table]).unsqueeze(0)


def fit_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A positional table [1, 1 + L, D] of another grid, interpolated to [1, 1 + rows·columns, D].

    The class token's row stays. One of the fixed tables above tells the grid it was made for, even where another grid
    has as many patches. Any other table is left alone where its L fits, and is taken for that of a square where not.

    Raises:
        ValueError: the table is not a fixed one, and its L neither fits nor is a square.

    Source: Dosovitskiy et al., 2021 (ViT), section 3.2: interpolation when the resolution changes; bicubic as in MAE.
    """
    length = table.shape[1] - 1
    known = _fixed_grid(table)
    if known == tuple(grid) or (known is None and length == grid[0] * grid[1]):
        return table
    side = math.isqrt(length)
    if known is None and side * side != length:
        raise ValueError(
            f"positions: a table of {length} patches that is neither fixed nor of a square can't be fitted to another "
            "grid: interpolate it yourself, or build the model for the image size it was trained with"
        )
    image = table[:, 1:].float().transpose(1, 2).unflatten(2, known or (side, side))
    image = F.interpolate(image, tuple(grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], image.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def _fixed_grid(table: Tensor) -> tuple[int, int] | None:
    length, dim = table.shape[1] - 1, table.shape[2]
    for rows in (n for n in range(1, length + 1) if length % n == 0 and dim % 4 == 0):
        for row_first in (False, True):
            fixed = sincos_positions(dim, (rows, length // rows), row_first=row_first).to(table)
            if torch.allclose(table, fixed, atol=1e-2):
                return rows, length // rows
    return None
