"""Linear layer on the engine's op."""

from torch import Tensor, nn

from fastssl import ops


class Linear(nn.Linear):
    """Linear layer [..., K] → [..., N] with the arguments, initial weights and state dict of torch's `nn.Linear`.

    ``forward(x, gelu=True)`` equals ``F.linear(F.gelu(x), weight, bias)``; the backward pass computes the GELU again.
    ``forward(x, add_bias=False)`` leaves out the bias, for a caller that adds it in another op. See `ops.linear`.
    """

    def forward(self, x: Tensor, gelu: bool = False, add_bias: bool = True) -> Tensor:
        return ops.linear(x, self.weight, self.bias if add_bias else None, gelu)
