"""KoLeo, which spreads features over the sphere: DINOv2's regulariser."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.ops import check
from fastssl.ops.dispatch import acc_dtype, autocast_dtype


class KoLeoLoss(nn.Module):
    """``loss = criterion(x)``: minus the mean log distance of each unit vector to its nearest neighbour in the batch.
    Replaces DINOv2's and lightly's of the same name.

    It is computed in float32 whatever the dtype of x: in float16 eps is 0, and two equal rows give infinity. The batch
    is that of this rank, as in DINOv2's code.

    Args:
        p: exponent of the norm that measures distances, as in lightly; 2 in the paper.
        eps: least norm that a row is divided by; also added to each component of a difference, and to distances.
        groups: number of equal parts of the batch, one after another, whose rows are neighbours of each other alone.
            The loss is the mean over the parts.

    Raises:
        ValueError: groups is less than 1, or p or eps is not positive; by a call, x is no matrix, or a part has fewer
            than two rows.
        TypeError: by a call, x is no floating tensor.

    Source: Sablayrolles et al., "Spreading vectors for similarity search", 2019, equation 2; Oquab et al., 2024
    (DINOv2), section 4.
    """

    def __init__(self, p: float = 2.0, eps: float = 1e-8, groups: int = 1):
        super().__init__()
        for name, value in (("p", p), ("eps", eps)):
            if not value > 0:
                raise ValueError(f"KoLeoLoss: {name} must be above 0, got {value}")
        if groups < 1:
            raise ValueError(f"KoLeoLoss: groups must be at least 1, got {groups}")
        self.p, self.eps, self.groups = p, eps, groups

    def forward(self, x: Tensor) -> Tensor:
        """A scalar, float32 (float64 for float64), of features [B, D], which need no unit norm; gradient to x."""
        check.tensor("KoLeoLoss", "x", x, "B D")
        check.floating("KoLeoLoss", x=x)
        if x.shape[0] % self.groups or x.shape[0] < 2 * self.groups:
            parts = f"each of {self.groups} groups of equal size" if self.groups > 1 else "the batch"
            raise ValueError(f"KoLeoLoss: x must have B ≥ 2 rows in {parts}, got B={x.shape[0]}")
        x = F.normalize(x.to(acc_dtype(x)), dim=-1, eps=self.eps).unflatten(0, (self.groups, -1))
        nearest = nearest_neighbours(x.detach())
        difference = x - x.gather(1, nearest[..., None].expand_as(x)) + self.eps
        return -(difference.norm(self.p, dim=-1) + self.eps).log().mean()


def nearest_neighbours(x: Tensor) -> Tensor:
    """Each row's number of the other row with the largest dot product: [G, B, D] → [G, B] int64, the first of equals.

    Rows are taken in each of G groups on their own.
    """
    has_no_autocast = autocast_dtype(x) is None
    with contextlib.nullcontext() if has_no_autocast else torch.autocast(x.device.type, enabled=False):
        dots = x @ x.transpose(-2, -1)
    dots.diagonal(dim1=-2, dim2=-1).fill_(-2)  # less than the product of opposite rows, −1 and its rounding
    return dots.argmax(-1)
