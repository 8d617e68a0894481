"""BEiT's vision transformer: relative positions as a bias of attention. Parameter names are those of the official code
and of timm's `Beit`."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import ops

from .attention import Attention
from .block import Mlp, drop_path_factors
from .norm import ResidualNorm
from .vit import ViT

# name: (embed_dim, depth, num_heads, patch_size). Base, large: Bao et al., 2021, section 3.1.
BEIT_SIZES = {
    "vit_mini": (128, 4, 4, 4),
    "vit_tiny": (192, 12, 3, 16),
    "vit_small": (384, 12, 6, 16),
    "vit_base": (768, 12, 12, 16),
    "vit_large": (1024, 24, 16, 16),
}
TABLE, INDEX = "relative_position_bias_table", "relative_position_index"


def relative_position_index(grid: tuple[int, int]) -> Tensor:
    """Row of the bias table for each pair of tokens [1 + L, 1 + L] int64, the class token first.

    The table has (2·rows − 1)·(2·columns − 1) rows for the offsets of two patches, then one each for class token to
    patch, patch to class token, and class token to itself.
    """
    rows, columns = grid
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    offset = (row[:, None] - row + rows - 1) * (2 * columns - 1) + column[:, None] - column + columns - 1
    index = F.pad(offset, (1, 0, 1, 0))
    pairs = (2 * rows - 1) * (2 * columns - 1)
    index[0, :], index[:, 0], index[0, 0] = pairs, pairs + 1, pairs + 2
    return index


def fit_bias_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A bias table of a square grid [rows, H], interpolated for `grid`; one that cannot be of a square stays as it is.

    Equals timm's `resize_rel_pos_bias_table_simple`: bicubic on the plane of offsets; the rows of the class token stay.
    """
    height, width = (2 * side - 1 for side in grid)
    side = math.isqrt(max(len(table) - 3, 0))
    if table.ndim != 2 or side**2 != len(table) - 3 or len(table) == height * width + 3:
        return table
    plane = table[:-3].float().T.reshape(1, -1, side, side)
    resized = F.interpolate(plane, (height, width), mode="bicubic", align_corners=False)
    return torch.cat([resized[0].flatten(1).T.to(table.dtype), table[-3:]])


class RelativePositionBias(nn.Module):
    """Trained bias of attention for each head and pair of tokens: ``module()`` → [H, 1 + L, 1 + L].

    The bias of two patches depends on their offset alone. It starts at 0. A state dict of another, square grid of
    patches loads too: its table is interpolated (`fit_bias_table`).

    Args:
        grid: rows and columns of patches.
        num_heads: H.

    Source: Bao et al., 2021 (BEiT), its code; Raffel et al., "Exploring the Limits of Transfer Learning", 2020,
    section 2.1, for text.
    """

    tables = (TABLE, INDEX)  # names in the state dict that may have another size in a file

    def __init__(self, grid: tuple[int, int], num_heads: int):
        super().__init__()
        _add_table(self, grid, num_heads)

    def forward(self) -> Tensor:
        return _bias(self)


