"""Multi-head self-attention by `ops.attention`, as modules with the interfaces of timm's and torchvision's."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import ops
from fastssl.ops import check

from .linear import Linear


class Attention(nn.Module):
    """Multi-head self-attention from one packed qkv projection: [B, L, D] → [B, L, D]. Replaces timm's `Attention`.

    Arguments have timm's names and defaults (without `gated`, `attn_head_dim` and `dim_out`), the state dict has timm's
    names, and timm's `Block(…, attn_layer=Attention)` accepts it. Dropout of attention weights is refused: the kernels
    do not support it. A call with a mask, as timm's NaFlexViT makes for padded batches, is computed by torch's
    `scaled_dot_product_attention`.

    Args:
        dim: D, divisible by num_heads.
        num_heads: H.
        qkv_bias, proj_bias: biases of the two projections.
        qk_norm: normalise queries and keys of each head by `norm_layer`.
        scale_norm: normalise the concatenated heads by `norm_layer` before the last projection.
        attn_drop: must be 0.
        proj_drop: dropout after the last projection.
        norm_layer: class of the norms, called with their width; LayerNorm if None.
        device, dtype: device and dtype of the weights.

    Raises:
        ValueError: dim is not divisible by num_heads, attn_drop is not 0, or a call has an `attn_bias` (of xformers, as
            DINOv2 uses it for lists of crops of several sizes).

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
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"Attention: dim must be divisible by num_heads={num_heads}, got {dim}")
        if attn_drop:
            raise ValueError(f"Attention: attn_drop must be 0, the kernels drop no attention weights, got {attn_drop}")
        head_dim, norm_layer = dim // num_heads, norm_layer or nn.LayerNorm
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.scale = num_heads, head_dim**-0.5
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(head_dim, **factory) if qk_norm else nn.Identity()
        self.norm = norm_layer(dim, **factory) if scale_norm else nn.Identity()
        self.gate: nn.Module | None = None  # set by `from_module` for a timm module with `gated`
        self.proj = Linear(dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    @classmethod
    def from_module(cls, module: nn.Module) -> "Attention":
        """An `Attention` made of the parts of a module with timm's names: the same parameters, not copies of them."""
        attention = cls.__new__(cls)
        nn.Module.__init__(attention)
        source: Any = module
        attention.num_heads, attention.scale = source.num_heads, source.scale
        parts = ("qkv", "q_norm", "k_norm", "norm", "gate", "proj", "proj_drop")
        in_module = [name for name in module._modules if name in parts]  # the order of parameters stays
        for name in dict.fromkeys((*in_module, *parts)):
            part = getattr(module, name, None)
            setattr(attention, name, nn.Identity() if part is None and name != "gate" else part)
        attention.training = module.training
        return attention

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, attn_bias: Any = None
    ) -> Tensor:
        if attn_bias is not None:
            raise ValueError(
                "Attention: attn_bias is not supported: give images of one size at a time, or use "
                "accelerate(model, leave=[…])"
            )
        check.tensor("Attention", "x", x, "B L D")
        qkv = self.project(x)
        has_norms = not (isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity))
        if not has_norms and attn_mask is None and not is_causal:
            out = ops.attention_packed(qkv, self.scale)
        else:
            q, k, v = qkv.unbind(2)
            q, k = self.q_norm(q), self.k_norm(k)
            if attn_mask is None:
                out = ops.attention(q, k, v, self.scale, causal=is_causal)
            else:
                q, k, v = (t.transpose(1, 2) for t in (q, k, v))
                out = F.scaled_dot_product_attention(q, k, v, attn_mask, 0.0, is_causal, scale=self.scale)
                out = out.transpose(1, 2)
        out = self.norm(out.flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of tokens [B, L, D] as one tensor [B, L, 3, H, E]."""
        return self.qkv(x).unflatten(2, (3, self.num_heads, -1))

    def weights(self, x: Tensor, queries: slice = slice(None), bias: Tensor | None = None) -> Tensor:
        """Weights [B, H, Q, L] in float32 that `queries` of the tokens x [B, L, D] give to all, to look at; `forward`
        does not store them. `bias` [H, L, L] is added to the scores."""
        q, k, _ = self.project(x).float().unbind(2)
        scores = torch.einsum("bqhe,bkhe->bhqk", self.q_norm(q)[:, queries], self.k_norm(k)) * self.scale
        return (scores if bias is None else scores + bias[:, queries]).softmax(-1)


class TorchvisionAttention(nn.Module):
    """Self-attention with the parameters and names of torch's `nn.MultiheadAttention`, as torchvision's ViT and
    open_clip's towers call it. The causal mask of a text tower is recognised on CPUs; with any other mask it is
    computed by torch.

    Args:
        module: its parameters are shared, not copied.

    Raises:
        ValueError: by a call, query, key and value are not one tensor, or attention weights are asked for.
    """

    def __init__(self, module: nn.MultiheadAttention):
        super().__init__()
        self.num_heads = module.num_heads
        self.in_proj_weight, self.in_proj_bias = module.in_proj_weight, module.in_proj_bias
        self.out_proj = module.out_proj
        self.training = module.training

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        if not query is key is value or need_weights:
            raise ValueError("TorchvisionAttention: query, key and value must be one tensor, and need_weights False")
        qkv = ops.linear(query, self.in_proj_weight, self.in_proj_bias).unflatten(2, (3, self.num_heads, -1))
        if attn_mask is None:
            out = ops.attention_packed(qkv)
        elif is_causal(attn_mask):
            q, k, v = qkv.unbind(2)
            out = ops.attention(q, k, v, causal=True)
        else:
            mask = attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (-1, self.num_heads))
            # torch's module leaves out pairs with True, its function those with False
            mask = ~mask if mask.dtype == torch.bool else mask.to(qkv.dtype)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        return self.out_proj(out.flatten(2)), None


def is_causal(mask: Tensor) -> bool:
    """Whether a mask for `nn.MultiheadAttention` lets each token see those up to itself, and no others.

    False for a mask on a GPU, for whose answer the host would wait, inside torch.compile, and for a mask with gradient.
    """
    if mask.device.type != "cpu" or mask.requires_grad or torch.compiler.is_compiling():
        return False
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
        return False
    causal = torch.ones(mask.shape, dtype=torch.bool).triu(1)  # True for what is left out
    if mask.dtype != torch.bool:
        causal = torch.zeros_like(mask).masked_fill(causal, float("-inf"))
    return torch.equal(mask, causal)
