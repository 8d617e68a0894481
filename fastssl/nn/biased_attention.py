"""Multi-head self-attention with a relative position bias, as timm's BEiT, Swin and relative-position ViT have it."""

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import ops
from fastssl.ops import check


class BiasedAttention(nn.Module):
    """Self-attention whose scores get an additive bias, by `ops.attention_packed`: [B, L, D] → [B, L, D].

    It is made of the parts of a module of timm by `from_module`, with its parameters and their names: the bias is
    ``relative_position_bias_table[relative_position_index]`` (`timm.models.beit.Attention`, Swin's `WindowAttention`),
    or that of a submodule ``rel_pos`` (`RelPosAttention`). The number of tokens is that of the bias: call
    ``model.set_input_size(…)`` before the swap.

    Raises:
        ValueError: by a call, x does not fit; or `set_window_size` is called after the swap.
    """

    num_heads: int
    scale: float
    relative_position_index: Tensor

    @classmethod
    def from_module(cls, module: nn.Module) -> "BiasedAttention":
        """A `BiasedAttention` made of the module's parts: the same parameters and buffers, not copies of them."""
        attention = cls.__new__(cls)
        nn.Module.__init__(attention)
        source: Any = module
        for table in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            getattr(attention, table).update(getattr(module, table))
        attention.num_heads, attention.scale, attention.training = source.num_heads, source.scale, module.training
        return attention

    def position_bias(self) -> Tensor | None:
        """The module's own bias [H, L, L]."""
        table, own = getattr(self, "relative_position_bias_table", None), getattr(self, "rel_pos", None)
        if table is not None:
            index = self.relative_position_index
            return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)
        return None if own is None else own.get_bias().squeeze(0)

    def forward(
        self,
        x: Tensor,
        shared_rel_pos_bias: Tensor | None = None,
        shared_rel_pos: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The tokens' attention.

        Args:
            x: [B, L, D].
            shared_rel_pos_bias: [1, H, L, L], added to the module's own bias (BEiT).
            shared_rel_pos: the same, for a module without its own (relative-position ViT).
            mask: [W, L, L], added to the scores of the W windows of each image (Swin).
        """
        check.tensor("BiasedAttention", "x", x, "B L D")
        bias = self.position_bias()
        if shared_rel_pos_bias is not None:
            shared = shared_rel_pos_bias.squeeze(0)
            bias = shared if bias is None else bias + shared
        elif shared_rel_pos is not None and bias is None:
            bias = shared_rel_pos.squeeze(0)
        if mask is not None:
            windows = mask.unsqueeze(1) if bias is None else mask.unsqueeze(1) + bias  # [W, H, L, L]
            bias = windows.expand(len(x) // len(mask), -1, self.num_heads, -1, -1).flatten(0, 1)
        qkv = self._project(x).unflatten(2, (3, self.num_heads, -1))  # [B, L, 3, H, E]
        parts: Any = self
        q_norm, k_norm = getattr(self, "q_norm", None), getattr(self, "k_norm", None)
        if isinstance(q_norm, nn.Identity | None) and isinstance(k_norm, nn.Identity | None):
            out = ops.attention_packed(qkv, self.scale, bias)
        else:
            q, k, v = qkv.unbind(2)
            q, k = (x if norm is None else norm(x) for x, norm in ((q, q_norm), (k, k_norm)))
            out = ops.attention(q, k, v, self.scale, bias)
        return parts.proj_drop(parts.proj(out.flatten(2)))

    def _project(self, x: Tensor) -> Tensor:
        parts: Any = self
        if getattr(parts, "q_bias", None) is None:
            return parts.qkv(x)
        return F.linear(x, parts.qkv.weight, torch.cat((parts.q_bias, parts.k_bias, parts.v_bias)))

    def set_window_size(self, window_size: tuple[int, int]) -> NoReturn:
        """Refuses another number of tokens."""
        raise ValueError(
            f"BiasedAttention: set_window_size must be called before accelerate(model), got {tuple(window_size)} after"
        )
