"""Multi-head self-attention on the engine's op, in the shapes of timm's and torchvision's modules."""

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.ops import check

from .linear import Linear


class Attention(nn.Module):
    """Multi-head self-attention from one packed qkv projection: [B, L, D] → [B, L, D]. In place of timm's `Attention`.

    Arguments have timm's names and defaults (without `gated`, `attn_head_dim` and `dim_out`), the state dict has timm's
    names, and timm's `Block(…, attn_layer=Attention)` takes it. Dropout of attention weights, masks and causal
    attention are refused: the kernels have none.

    Args:
        dim: D, divisible by num_heads.
        num_heads: H.
        qkv_bias, proj_bias: biases of the two projections.
        qk_norm: normalise queries and keys of each head by `norm_layer`.
        scale_norm: normalise what the heads return, before the last projection.
        attn_drop: 0.
        proj_drop: dropout after the last projection.
        norm_layer: makes the norms from their width; LayerNorm if None.
        device, dtype: of the weights.

    Raises:
        ValueError: dim is not divisible, attn_drop is not 0, or a call brings a mask.

    Source: Vaswani et al., 2017, section 3.2.2; Dosovitskiy et al., 2021 (ViT).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"Attention: dim must be divisible by num_heads={num_heads}, got {dim}")
        if attn_drop:
            raise ValueError(f"Attention: attn_drop must be 0, the kernels drop no attention weights, got {attn_drop}")
        head, norm_layer, factory = dim // num_heads, norm_layer or nn.LayerNorm, {"device": device, "dtype": dtype}
        self.num_heads, self.scale = num_heads, head**-0.5
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(head, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(head, **factory) if qk_norm else nn.Identity()
        self.norm = norm_layer(dim, **factory) if scale_norm else nn.Identity()
        self.gate: nn.Module | None = None  # timm's `gated` has one
        self.proj = Linear(dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    @classmethod
    def of(cls, theirs: nn.Module) -> "Attention":
        """Ours from the parts of a module with timm's names: the same parameters, not copies of them."""
        ours = cls.__new__(cls)
        nn.Module.__init__(ours)
        ours.num_heads, ours.scale = theirs.num_heads, theirs.scale
        parts = ("qkv", "q_norm", "k_norm", "norm", "gate", "proj", "proj_drop")
        theirs_first = [name for name in theirs._modules if name in parts]  # the order of parameters stays
        for name in dict.fromkeys((*theirs_first, *parts)):
            part = getattr(theirs, name, None)
            setattr(ours, name, nn.Identity() if part is None and name != "gate" else part)
        ours.training = theirs.training
        return ours

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("Attention: attn_mask and is_causal are not supported: every token sees all tokens")
        check.tensor("Attention", "x", x, "B L D")
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [B, L, 3, H, E]
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            out = ops.attention_packed(qkv, self.scale)
        else:
            q, k, v = qkv.unbind(2)
            out = ops.attention(self.q_norm(q), self.k_norm(k), v, self.scale)
        out = self.norm(out.flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class TorchvisionAttention(nn.Module):
    """torch's `nn.MultiheadAttention` as torchvision's ViT calls it: of one sequence with itself, without weights.

    Made from such a module, whose parameters and names it takes over.
    """

    def __init__(self, theirs: nn.MultiheadAttention):
        super().__init__()
        self.num_heads = theirs.num_heads
        self.in_proj_weight, self.in_proj_bias = theirs.in_proj_weight, theirs.in_proj_bias
        self.out_proj = theirs.out_proj
        self.training = theirs.training

    def forward(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        if not query is key is value or need_weights:
            raise ValueError("TorchvisionAttention: query, key and value must be one tensor, and need_weights False")
        qkv = ops.linear(query, self.in_proj_weight, self.in_proj_bias)
        out = ops.attention_packed(qkv.unflatten(2, (3, self.num_heads, -1)))
        return self.out_proj(out.flatten(2)), None
