"""A linear layer that predicts codes, whose logits are never all in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops import linear_cross_entropy

from .linear import Linear

ROWS = 1024  # logits of so many features are computed at once for their largest


class CodeHead(Linear):
    """Linear layer from features to one logit for each code; state dict and initial weights are those of `Linear`."""

    def cross_entropy(self, x: Tensor, codes: Tensor) -> Tensor:
        """Cross entropy [M] of the codes' softmax, in float32 or wider.

        Equals ``F.cross_entropy(self(x), codes, reduction="none")`` without its logits [M, K].

        Args:
            x: [M, D] features. Gradient.
            codes: [M] int64, −100 for a row that is ignored.
        """
        # The op has no bias: here it is one more column of the weight. Eight columns keep rows aligned in 16 bits.
        ones = F.pad(x.new_ones(x.shape[0], 1), (0, 7))
        bias = F.pad(self.bias[:, None], (0, 7))
        return linear_cross_entropy(torch.cat([x, ones], 1), torch.cat([self.weight, bias], 1), 1.0, codes)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The most likely code of each feature, [M, D] → [M] int64."""
        return torch.cat([self(rows).argmax(1) for rows in x.split(ROWS)])
