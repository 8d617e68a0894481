"""The autoregressive step of iGPT in plain eager torch, as a baseline: palette, transformer and loss.

Written from what the code of openai/image-gpt computes, which is TensorFlow's, without copying it; see `official.py`.
As written it keeps attention matrices and logits, and reads its nearest colours from a matrix of distances. Names in
the state dict are those of `fastssl pretrain igpt`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function


class Norm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, tuned: bool):
        super().__init__()
        self.heads, self.fused_attn = heads, tuned
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            seen = torch.ones(x.shape[1], x.shape[1], dtype=q.dtype, device=x.device).tril()
            scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
            y = (scores * seen - 1e10 * (1 - seen)).softmax(-1) @ v
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, tuned: bool):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = Norm(dim), Attention(dim, heads, tuned), Norm(dim), MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, colours: int, length: int, dim: int, depth: int, heads: int, tuned: bool):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(colours + 1, dim), nn.Embedding(length, dim)
        self.h = nn.ModuleList(Block(dim, heads, tuned) for _ in range(depth))
        self.ln_f = Norm(dim)

    def forward(self, codes: Tensor) -> Tensor:
        first = codes.new_full((len(codes), 1), len(self.wte.weight) - 1)
        x = self.wte(torch.cat([first, codes[:, :-1]], 1)) + self.wpe.weight
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class Palette(nn.Module):
    def __init__(self, colours: int):
        super().__init__()
        self.register_buffer("clusters", torch.zeros(colours, 3))
        self.register_buffer("is_set", torch.zeros((), dtype=torch.bool))


class IGPT(nn.Module):
    """``model(images)`` is the loss of normalised images [B, 3, H, W].

    Args:
        colours: number of colours.
        length: number of pixels.
        sizes: (width, blocks, heads).
        mean, std: of normalised images.
        tuned: attention of torch that keeps no matrix.
    """

    def __init__(self, colours: int, length: int, sizes: tuple[int, int, int], mean, std, tuned: bool):
        super().__init__()
        self.palette, self.transformer = Palette(colours), Transformer(colours, length, *sizes, tuned)
        self.lm_head = nn.Linear(sizes[0], colours, bias=False)
        self.mean, self.std = mean, std

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (self.mean, self.std))
        pixels = ((images * std + mean) * 255).round() / 127.5 - 1
        with torch.autocast(images.device.type, enabled=False):
            x = pixels.permute(0, 2, 3, 1).reshape(-1, 3)
            colours = self.palette.clusters
            distances = x.square().sum(1, keepdim=True) - 2 * x @ colours.T + colours.square().sum(1)
        return distances.argmin(1).view(len(images), -1)

    def forward(self, images: Tensor) -> Tensor:
        codes = self.codes(images)
        logits = self.lm_head(self.transformer(codes))
        with record_function("loss"):
            return F.cross_entropy(logits.flatten(0, 1), codes.flatten())
