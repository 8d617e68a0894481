"""Transformer block: attention and MLP, each behind a layer norm, with LayerScale and drop path as options."""

import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.ops import bias_gelu, gelu, keep_tokens
from fastssl.ops.dispatch import acc_dtype

from .attention import Attention
from .linear import Linear
from .norm import ResidualNorm


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 * x)``, the GELU of OpenAI's CLIP; one tensor is kept for the gradient."""
    return F.silu(x * 1.702) * (1 / 1.702)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, flax's default and SigLIP's."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}  # of an MLP whose second layer has no fused GELU
MLPS = ("gelu", *ACTIVATIONS, "swiglu")


def gelu_mlp(x: Tensor, fc1: Linear, fc2: Linear) -> Tensor:
    """``fc2(gelu(fc1(x)))``, the exact GELU; fc1 has a bias.

    On a GPU the first bias is added by the GELU, whose backward pass sums its gradient (`ops.bias_gelu`); on a CPU the
    second layer computes the GELU of its input, again in the backward pass (`ops.linear`).
    """
    if gelu.backend(x) == "kernel":
        return fc2(bias_gelu(fc1(x, add_bias=False), fc1.bias))
    return fc2(fc1(x), gelu=True)


class Mlp(nn.Module):
    """Linear, activation, Linear. The activation is GELU (`gelu_mlp`) or one of `ACTIVATIONS`, which torch computes."""

    def __init__(self, dim: int, hidden: int, activation: str = "gelu"):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.activation = ACTIVATIONS.get(activation)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is not None:
            return self.fc2(self.activation(self.fc1(x)))
        return gelu_mlp(x, self.fc1, self.fc2)


class SwiGLU(nn.Module):
    """MLP with a gate: ``fc2(silu(a) · b)``, where ``fc1(x)`` is the concatenation of a and b; used by DINOv2's ViT-g.

    Names are those of timm's `SwiGLUPacked`: `fc1` holds both halves, as DINOv2's `w12` does, and `fc2` is its `w3`.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, equation 6.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        if hidden % 2:
            raise ValueError(f"SwiGLU: hidden must be even, for the gate and its input, got {hidden}")
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden // 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class LayerScale(nn.Module):
    """Multiplies the output of a residual branch by trained factors `gamma` [D].

    Source: Touvron et al., "Going deeper with Image Transformers", 2021 (CaiT), section 2, equation 4.
    """

    def __init__(self, dim: int, init_value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block. Names in the state dict are those of timm's `Block`.

    Args:
        dim: D, divisible by num_heads.
        num_heads: heads of the attention.
        mlp_ratio: width of `fc1`'s output in multiples of D.
        qkv_bias: bias of the packed projection to queries, keys and values.
        qk_norm: layer norm of the queries and keys of each head.
        init_values: initial value of LayerScale's factors; None for no LayerScale.
        mlp: "gelu", "gelu_tanh" or "quick_gelu" for `Mlp` with that activation, "swiglu" for `SwiGLU`.
        norm_eps: number added to the variance in all layer norms.
        causal: a token attends to itself and to those before it alone.

    Source: Dosovitskiy et al., 2021 (ViT), equations 2 and 3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        mlp: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"] = "gelu",
        norm_eps: float = 1e-6,
        causal: bool = False,
    ):
        super().__init__()
        if mlp not in MLPS:
            raise ValueError(f"Block: mlp must be one of {', '.join(map(repr, MLPS))}, got {mlp!r}")
        norm = functools.partial(nn.LayerNorm, eps=norm_eps)
        self.causal = causal
        self.norm1 = ResidualNorm(dim, norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, qk_norm=qk_norm, norm_layer=norm)
        self.ls1 = None if init_values is None else LayerScale(dim, init_values)
        self.norm2 = ResidualNorm(dim, norm_eps)
        hidden = int(dim * mlp_ratio)
        self.mlp = SwiGLU(dim, hidden) if mlp == "swiglu" else Mlp(dim, hidden, mlp)
        self.ls2 = None if init_values is None else LayerScale(dim, init_values)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None = None,
        ids: Tensor | None = None,
        drop_path: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream and the MLP's output, whose sum is the block's output; the next norm adds them.

        Args:
            x: [B, L, D] residual stream.
            delta: [B, L, D] to be added to x first, as the preceding block returns it; None for nothing.
            ids: [B, M] int64 numbers of tokens: the MLP and both results are computed for these alone; None for all.
            drop_path: [2, B, 1, 1] factors of attention and MLP, one block's part of `drop_path_factors`. They are
                drawn outside the block so that activation checkpointing runs it twice with the same ones.
            kept: [2, K] int64 samples for which attention and MLP are computed, one block's part of
                `drop_path_subsets`; their output counts B / K times. The second result is None then.
        """
        if kept is not None:
            x = x if delta is None else x + delta
            attention, mlp = (lambda y: self.attn(self.norm1(y)[1])), (lambda y: self.mlp(self.norm2(y)[1]))
            x = _add_subset_branch(x, attention, self.ls1, kept[0])
            return _add_subset_branch(x, mlp, self.ls2, kept[1]), None
        x, y = self.norm1(x, delta)
        y = self.attn(y, is_causal=self.causal) if self.causal else self.attn(y)
        if ids is not None:
            x, y = keep_tokens(x, ids), keep_tokens(y, ids)
        attention_factor, mlp_factor = (None, None) if drop_path is None else drop_path.unbind(0)
        x, y = self.norm2(x, _scale_branch(y, self.ls1, attention_factor))
        return x, _scale_branch(self.mlp(y), self.ls2, mlp_factor)


