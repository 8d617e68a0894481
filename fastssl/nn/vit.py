"""Vision transformer on the engine's attention. Parameter names are those of timm and of the official MAE."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastssl.ops import check, patchify

from .attention_pool import AttentionPool
from .block import Block, drop_path_factors, drop_path_subsets
from .linear import Linear
from .norm import ResidualNorm
from .patch_embed import ConvStem, PatchEmbed
from .positions import fit_positions, interpolate_positions, sincos_positions
from .sharing import shared_copy

# name: (embed_dim, depth, num_heads, patch_size). B, L, H: Dosovitskiy et al., 2021, table 1; H with MAE's patch 14.
SIZES = {
    "vit_mini": (128, 4, 4, 4),
    "vit_tiny": (192, 12, 3, 16),
    "vit_small": (384, 12, 6, 16),
    "vit_base": (768, 12, 12, 16),
    "vit_large": (1024, 24, 16, 16),
    "vit_huge": (1280, 32, 16, 14),
}
# The same for DINO, iBOT and DINOv2, which have another largest model than MAE, with SwiGLU in its MLPs.
DINO_SIZES = {name: size for name, size in SIZES.items() if name != "vit_huge"} | {"vit_giant": (1536, 40, 24, 14)}
# The same for MoCo v3 (section 5 and code): ViT-S has 12 heads, and a ViT with a convolutional stem one block fewer.
MOCO_V3_SIZES = {
    "vit_mini": (128, 4, 4, 4),
    "vit_small": (384, 12, 12, 16),
    "vit_base": (768, 12, 12, 16),
    "vit_conv_small": (384, 11, 12, 16),
    "vit_conv_base": (768, 11, 12, 16),
}
POOLS = ("token", "avg", "max", "avgmax", "map", "")  # values of `global_pool`, as in timm


class ViT(nn.Module):
    """Vision transformer: images [B, C, H, W] → features [B, D], and through `head` → logits.

    Arguments, attributes and the state dict have timm's names, and a state dict of timm's `VisionTransformer` with the
    same arguments loads strictly. Defaults are those of MAE's and MoCo v3's encoder: fixed positions, no classifier.
    A state dict made for another grid of patches loads too: its positional tables are interpolated (`fit_positions`).

    Tokens are in the order of timm and DINOv2: class token, registers, patches row by row.

    DINOv2's ViT-S/14 with registers, for images of any size:

        vit = ViT(518, 14, embed_dim=384, num_heads=6, pos_embed="learn", init_values=1e-5, reg_tokens=4,
                  no_embed_class=True, dynamic_img_size=True)
        load_weights(vit, "dinov2_vits14_reg4_pretrain.pth", encoder_only=True)
        tokens = vit.forward_features(images)  # [B, 1 + 4 + L, 384]

    Args:
        img_size: (height, width) or one number for a square, divisible by patch_size.
        patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio: as in timm.
        num_classes: number of outputs of `head`; 0 for no classifier: the model then returns features.
        global_pool: features of an image: "token" for the class token, "avg", "max" or "avgmax" over the patches, "map"
            for `attn_pool`, an `AttentionPool` (SigLIP), "" for all tokens [B, N, D].
        qkv_bias, qk_norm, init_values, norm_eps: see `Block`; init_values=None for no LayerScale.
        class_token: prepend a class token.
        pos_embed: "sincos" for fixed positions, "learn" for trained ones, "none" for no positions.
        no_embed_class: give the positional table no rows for class token and registers.
        no_embed_reg: give the positional table no rows for registers, as in DINOv2's code, where the class token has
            one. timm has no such model: for it that row is added to the class token.
        reg_tokens: number of registers, tokens whose output is not part of the features.
        pre_norm: put a layer norm before the first block, and no bias into the patch embedding (CLIP).
        fc_norm: normalise features after pooling, by `fc_norm`, instead of tokens before it, by `norm`; None for True
            if features are pooled over patches.
        dynamic_img_size: accept images of any size divisible by patch_size, with interpolated positions.
        pos_offset, pos_antialias: how positions are interpolated for them, see `interpolate_positions`. The defaults
            are those of timm and of DINOv2's models with registers; DINO, iBOT and DINOv2's other models have 0.1 and
            False.
        mask_token: have a trained vector `mask_token` [1, D] that `forward_features` puts in place of masked patches.
        drop_path_rate: rate of stochastic depth in training: 0 in the first block, linear to this in the last.
        drop_path_subset: DINOv2's stochastic depth: each branch of each block is computed for a random subset of
            exactly B·(1 − drop_path_rate) samples, see `drop_path_subsets`.
        mlp: see `Block`; timm's mlp_ratio counts both halves of SwiGLU.
        conv_stem: embed by a `ConvStem`; patch_size is 16 then.
        row_first: MoCo v3's order of fixed positions, see `sincos_positions`.

    Raises:
        ValueError: an argument is out of range or does not fit another; by a call, images of another size.

    Source: Dosovitskiy et al., 2021 (ViT), section 3.1; Darcet et al., "Vision Transformers Need Registers", 2024;
    Oquab et al., "DINOv2", 2024.
    """

    tables: tuple[str, ...] = ("pos_embed",)  # positional tables in the state dict, each for `grid`

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        num_classes: int = 0,
        global_pool: str = "token",
        qkv_bias: bool = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        class_token: bool = True,
        pos_embed: Literal["sincos", "learn", "none"] = "sincos",
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        fc_norm: bool | None = None,
        no_embed_reg: bool = False,
        dynamic_img_size: bool = False,
        pos_offset: float = 0.0,
        pos_antialias: bool = True,
        mask_token: bool = False,
        drop_path_rate: float = 0.0,
        drop_path_subset: bool = False,
        mlp: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"] = "gelu",
        norm_eps: float = 1e-6,
        conv_stem: bool = False,
        row_first: bool = False,
    ):
        super().__init__()
        name = type(self).__name__
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        _check_arguments(name, size, patch_size, embed_dim, conv_stem, drop_path_rate, reg_tokens)
        self.img_size, self.patch_size, self.in_chans, self.embed_dim = size, patch_size, in_chans, embed_dim
        self.grid = (size[0] // patch_size, size[1] // patch_size)
        self.num_prefix_tokens = int(class_token) + reg_tokens
        # rows of pos_embed for prefix tokens, which are the first of them
        self.pos_prefix = 0 if no_embed_class else int(class_token) + reg_tokens * (not no_embed_reg)
        self.global_pool = _check_pool(name, "global_pool", global_pool, class_token, True)
        self.no_embed_reg = no_embed_reg and reg_tokens > 0 and not no_embed_class
        self.dynamic_img_size, self.pos_offset, self.pos_antialias = dynamic_img_size, pos_offset, pos_antialias
        self.drop_path_rate, self.drop_path_subset = drop_path_rate, drop_path_subset
        if conv_stem:
            self.patch_embed: PatchEmbed | ConvStem = ConvStem(in_chans, embed_dim)
        else:
            self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, bias=not pre_norm)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim)) if mask_token else None
        self.pos_embed: nn.Parameter | None = None
        if pos_embed == "sincos":
            fixed = sincos_positions(embed_dim, self.grid, self.pos_prefix, row_first)
            self.pos_embed = nn.Parameter(fixed, requires_grad=False)
        elif pos_embed == "learn":
            self.pos_embed = nn.Parameter(torch.zeros(1, self.pos_prefix + self.grid[0] * self.grid[1], embed_dim))
        elif pos_embed != "none":
            raise ValueError(f"{name}: pos_embed must be 'sincos', 'learn' or 'none', got {pos_embed!r}")
        self.norm_pre = ResidualNorm(embed_dim, norm_eps) if pre_norm else None
        options: dict[str, Any] = {"qkv_bias": qkv_bias, "qk_norm": qk_norm, "init_values": init_values}
        options |= {"mlp": mlp, "norm_eps": norm_eps}
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, **options) for _ in range(depth))
        fc_norm = global_pool in ("avg", "max", "avgmax") if fc_norm is None else fc_norm
        self.norm = None if fc_norm else ResidualNorm(embed_dim, norm_eps)
        self.fc_norm = nn.LayerNorm(embed_dim, norm_eps) if fc_norm else None
        pool = AttentionPool(embed_dim, num_heads, mlp_ratio, mlp, norm_eps) if global_pool == "map" else None
        self.attn_pool = pool
        self.head: nn.Module = Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._cache: dict[tuple[int, int], tuple[Tensor, tuple, Tensor]] = {}  # results of `positions` by grid
        self.register_load_state_dict_pre_hook(_fit_tables)
        self._initialise()

    def _initialise(self) -> None:
        self.apply(xavier_)
        if isinstance(self.patch_embed, PatchEmbed):
            nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # as for the linear layer that it equals
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)
        if self.pos_embed is not None and self.pos_embed.requires_grad:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, images: Tensor) -> Tensor:
        """Patch tokens of images [B, C, H, W] without positions: [B, L, D]."""
        self.check_images(images)
        cut_in_patches = isinstance(self.patch_embed, PatchEmbed)
        return self.patch_embed(patchify(images, self.patch_size) if cut_in_patches else images)

    def positions(self, grid: tuple[int, int]) -> Tensor | None:
        """Positions of a grid of patches [1, rows·columns, D]; None for a model without positions.

        Another grid than the model's gets interpolated ones (`interpolate_positions`): fixed positions once for each
        grid, trained ones at each call, since they change.
        """
        if self.pos_embed is None:
            return None
        if grid == self.grid:
            return self.pos_embed[:, self.pos_prefix :]
        table, cached = self.pos_embed, self._cache.get(grid)
        if table.requires_grad or torch.compiler.is_compiling() or table.is_inference():
            return self._interpolated(table, grid)
        state = (table._version, table.device, table.dtype)  # the version changes with each write to the table
        if cached is None or cached[0] is not table or cached[1] != state:
            with torch.inference_mode(False):
                positions = self._interpolated(table, grid)
            self._cache[grid] = cached = (table, state, positions)
        return cached[2]

    def _interpolated(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        how = self.pos_antialias, self.pos_offset
        return interpolate_positions(table, self.grid, grid, self.pos_prefix, *how)[:, self.pos_prefix :]

    def encode(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Patch tokens with their positions added [B, M, D] → normalised tokens [B, prefix + M, D].

        Args:
            tokens: tokens of all patches, or of some of them in any order.
            dtype: dtype of the result, as in `ResidualNorm`.
        """
        x = self._add_prefix(tokens)
        if self.norm_pre is not None:
            x = self.norm_pre(x, None, x.dtype)[1]
        delta = None
        if self.training and self.drop_path_rate:
            draw = drop_path_subsets if self.drop_path_subset else drop_path_factors
            argument = "kept" if self.drop_path_subset else "drop_path"
            for block, draws in zip(self.blocks, draw(self.drop_path_rate, len(self.blocks), x)):
                x, delta = block(x, delta, **{argument: draws})
        else:
            for block in self.blocks:
                x, delta = block(x, delta)
        if self.norm is not None:
            return self.norm(x, delta, dtype)[1]
        x = x if delta is None else x + delta
        return x if dtype is None else x.to(dtype)

    def _add_prefix(self, tokens: Tensor) -> Tensor:
        """Class token and registers with their positions in front of tokens [B, M, D]."""
        prefix: list[Tensor] = [x for x in (self.cls_token, self.reg_token) if x is not None]
        if not prefix:
            return tokens
        x = torch.cat(prefix, dim=1) if len(prefix) > 1 else prefix[0]
        if self.pos_embed is not None and self.pos_prefix:
            positions = self.pos_embed[:, : self.pos_prefix]
            rest = x.shape[1] - self.pos_prefix  # registers without a position
            x = x + positions if not rest else torch.cat([x[:, : self.pos_prefix] + positions, x[:, -rest:]], dim=1)
        return torch.cat([x.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, C, H, W] → tokens [B, prefix + L, D], normalised unless `fc_norm` does that after pooling.

        Args:
            images: [B, C, H, W].
            mask: [B, L] bool, True for patches in whose place `mask_token` is put, before positions are added.
        """
        tokens = self.embed(images)
        if mask is not None:
            if self.mask_token is None:
                raise ValueError(f"{type(self).__name__}: mask must be None without mask_token=True, got a tensor")
            check.tensor(type(self).__name__, "mask", mask, "B L", B=tokens.shape[0], L=tokens.shape[1])
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        positions = self.positions((images.shape[2] // self.patch_size, images.shape[3] // self.patch_size))
        # Adding float32 positions makes the residual stream float32; without positions the tokens are converted.
        tokens = tokens.to(images.dtype) if positions is None else tokens + positions
        return self.encode(tokens, tokens.dtype)  # not in autocast's dtype: losses and metrics read the features, too

    def last_tokens(self, images: Tensor, count: int = 1) -> list[Tensor]:
        """Tokens after each of the last `count` blocks, all normalised by `norm`: [B, prefix + L, D] each, in the order
        of the blocks. Equals `get_intermediate_layers` of DINO.

        Args:
            images: [B, C, H, W].
            count: number of blocks, 1 to the depth.

        Raises:
            ValueError: `count` is out of range.
        """
        if not 1 <= count <= len(self.blocks):
            raise ValueError(f"ViT: count must be 1 to the depth {len(self.blocks)}, got {count}")
        outputs: list[tuple[Tensor, Tensor]] = []
        handles = [
            block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            for block in self.blocks[-count:]
        ]
        try:
            self.forward_features(images)
        finally:
            for handle in handles:
                handle.remove()
        if self.norm is None:
            return [x + delta for x, delta in outputs]
        return [self.norm(x, delta, x.dtype)[1] for x, delta in outputs]

    def features(self, images: Tensor, pool: str | None = None) -> Tensor:
        """[B, C, H, W] → features [B, D], the input of `head`; `pool` replaces `global_pool` if given."""
        has = self.cls_token is not None, self.attn_pool is not None
        pool = self.global_pool if pool is None else _check_pool("features", "pool", pool, *has)
        x = self.forward_features(images)
        patches = x[:, self.num_prefix_tokens :]
        if pool == "token":
            x = x[:, 0]
        elif pool == "avg":
            x = patches.mean(1)
        elif pool == "max":
            x = patches.amax(1)
        elif pool == "map":
            x = self.attn_pool(x)
        elif pool == "avgmax":
            x = 0.5 * (patches.amax(1) + patches.mean(1))
        return x if self.fc_norm is None else self.fc_norm(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def timm_state(self) -> dict[str, Tensor]:
        """State dict for timm's model: without `mask_token`, and with `no_embed_reg` the class token's position in the
        class token, for ``no_embed_class=True``."""
        state = {name: x for name, x in self.state_dict().items() if name != "mask_token"}
        if self.no_embed_reg and "pos_embed" in state:
            positions = state["pos_embed"]
            state |= {"cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
        return state

    def _apply(self, fn, recurse: bool = True) -> "ViT":
        self._cache = {}  # `to` replaces the data of the parameters
        return super()._apply(fn, recurse)

    def check_images(self, images: Tensor) -> None:
        """Checks that images have size `img_size`, or with `dynamic_img_size` a size divisible by patch_size."""
        (height, width), name, patch = self.img_size, type(self).__name__, self.patch_size
        check.tensor(name, "images", images, "B C H W")
        if self.dynamic_img_size:
            divisible = images.shape[2] >= patch and not (images.shape[2] % patch or images.shape[3] % patch)
            if images.shape[1] != self.in_chans or not divisible or not images.shape[3]:
                expected = f"[B, C={self.in_chans}, H, W] with H and W divisible by patch_size={patch}"
                raise ValueError(f"{name}: images must have shape {expected}, got {list(images.shape)}")
        elif images.shape[1:] != (self.in_chans, height, width):
            expected = f"[B, C={self.in_chans}, H={height}, W={width}]"
            remedy = f"build {name}(img_size=(H, W)) for another size, it loads this state dict with fitted positions"
            raise ValueError(f"{name}: images must have shape {expected}, got {list(images.shape)} ({remedy})")


def _check_arguments(
    name: str, size: tuple[int, int], patch: int, dim: int, conv_stem: bool, drop_path_rate: float, registers: int
) -> None:
    if size[0] % patch or size[1] % patch:
        raise ValueError(f"{name}: img_size must be divisible by patch_size={patch}, got {size[0]}×{size[1]}")
    if conv_stem and (patch != 16 or dim % 8):
        expected = "conv_stem needs patch_size=16 and embed_dim divisible by 8"
        raise ValueError(f"{name}: {expected}, got {patch} and {dim}")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"{name}: drop_path_rate must be at least 0 and below 1, got {drop_path_rate}")
    if registers < 0:
        raise ValueError(f"{name}: reg_tokens must be at least 0, got {registers}")


def xavier_(module: nn.Module) -> None:
    """Xavier-uniform weight and zero bias of a linear layer; for `Module.apply`. qkv counts as one matrix."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def moco_v3_vit(name: str, img_size: int | tuple[int, int] = 224, freeze_patch_embed: bool = True) -> ViT:
    """A ViT of `MOCO_V3_SIZES` with that code's positions and initial weights. A convolutional stem is never frozen.

    Source: Chen et al., 2021 (MoCo v3), section 4.3 ("random patch projection"), and its code.
    """
    dim, depth, heads, patch = MOCO_V3_SIZES[name]
    vit = ViT(img_size, patch, 3, dim, depth, heads, conv_stem=name.startswith("vit_conv"), row_first=True)
    bound = (6 / (dim + dim)) ** 0.5  # q, k and v as three matrices
    for module in vit.modules():
        if isinstance(module, Block):
            nn.init.uniform_(module.attn.qkv.weight, -bound, bound)
    if vit.cls_token is not None:
        nn.init.normal_(vit.cls_token, std=1e-6)
    if isinstance(vit.patch_embed, PatchEmbed):
        if vit.patch_embed.proj.bias is not None:
            nn.init.zeros_(vit.patch_embed.proj.bias)
        vit.patch_embed.requires_grad_(not freeze_patch_embed)
    return vit


def dino_vit(
    name: str,
    img_size: int | tuple[int, int] = 224,
    patch_size: int | None = None,
    drop_path_rate: float = 0.0,
    *,
    token_std: float | None = None,
    **options: Any,
) -> ViT:
    """A ViT of `DINO_SIZES` for images of any size, with the initial weights of DINO's, iBOT's and DINOv2's code.

    Positions are trained, and interpolated with DINO's offset, without antialias.

    Args:
        name: size.
        img_size: size of the large crops, for whose grid the positional table is.
        patch_size: that of `DINO_SIZES` if None.
        drop_path_rate: see `ViT`.
        token_std: standard deviation of the class token: DINOv2's 1e-6; that of positions, 0.02, as in DINO, if None.
        options: further arguments of `ViT`.

    Source: Caron et al., 2021 (DINO), and Oquab et al., 2024 (DINOv2), their code.
    """
    if name not in DINO_SIZES:
        raise ValueError(f"dino_vit: name must be one of {', '.join(DINO_SIZES)}, got {name!r}")
    dim, depth, heads, patch = DINO_SIZES[name]
    if name == "vit_giant":  # two thirds of 4 · D, rounded up to a multiple of 8, for each half
        options = {"mlp": "swiglu", "mlp_ratio": 2 * ((int(4 * dim * 2 / 3) + 7) // 8 * 8) / dim, **options}
    how: dict[str, Any] = {"pos_embed": "learn", "dynamic_img_size": True, "pos_offset": 0.1, "pos_antialias": False}
    how |= {"drop_path_rate": drop_path_rate, **options}
    vit = ViT(img_size, patch_size or patch, 3, dim, depth, heads, **how)
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if isinstance(vit.patch_embed, PatchEmbed):
        vit.patch_embed.proj.reset_parameters()  # torch's default
    if vit.cls_token is not None:
        (nn.init.trunc_normal_ if token_std is None else nn.init.normal_)(vit.cls_token, std=token_std or 0.02)
    return vit


def without_mask_token(vit: ViT) -> ViT:
    """A ViT that shares everything with `vit` but its mask token: its names are timm's."""
    copy: Any = shared_copy(vit, without=("mask_token",))
    copy.mask_token = None
    return copy


def _check_pool(name: str, argument: str, pool: str, class_token: bool, attention: bool) -> str:
    pools = [p for p in POOLS if (class_token or p != "token") and (attention or p != "map")]
    if pool not in pools:
        missing = {"token": "class token", "map": "attn_pool"}.get(pool)
        remedy = f" (without {missing})" if missing else ""
        raise ValueError(f"{name}: {argument} must be one of {', '.join(map(repr, pools))}, got {pool!r}{remedy}")
    return pool


def _fit_tables(vit: ViT, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Hook before `load_state_dict`: interpolates positional tables made for another grid of patches."""
    for name in vit.tables:
        table, parameter = state.get(prefix + name), getattr(vit, name)
        if table is None or parameter is None or table.is_meta:
            continue
        prefix_tokens = parameter.shape[1] - vit.grid[0] * vit.grid[1]
        if vit.no_embed_reg and math.isqrt(table.shape[1]) ** 2 == table.shape[1]:  # timm's, without a class token's
            table = state[prefix + name] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
        if table.ndim == 3 and table.shape[2] == parameter.shape[2] and table.shape[1] > prefix_tokens:
            state[prefix + name] = fit_positions(table, vit.grid, prefix_tokens)
