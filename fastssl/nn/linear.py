"""torch's linear layer on the engine's op."""

from torch import Tensor, nn

from fastssl import ops


class Linear(nn.Linear):
    """[..., K] → [..., N]. torch's `nn.Linear` in arguments, initial weights and state dict; see `ops.linear`.

    ``forward(x, gelu=True)`` equals ``F.linear(F.gelu(x), weight, bias)`` and keeps nothing of the GELU.
    """

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        return ops.linear(x, self.weight, self.bias, gelu)
