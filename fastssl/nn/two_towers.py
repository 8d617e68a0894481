"""Image and text towers of CLIP and SigLIP: sizes and initial weights."""

from typing import NamedTuple

from torch import nn

from .block import Block, Mlp
from .linear import Linear
from .text_tower import TextTower
from .vit import ViT


class Size(NamedTuple):
    """Width, depth and heads of both towers; patch size of the images; width of the common space."""

    dim: int
    depth: int
    heads: int
    patch: int
    text_dim: int
    text_depth: int
    text_heads: int
    out_dim: int
    mlp_ratio: float = 4.0


# Radford et al., 2021, table 20, and open_clip's ViT-H-14; vit_mini is not from a paper.
CLIP_SIZES = {
    "vit_mini": Size(128, 4, 4, 4, 128, 3, 4, 128),
    "vit_base": Size(768, 12, 12, 32, 512, 12, 8, 512),
    "vit_large": Size(1024, 24, 16, 14, 768, 12, 12, 768),
    "vit_huge": Size(1280, 32, 16, 14, 1024, 24, 16, 1024),
}
# Zhai et al., 2023: both towers have one size; So400m by Alabdulmohsin et al., 2023.
SIGLIP_SIZES = {
    "vit_mini": Size(128, 4, 4, 4, 128, 3, 4, 128),
    "vit_base": Size(768, 12, 12, 16, 768, 12, 12, 768),
    "vit_large": Size(1024, 24, 16, 16, 1024, 24, 16, 1024),
    "vit_so400m": Size(1152, 27, 16, 14, 1152, 27, 16, 1152, 3.7362),  # 4,304 hidden values
}


def size_of(sizes: dict[str, Size], backbone: str, patch_size: int | None, owner: str) -> Size:
    """The size named `backbone`, with another patch size if that is given.

    Raises:
        ValueError: there is no such size.
    """
    if backbone not in sizes:
        raise ValueError(f"{owner}: --backbone must be {', '.join(sizes)}, got {backbone!r}")
    return sizes[backbone]._replace(patch=patch_size or sizes[backbone].patch)


class Towers(NamedTuple):
    """Networks for images and texts in one space."""

    visual: ViT  # images [B, 3, H, W] → features [B, F]
    projection: nn.Module  # features → the common space [B, D]
    text: TextTower  # token ids [B, L] → the common space [B, D]


def clip_towers(size: Size, image_size: tuple[int, int], vocabulary: int, length: int, quick_gelu: bool) -> Towers:
    """CLIP's towers with its initial weights: those of the image tower's blocks are torch's defaults.

    Source: Radford et al., 2021 (CLIP), section 2.4, and its code.
    """
    act = "quick_gelu" if quick_gelu else "gelu"
    how = {"pos_embed": "learn", "pre_norm": True, "norm_eps": 1e-5, "mlp": act}
    visual = ViT(image_size, size.patch, 3, size.dim, size.depth, size.heads, **how)
    sizes = size.text_dim, size.text_depth, size.text_heads, size.out_dim
    text = TextTower(vocabulary, length, *sizes, mlp=act)
    projection = Linear(size.dim, size.out_dim, bias=False)
    for module in visual.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
    for block in visual.blocks:
        nn.init.xavier_uniform_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
        nn.init.zeros_(block.attn.proj.bias)
    for x in (visual.cls_token, visual.pos_embed, projection.weight):
        nn.init.normal_(x, std=size.dim**-0.5)
    width, depth = size.text_dim, size.text_depth
    nn.init.normal_(text.token_embedding.weight, std=0.02)
    nn.init.normal_(text.positional_embedding, std=0.01)
    for block in text.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
        nn.init.zeros_(block.attn.qkv.bias)
        nn.init.normal_(block.attn.proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        nn.init.zeros_(block.attn.proj.bias)
        nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.fc2.weight, std=width**-0.5 * (2 * depth) ** -0.5)
    nn.init.normal_(text.projection.weight, std=width**-0.5)
    return Towers(visual, projection, text)


def siglip_towers(
    size: Size, image_size: tuple[int, int], vocabulary: int, length: int, exact_gelu: bool = False
) -> Towers:
    """SigLIP's towers with the initial weights of its code, which are flax's defaults.

    Source: Zhai et al., 2023 (SigLIP), section 4, and its code.
    """
    act = "gelu" if exact_gelu else "gelu_tanh"
    how = {"class_token": False, "pos_embed": "learn", "global_pool": "map", "mlp": act, "mlp_ratio": size.mlp_ratio}
    visual = ViT(image_size, size.patch, 3, size.dim, size.depth, size.heads, **how)
    sizes = size.text_dim, size.text_depth, size.text_heads, size.out_dim
    options = {"mlp_ratio": size.mlp_ratio, "causal": False, "pool": "last", "mlp": act, "norm_eps": 1e-6, "bias": True}
    text = TextTower(vocabulary, length, *sizes, **options)
    for module in (*visual.modules(), *text.modules()):
        if isinstance(module, Block):
            for weight in module.attn.qkv.weight.detach().chunk(3):  # q, k and v as three matrices
                nn.init.xavier_uniform_(weight)
            nn.init.zeros_(module.attn.qkv.bias)
            nn.init.xavier_uniform_(module.attn.proj.weight)
            nn.init.zeros_(module.attn.proj.bias)
        if isinstance(module, Mlp):
            for layer in (module.fc1, module.fc2):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.normal_(layer.bias, std=1e-6)
    for weight in visual.attn_pool.kv.weight.detach().chunk(2):
        nn.init.xavier_uniform_(weight)
    _lecun_normal_(visual.patch_embed.proj)
    _lecun_normal_(text.projection)
    nn.init.normal_(visual.pos_embed, std=size.dim**-0.5)
    nn.init.normal_(text.token_embedding.weight, std=size.text_dim**-0.5)
    nn.init.normal_(text.positional_embedding, std=size.text_dim**-0.5)
    return Towers(visual, nn.Identity(), text)


def _lecun_normal_(layer: nn.Linear | nn.Conv2d) -> None:
    """flax's default: a normal of variance 1 / inputs, truncated at twice the deviation before that is corrected."""
    std = layer.weight[0].numel() ** -0.5 / 0.87962566103423978
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)
