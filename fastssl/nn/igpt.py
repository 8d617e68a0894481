"""The transformer of iGPT: codes of an image's pixels, line after line, as a sequence.

It differs from GPT-2 in its norm, which divides by the root mean square alone, in QuickGELU, and in that no layer has a
bias. Names in the state dict are those of Hugging Face's `ImageGPTModel`; linear layers have torch's layout here.
"""

from typing import cast

import torch
from torch import Tensor, nn

from fastssl import ops

from .block import quick_gelu
from .linear import Linear
from .palette import Palette

SIZES = {  # (width, blocks, heads)
    "igpt_mini": (64, 4, 2),
    "igpt_small": (512, 24, 8),
    "igpt_medium": (1024, 36, 8),
    "igpt_large": (1536, 48, 16),
}
EPS = 1e-5  # added to the mean square in all norms


class Attention(nn.Module):
    """Multi-head self-attention without biases: [B, L, E] → [B, L, E]. Initial weights are those of `depth` blocks."""

    def __init__(self, dim: int, num_heads: int, depth: int):
        super().__init__()
        self.num_heads = num_heads
        self.c_attn, self.c_proj = Linear(dim, 3 * dim, bias=False), Linear(dim, dim, bias=False)
        nn.init.normal_(self.c_attn.weight, std=dim**-0.5)
        nn.init.normal_(self.c_proj.weight, std=(dim * depth) ** -0.5)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        qkv = self.project(x)
        if not causal:
            return self.c_proj(ops.attention_packed(qkv).flatten(2))
        q, k, v = qkv.unbind(2)
        return self.c_proj(ops.attention(q, k, v, causal=True).flatten(2))

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values as one tensor [B, L, 3, H, E / H]."""
        return self.c_attn(x).unflatten(-1, (3, self.num_heads, -1))

    def extend(self, x: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        """Causal attention of new tokens x [B, N, E], whose places are `start` and the following ones.

        Args:
            keys, values: [B, L, H, E / H], those of earlier tokens; those of x are written into them.
            start: 0, or any place of a single token.
        """
        q, k, v = self.project(x).unbind(2)
        end = start + x.shape[1]
        keys[:, start:end], values[:, start:end] = k, v
        return self.c_proj(ops.attention(q, keys[:, :end], values[:, :end], causal=start == 0).flatten(2))


class MLP(nn.Module):
    """Linear, QuickGELU, linear, without biases."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.c_fc, self.c_proj = Linear(dim, hidden, bias=False), Linear(hidden, dim, bias=False)
        nn.init.normal_(self.c_fc.weight, std=0.02)
        nn.init.normal_(self.c_proj.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(quick_gelu(self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm transformer block without biases."""

    def __init__(self, dim: int, num_heads: int, depth: int):
        super().__init__()
        self.ln_1, self.attn = nn.RMSNorm(dim, EPS), Attention(dim, num_heads, depth)
        self.ln_2, self.mlp = nn.RMSNorm(dim, EPS), MLP(dim, 4 * dim)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))

    def extend(self, x: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        """The block's output for new tokens, see `Attention.extend`."""
        x = x + self.attn.extend(self.ln_1(x), keys, values, start)
        return x + self.mlp(self.ln_2(x))


class ImageGPT(nn.Module):
    """Transformer over the codes of an image: int64 [B, L] → [B, L, E].

    Autoregressive, a learned vector precedes the sequence, which moves by one place, so that output i depends on the
    codes before i alone; the last code is never read. With a mask, all places see all others, nothing moves, and the
    embedding of a masked code is zero before its position is added.

    Args:
        colours: number of codes V. Row V of `wte` is the first vector of the sequence.
        length: L.
        dim: E, divisible by num_heads.
        depth: number of blocks.
        num_heads: heads of the attention.

    Source: Chen et al., "Generative Pretraining from Pixels", 2020, section 2, and its code.
    """

    def __init__(self, colours: int, length: int, dim: int, depth: int, num_heads: int):
        super().__init__()
        self.colours, self.length, self.num_heads = colours, length, num_heads
        self.wte, self.wpe = nn.Embedding(colours + 1, dim), nn.Embedding(length, dim)
        self.h = nn.ModuleList(Block(dim, num_heads, depth) for _ in range(depth))
        self.ln_f = nn.RMSNorm(dim, EPS)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.01)

    def forward(
        self, codes: Tensor, masked: Tensor | None = None, causal: bool = True, before: int | None = None
    ) -> Tensor:
        """Normalised outputs of the last block, or with `before` the residual stream before that block.

        Args:
            codes: [B, L] int64.
            masked: [B, L] bool, for causal=False; None for no masked codes.
            causal: autoregressive.
            before: 0 to the number of blocks.
        """
        x = self.wte(self.shifted(codes) if causal else codes)
        if masked is not None:
            x = x.masked_fill(masked[..., None], 0)
        x = x + self.wpe.weight
        for block in list(self.h)[:before]:
            x = block(x, causal)
        return self.ln_f(x) if before is None else x

    def shifted(self, codes: Tensor) -> Tensor:
        """The sequence that is read to predict codes [B, L]: the first vector's number, then all but the last."""
        return torch.cat([codes.new_full((len(codes), 1), self.colours), codes[:, : self.length - 1]], 1)


class PixelEncoder(nn.Module):
    """A palette and a network of its codes: normalised images [B, 3, H, W] → features [B, E].

    Args:
        palette: colours.
        transformer: network over H·W codes.
        causal: autoregressive.
        probe_layer: block whose input gives features, 0 to the number of blocks.
    """

    def __init__(self, palette: Palette, transformer: ImageGPT, causal: bool, probe_layer: int):
        super().__init__()
        self.palette, self.transformer = palette, transformer
        self.causal, self.probe_layer = causal, probe_layer

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)

    def features(self, images: Tensor) -> Tensor:
        """The input of block `probe_layer`, averaged over the sequence [B, E]."""
        return self.transformer(self.palette.codes(images), causal=self.causal, before=self.probe_layer).mean(1)


@torch.no_grad()
def draw_rest(network: ImageGPT, head: nn.Module, given: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
    """Sequences [B, L] int64 that begin with the codes `given` [B, N] and continue with drawn ones.

    Keys and values of earlier codes are kept, so that each step computes one place.

    Args:
        network: in evaluation mode or not: it has no dropout.
        head: outputs [B, E] → logits [B, V].
        given: N may be 0.
        noise: [B, L] in [0, 1), place by place the number from which a code is drawn by the cumulative probabilities.
        temperature: divisor of the logits, above 0.

    Memory: keys and values of all places in all blocks.
    """
    batch, count = given.shape
    weight, heads, blocks = network.wte.weight, network.num_heads, cast("list[Block]", list(network.h))
    kept = weight.new_empty(len(blocks), 2, batch, network.length, heads, weight.shape[1] // heads)
    codes = torch.cat([given, given.new_zeros(batch, network.length - count)], 1)
    read, start = network.shifted(codes), 0
    for place in range(count, network.length):
        x = network.wte(read[:, start : place + 1]) + network.wpe.weight[start : place + 1]
        for block, (keys, values) in zip(blocks, kept):
            x = block.extend(x, keys, values, start)
        logits = head(network.ln_f(x[:, -1])).double() / temperature
        below = logits.softmax(1).cumsum(1) <= noise[:, place, None]
        codes[:, place] = below.sum(1).clamp(max=network.colours - 1)
        if place + 1 < network.length:
            read[:, place + 1] = codes[:, place]
        start = place + 1
    return codes
