"""Vision transformer on the engine's attention. Parameter names are those of timm and of the official MAE."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.ops import attention, patchify

# name: (embed_dim, depth, num_heads, patch_size). B, L, H: Dosovitskiy et al., 2021, table 1; H with MAE's patch 14.
SIZES = {
    "vit_mini": (128, 4, 4, 4),
    "vit_tiny": (192, 12, 3, 16),
    "vit_small": (384, 12, 6, 16),
    "vit_base": (768, 12, 12, 16),
    "vit_large": (1024, 24, 16, 16),
    "vit_huge": (1280, 32, 16, 14),
}


class Attention(nn.Module):
    """Multi-head self-attention from one packed qkv projection: [B, L, D] → [B, L, D]."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"Attention: dim must be divisible by num_heads={num_heads}, got {dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        return self.proj(attention(*qkv.unbind(2)).view(batch, length, dim))


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; LayerNorm eps 1e-6, as in the official ViT and MAE."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Linear embedding of patches. Its weight has the shape of the convolution it equals: [D, C, p, p]."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, M, P], as `patchify` or `keep_patches` cuts them, → [B, M, D]: only what is kept is embedded."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # [D, p·p·C], channel last like the patches
        return F.linear(patches, weight, self.proj.bias)


class ViT(nn.Module):
    """ViT encoder with class token and fixed sin-cos positions: images [B, C, H, W] → features [B, D].

    Args:
        img_size: (height, width) or one number for a square, divisible by patch_size.
        patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio: as in timm.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % patch_size or width % patch_size:
            name = type(self).__name__
            raise ValueError(f"{name}: img_size must be divisible by patch_size={patch_size}, got {height}×{width}")
        self.img_size, self.patch_size = (height, width), patch_size
        self.grid = (height // patch_size, width // patch_size)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def encode(self, tokens: Tensor) -> Tensor:
        """Patch tokens with their positions added [B, M, D] → [B, 1 + M, D], class token first."""
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        x = torch.cat([cls, tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def features(self, images: Tensor, pool: str = "cls") -> Tensor:
        """[B, C, H, W] → [B, D]: the class token ("cls") or the mean of the patch tokens ("mean")."""
        if pool not in ("cls", "mean"):
            raise ValueError(f"features: pool must be 'cls' or 'mean', got {pool!r}")
        x = self.encode(self.patch_embed(patchify(images, self.patch_size)) + self.pos_embed[:, 1:])
        return x[:, 0] if pool == "cls" else x[:, 1:].mean(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


def sincos_positions(dim: int, grid: tuple[int, int], cls_token: bool = True) -> Tensor:
    """MAE's fixed positional table [1, (1 +) rows·columns, dim], float32 from float64 arithmetic.

    The first half of the dims encodes the column, the second the row (the reference's comment says the reverse);
    each half is sin and then cos of position / 10000^(i / (dim/4)). The class token's row is zero. MoCo v3's table
    has the halves swapped: do not share one between them.
    """
    if dim % 4:
        raise ValueError(f"sincos_positions: dim must be divisible by 4, got {dim}")
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid)
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    halves = [torch.outer(place.flatten(), omega) for place in (column, row)]
    table = torch.cat([part for half in halves for part in (half.sin(), half.cos())], dim=1).float()
    return torch.cat([torch.zeros(int(cls_token), dim), table]).unsqueeze(0)
