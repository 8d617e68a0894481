"""Vision transformer on the engine's attention. Parameter names are those of timm and of the official MAE."""

import itertools

import torch
from torch import Tensor, nn

from fastssl.ops import check, keep_tokens, linear, patchify

from .attention import Attention
from .linear import Linear
from .norm import Norm
from .positions import fit_positions, sincos_positions

# name: (embed_dim, depth, num_heads, patch_size). B, L, H: Dosovitskiy et al., 2021, table 1; H with MAE's patch 14.
SIZES = {
    "vit_mini": (128, 4, 4, 4),
    "vit_tiny": (192, 12, 3, 16),
    "vit_small": (384, 12, 6, 16),
    "vit_base": (768, 12, 12, 16),
    "vit_large": (1024, 24, 16, 16),
    "vit_huge": (1280, 32, 16, 14),
}
# The same for MoCo v3 (section 5 and code): other heads for S, and one block fewer behind a convolutional stem.
MOCO_V3_SIZES = {
    "vit_mini": (128, 4, 4, 4),
    "vit_small": (384, 12, 12, 16),
    "vit_base": (768, 12, 12, 16),
    "vit_conv_small": (384, 11, 12, 16),
    "vit_conv_base": (768, 11, 12, 16),
}


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x), gelu=True)


class Block(nn.Module):
    """Pre-norm transformer block; LayerNorm eps 1e-6, as in the official ViT and MAE.

    Takes and returns the residual stream and what is still to be added to it: the norm that comes next adds it. With
    `only` [B, M] the MLP and what is returned are of those tokens alone.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = Norm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=True)
        self.norm2 = Norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, delta: Tensor | None = None, only: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, y = self.norm1(x, delta)
        y = self.attn(y)
        if only is not None:
            x, y = keep_tokens(x, only), keep_tokens(y, only)
        x, y = self.norm2(x, y)
        return x, self.mlp(y)


class PatchEmbed(nn.Module):
    """Linear embedding of patches. Its weight has the shape of the convolution it equals: [D, C, p, p]."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, M, P], as `patchify` or `keep_patches` cuts them, → [B, M, D]: only what is kept is embedded."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # [D, p·p·C], channel last like the patches
        return linear(patches, weight, self.proj.bias)


class ConvStem(nn.Module):
    """Four 3×3 convolutions of stride 2 and one of 1×1 in the place of a patch embedding of 16 pixels.

    Source: Xiao et al., "Early Convolutions Help Transformers See Better", 2021; MoCo v3's `vit_conv_*`.
    """

    def __init__(self, in_chans: int, embed_dim: int):
        super().__init__()
        widths = [in_chans, *(embed_dim // 8 * 2**i for i in range(4))]
        layers: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 3, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] → [B, L, D]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """ViT encoder with class token and fixed sin-cos positions: images [B, C, H, W] → features [B, D], through `head`.

    A state dict made for another grid of patches loads too: its positional tables are interpolated.

    Args:
        img_size: (height, width) or one number for a square, divisible by patch_size.
        patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio: as in timm.
        conv_stem: embed by a `ConvStem`; patch_size is 16 then.
        row_first: MoCo v3's order of the positional halves, see `sincos_positions`.
    """

    tables = ("pos_embed",)  # positional tables in the state dict, each for `grid`

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        conv_stem: bool = False,
        row_first: bool = False,
    ):
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        name = type(self).__name__
        if height % patch_size or width % patch_size:
            raise ValueError(f"{name}: img_size must be divisible by patch_size={patch_size}, got {height}×{width}")
        if conv_stem and (patch_size != 16 or embed_dim % 8):
            wanted = "conv_stem needs patch_size=16 and embed_dim divisible by 8"
            raise ValueError(f"{name}: {wanted}, got {patch_size} and {embed_dim}")
        self.img_size, self.patch_size, self.in_chans = (height, width), patch_size, in_chans
        self.grid = (height // patch_size, width // patch_size)
        embed = (in_chans, embed_dim)
        self.patch_embed = ConvStem(*embed) if conv_stem else PatchEmbed(patch_size, *embed)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        positions = sincos_positions(embed_dim, self.grid, row_first=row_first)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = Norm(embed_dim)
        self.head: nn.Module = nn.Identity()
        self.register_load_state_dict_pre_hook(_fit_tables)
        self.apply(xavier_)
        if not conv_stem:
            nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # like the linear layer that it is
        nn.init.normal_(self.cls_token, std=0.02)

    def encode(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Patch tokens with their positions added [B, M, D] → [B, 1 + M, D], class token first; dtype as in `Norm`."""
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        x, delta = torch.cat([cls, tokens], dim=1), None
        for block in self.blocks:
            x, delta = block(x, delta)
        return self.norm(x, delta, dtype)[1]

    def features(self, images: Tensor, pool: str = "cls") -> Tensor:
        """[B, C, H, W] → [B, D]: the class token ("cls") or the mean of the patch tokens ("mean")."""
        if pool not in ("cls", "mean"):
            raise ValueError(f"features: pool must be 'cls' or 'mean', got {pool!r}")
        self.check_images(images)
        patched = isinstance(self.patch_embed, PatchEmbed)
        tokens = self.patch_embed(patchify(images, self.patch_size) if patched else images) + self.pos_embed[:, 1:]
        x = self.encode(tokens, tokens.dtype)  # not autocast's: features are not only multiplied
        return x[:, 0] if pool == "cls" else x[:, 1:].mean(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def check_images(self, images: Tensor) -> None:
        """Refuses images of another size than the positions were made for."""
        (height, width), name = self.img_size, type(self).__name__
        if images.ndim == 4 and images.shape[1:] != (self.in_chans, height, width):
            wanted = f"[B, C={self.in_chans}, H={height}, W={width}]"
            way_out = f"build {name}(img_size=(H, W)) for another size, it loads this state dict with fitted positions"
            raise ValueError(f"{name}: images must have shape {wanted}, got {list(images.shape)} ({way_out})")
        check.tensor(name, "images", images, "B C H W")


def xavier_(module: nn.Module) -> None:
    """Weight of a linear layer xavier-uniform, bias 0; for `Module.apply`. qkv counts as one matrix."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def moco_v3_vit(name: str, img_size: int | tuple[int, int] = 224, freeze_patch_embed: bool = True) -> ViT:
    """A ViT of `MOCO_V3_SIZES` with that code's positions and initial weights. A convolutional stem is never frozen.

    Source: Chen et al., 2021 (MoCo v3), section 4.3 ("random patch projection"), and its code.
    """
    dim, depth, heads, patch = MOCO_V3_SIZES[name]
    stem = name.startswith("vit_conv")
    vit = ViT(img_size, patch, 3, dim, depth, heads, conv_stem=stem, row_first=True)
    for block in vit.blocks:
        bound = (6 / (dim + dim)) ** 0.5  # q, k and v as three matrices
        nn.init.uniform_(block.attn.qkv.weight, -bound, bound)
    nn.init.normal_(vit.cls_token, std=1e-6)
    if not stem:
        nn.init.zeros_(vit.patch_embed.proj.bias)
        vit.patch_embed.requires_grad_(not freeze_patch_embed)
    return vit


def _fit_tables(vit: ViT, state: dict, prefix: str, *_) -> None:
    for name in vit.tables:
        table, own = state.get(prefix + name), getattr(vit, name)
        if table is not None and not table.is_meta and table.ndim == 3 and table.shape[2] == own.shape[2]:
            state[prefix + name] = fit_positions(table, vit.grid)