def _add_table(module: nn.Module, grid: tuple[int, int], num_heads: int) -> None:
    """Gives a module its bias table and the index of its rows, which is a buffer of official state dicts."""
    pairs = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    module.relative_position_bias_table = nn.Parameter(torch.zeros(pairs + 3, num_heads))
    module.register_buffer(INDEX, relative_position_index(grid))

    def fit(module: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
        """Hook before `load_state_dict`. The module keeps its own index, which timm's state dicts do not have."""
        table = state.get(prefix + TABLE)
        if table is not None:
            state[prefix + TABLE] = fit_bias_table(table, grid)
            state[prefix + INDEX] = module.get_buffer(INDEX)

    module.register_load_state_dict_pre_hook(fit)


def _bias(module: nn.Module) -> Tensor:
    index = module.get_buffer(INDEX)
    return module.get_parameter(TABLE)[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1).contiguous()


class BeitAttention(Attention):
    """Multi-head self-attention with biases of queries and values, none of keys, and a bias of the scores.

    Args:
        dim: D, divisible by num_heads.
        num_heads: H.
        grid: rows and columns of patches of a table of its own; None for no table.
    """

    tables = (TABLE, INDEX)

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int] | None = None):
        super().__init__(dim, num_heads)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.has_table = grid is not None
        if grid is not None:
            _add_table(self, grid, num_heads)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """[B, N, D] → [B, N, D]; `bias` [H, N, N] is added to the scores, beside that of the own table."""
        return self.proj(ops.attention_packed(self.project(x), self.scale, self._whole_bias(bias)).flatten(2))

    def project(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return ops.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.num_heads, -1))

    def weights(self, x: Tensor, queries: slice = slice(None), bias: Tensor | None = None) -> Tensor:
        return super().weights(x, queries, self._whole_bias(bias))

    def _whole_bias(self, bias: Tensor | None) -> Tensor | None:
        """A bias of the scores, with that of the own table if there is one."""
        if not self.has_table:
            return bias
        return _bias(self) if bias is None else bias + _bias(self)


class BeitBlock(nn.Module):
    """Pre-norm transformer block with LayerScale.

    Args:
        dim, num_heads, mlp_ratio, norm_eps: as in `Block`.
        init_values: initial value of LayerScale's factors `gamma_1` and `gamma_2`; 0 for no LayerScale.
        grid: see `BeitAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        init_values: float = 0.1,
        grid: tuple[int, int] | None = None,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values)) if init_values else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values)) if init_values else None
        self.norm1 = ResidualNorm(dim, norm_eps)
        self.attn = BeitAttention(dim, num_heads, grid)
        self.norm2 = ResidualNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self, x: Tensor, delta: Tensor | None = None, bias: Tensor | None = None, drop_path: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and the MLP's output, as of `Block`; `bias` of the attention's scores, `drop_path` as
        there."""
        attention_factor, mlp_factor = (None, None) if drop_path is None else drop_path.unbind(0)
        x, y = self.norm1(x, delta)
        x, y = self.norm2(x, _scaled(self.attn(y, bias), self.gamma_1, attention_factor))
        return x, _scaled(self.mlp(y), self.gamma_2, mlp_factor)


def _scaled(y: Tensor, gamma: Tensor | None, factor: Tensor | None) -> Tensor:
    """A branch's output [B, N, D] times LayerScale's gamma and the samples' drop-path factors [B, 1, 1]."""
    if gamma is None:
        return y if factor is None else y * factor
    return y * (gamma if factor is None else gamma * factor)  # one pass over y for both