def _scale_branch(y: Tensor, layer_scale: LayerScale | None, factor: Tensor | None) -> Tensor:
    """A branch's output [B, L, D] times LayerScale's gamma and the samples' drop-path factors [B, 1, 1]."""
    if layer_scale is None:
        return y if factor is None else y * factor
    return layer_scale(y) if factor is None else y * (layer_scale.gamma * factor)  # one pass over y for both


def drop_path_factors(rate: float, depth: int, x: Tensor) -> Tensor:
    """Random factors of residual branches [depth, 2, B, 1, 1]: 0 for a dropped branch, else 1 / (1 − rate).

    The rate is linear over depth, from 0 in the first block to `rate` in the last, as in timm. Samples and branches are
    dropped independently, and the expectation of a factor is 1.

    Args:
        rate: rate of the last block, in [0, 1).
        depth: number of blocks.
        x: [B, …] tensor that gives B, the device, whose generator is used, and the dtype: float64 for float64, else
            float32.

    Source: Huang et al., "Deep Networks with Stochastic Depth", 2016, section 3.
    """
    kept = 1 - torch.linspace(0, rate, depth, dtype=acc_dtype(x), device=x.device).view(-1, 1, 1, 1, 1)
    return (torch.rand(depth, 2, x.shape[0], 1, 1, device=x.device) < kept) / kept


def _add_subset_branch(
    x: Tensor, branch: Callable[[Tensor], Tensor], layer_scale: LayerScale | None, kept: Tensor
) -> Tensor:
    """x [B, L, D] plus B / K times the branch's output for the samples `kept` [K]."""
    y = branch(x[kept])
    y = y if layer_scale is None else layer_scale(y)
    return x.index_add(0, kept, y.to(x.dtype), alpha=x.shape[0] / kept.shape[0])


def drop_path_subsets(rate: float, depth: int, x: Tensor) -> Tensor:
    """Random samples [depth, 2, K] int64 whose residual branches are computed, K = max(⌊B · (1 − rate)⌋, 1).

    All blocks have the same rate. The host need not know the samples, only their number, so nothing waits.

    Args:
        rate: share of the samples that are dropped, in [0, 1).
        depth: number of blocks.
        x: [B, …] tensor that gives B and the device, whose generator is used.

    Source: Oquab et al., "DINOv2", 2024, section 5 ("efficient stochastic depth"), and its code.
    """
    kept = max(int(x.shape[0] * (1 - rate)), 1)
    return torch.rand(depth, 2, x.shape[0], device=x.device).argsort(-1)[..., :kept]
