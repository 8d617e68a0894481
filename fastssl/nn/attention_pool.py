"""Pooling of tokens by attention."""

import torch
from torch import Tensor, nn

from fastssl import ops

from .block import Mlp
from .linear import Linear
from .norm import ResidualNorm


class AttentionPool(nn.Module):
    """SigLIP's MAP head: one trained query attends to all tokens, then an MLP with a residual connection.

    Tokens [B, L, D] → features [B, D]. The query itself is not added to the result. Names are those of timm's
    `AttentionPoolLatent`.

    Args:
        dim: D, divisible by num_heads.
        num_heads: heads of the attention.
        mlp_ratio: width of the MLP in multiples of D.
        mlp: activation of the MLP, see `Block`.
        norm_eps: number added to the variance in the layer norm.

    Source: Zhai et al., "Scaling Vision Transformers", 2022, section 3.2; Lee et al., "Set Transformer", 2019.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, mlp: str = "gelu", norm_eps: float = 1e-6):
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.xavier_uniform_(self.latent[0])
        self.q, self.kv, self.proj = Linear(dim, dim), Linear(dim, 2 * dim), Linear(dim, dim)
        self.norm = ResidualNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), mlp)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.latent.to(x.dtype)).expand(len(x), -1, -1).unflatten(2, (self.num_heads, -1))
        k, v = self.kv(x).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        x, y = self.norm(self.proj(ops.attention(q, k, v).flatten(2)))
        return (x + self.mlp(y))[:, 0]