class Beit(ViT):
    """BEiT's ViT: images [B, C, H, W] → features [B, D], and through `head` → logits.

    Arguments of the same names are those of `ViT`. A state dict of timm's `Beit` with the same arguments loads, and so
    does an official one without `mask_token` and `lm_head`; one of another, square grid of patches has its bias tables
    interpolated.

    timm's BEiT-B, as fine-tuned for ImageNet:

        vit = Beit(224, num_classes=1000, relative_bias="block", global_pool="avg")
        load_weights(vit, "beit_base_patch16_224.safetensors")

    Args:
        relative_bias: "shared" for one bias table for all blocks, as in pretraining; "block" for one table for each, as
            in fine-tuning; "none" for no relative positions.
        abs_pos: add trained absolute positions to the tokens.
        init_values: initial value of LayerScale's factors: 0.1, for large models 1e-5; 0 for no LayerScale.

    Source: Bao et al., "BEiT: BERT Pre-Training of Image Transformers", 2022, section 2 and its code.
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
        *,
        num_classes: int = 0,
        global_pool: str = "avg",
        fc_norm: bool | None = None,
        relative_bias: Literal["shared", "block", "none"] = "shared",
        abs_pos: bool = False,
        init_values: float = 0.1,
        mask_token: bool = False,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
    ):
        if relative_bias not in ("shared", "block", "none"):
            raise ValueError(f"Beit: relative_bias must be 'shared', 'block' or 'none', got {relative_bias!r}")
        options: dict = {"num_classes": num_classes, "global_pool": global_pool, "fc_norm": fc_norm}
        options |= {"drop_path_rate": drop_path_rate, "norm_eps": norm_eps, "pos_embed": "learn" if abs_pos else "none"}
        super().__init__(img_size, patch_size, in_chans, embed_dim, 0, num_heads, mlp_ratio, **options)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if mask_token else None
        self.rel_pos_bias = RelativePositionBias(self.grid, num_heads) if relative_bias == "shared" else None
        grid = self.grid if relative_bias == "block" else None
        self.blocks = nn.ModuleList(
            BeitBlock(embed_dim, num_heads, mlp_ratio, init_values, grid, norm_eps) for _ in range(depth)
        )
        self.apply(beit_)
        for name in ("cls_token", "mask_token", "pos_embed"):
            if (x := getattr(self, name)) is not None:
                truncated_normal_(x)
        rescale_(self.blocks)

    def encode(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Patch tokens, with their positions added if there are any [B, L, D] → normalised tokens [B, 1 + L, D]."""
        x, delta = self._add_prefix(tokens), None
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        drop_path = iter([None] * len(self.blocks))
        if self.training and self.drop_path_rate:
            drop_path = iter(drop_path_factors(self.drop_path_rate, len(self.blocks), x))
        for block, factors in zip(self.blocks, drop_path):
            x, delta = block(x, delta, bias, factors)
        if self.norm is not None:
            return self.norm(x, delta, dtype)[1]
        x = x if delta is None else x + delta
        return x if dtype is None else x.to(dtype)

    def timm_state(self) -> dict[str, Tensor]:
        """State dict for timm's `Beit`: without `mask_token` and the index of the bias tables."""
        state = super().timm_state()
        return {name: x for name, x in state.items() if not name.endswith(INDEX)}


def truncated_normal_(x: Tensor, std: float = 0.02) -> None:
    """Normal numbers with the given deviation before those beyond it are drawn again, which leaves 0.54 of it."""
    nn.init.trunc_normal_(x, std=std, a=-std, b=std)


def beit_(module: nn.Module) -> None:
    """BEiT's initial weights of a linear layer or a patch embedding; for `Module.apply`."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        truncated_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def rescale_(blocks: Iterable[Any]) -> None:
    """Divides the last layers of both branches of block i = 1, 2, … by √(2·i)."""
    for i, block in enumerate(blocks, 1):
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.div_(math.sqrt(2 * i))


def decay_groups(method: nn.Module, without: tuple[str, ...]) -> list[dict]:
    """Groups for the optimizer: vectors, biases and the named weights have no weight decay; the gradient is clipped as
    a whole."""
    groups: tuple[list, list] = [], []
    for name, p in method.named_parameters():
        groups[p.ndim <= 1 or name.endswith(".bias") or name.rpartition(".")[2] in without].append(p)
    return [{"params": groups[0], "part": "all"}, {"params": groups[1], "part": "all", "weight_decay_scale": 0.0}]


def patch_size_for(method: str, backbone: str, image_size: tuple[int, int]) -> int:
    """The patch size of a backbone.

    Raises:
        ValueError: the backbone is none of `BEIT_SIZES`, or its patches do not divide the images.
    """
    if backbone not in BEIT_SIZES:
        raise ValueError(f"{method}: unknown backbone {backbone!r}, there are {', '.join(BEIT_SIZES)}")
    patch, (height, width) = BEIT_SIZES[backbone][-1], image_size
    if height % patch or width % patch:
        of = f"the patch size {patch} of {backbone}"
        raise ValueError(f"{method}: --image-size must be divisible by {of}, got {height} {width}")
    return patch
