"""Transformer over token ids: the text towers of CLIP and SigLIP."""

from typing import Literal

import torch
from torch import Tensor, nn

from fastssl.ops import check

from .block import Block
from .linear import Linear
from .norm import ResidualNorm


class TextTower(nn.Module):
    """Token ids [B, L] → features of the texts [B, `out_dim`].

    The last block computes its MLP for the pooled token alone. With `causal` and pool "end", tokens after the end
    change nothing, so a batch may be cut to its longest text.

    Args:
        vocabulary: number of tokens.
        length: most tokens of a text.
        dim, depth, num_heads, mlp_ratio, mlp, norm_eps: see `Block`.
        out_dim: width of the features.
        causal: a token attends to itself and to those before it alone (CLIP), not to all (SigLIP).
        pool: token whose output is projected: "end" for the first with the largest id, which is CLIP's end of text, or
            "last" for the last position (SigLIP).
        bias: give the projection a bias.

    Raises:
        ValueError: by a call, tokens are not [B, L] int64 of at most `length`, or with pool "last" L is not `length`.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, section 2.4;
    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, and its code.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        dim: int,
        depth: int,
        num_heads: int,
        out_dim: int,
        *,
        mlp_ratio: float = 4.0,
        causal: bool = True,
        pool: Literal["end", "last"] = "end",
        mlp: Literal["gelu", "gelu_tanh", "quick_gelu"] = "quick_gelu",
        norm_eps: float = 1e-5,
        bias: bool = False,
    ):
        super().__init__()
        self.vocabulary, self.length, self.pool = vocabulary, length, pool
        self.token_embedding = nn.Embedding(vocabulary, dim)
        self.positional_embedding = nn.Parameter(torch.zeros(length, dim))
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, mlp=mlp, norm_eps=norm_eps, causal=causal) for _ in range(depth)
        )
        self.norm = ResidualNorm(dim, norm_eps)
        self.projection = Linear(dim, out_dim, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        self._check(tokens)
        length = tokens.shape[1]
        x, delta = self.token_embedding(tokens) + self.positional_embedding[:length], None
        last = tokens.new_full((len(tokens), 1), length - 1)
        ids = tokens.argmax(1, keepdim=True) if self.pool == "end" else last
        for block in self.blocks[:-1]:
            x, delta = block(x, delta)
        x, delta = self.blocks[-1](x, delta, ids)
        return self.projection(self.norm(x, delta)[1][:, 0])

    def _check(self, tokens: Tensor) -> None:
        check.tensor("TextTower", "tokens", tokens, "B L")
        check.index("TextTower", tokens=tokens)
        exact = self.pool == "last"
        if not 1 <= tokens.shape[1] <= self.length or (exact and tokens.shape[1] != self.length):
            expected = f"[B, L={self.length}]" if exact else f"[B, L] with L from 1 to {self.length}"
            raise ValueError(f"TextTower: tokens must have shape {expected}, got {list(tokens.shape)}")
