"""Names of weights: those of other libraries in timm's, and without what wrappers of modules add."""

import re

import torch
from torch import Tensor

# What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names, at any depth.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
HUGGING_FACE_EPS = 1e-12  # default `layer_norm_eps` of Hugging Face's ViT and ViTMAE


def plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the parts of names that wrappers add, and without DINO's "backbone."; DenseCL's second copy
    of its backbone is left out.

    Raises:
        ValueError: two names become the same.
    """
    plain: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    names = {plain_name(name) for name in state}
    for name, x in state.items():
        short = plain_name(name)
        if "backbone." in name and f"encoder_q.0.{short}" in names:
            continue
        if short in plain:
            raise ValueError(f"{sources[short]} and {name} are one name, {short}, without the wrappers' parts")
        plain[short], sources[short] = x, name
    return plain


def plain_name(name: str) -> str:
    """One name for `plain_names`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS).removeprefix("backbone.")


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of DINOv2's ViT, torchvision's ViT or Hugging Face's ViT or ViTMAE in timm's names (the decoder of
    ViTMAE in those of the official MAE); any other stays as it is."""
    if is_hugging_face(state):
        return _hugging_face_to_timm(state)
    if {"class_token", "conv_proj.weight", "encoder.pos_embedding"} <= set(state):
        return {rename(name, _FROM_TORCHVISION): x for name, x in state.items()}
    return dinov2_to_timm(state)


_DINOV2 = (  # names of DINOv2's code → timm's
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # chunks of blocks for FSDP; the second number counts all blocks
    (r"^(blocks\.\d+\.mlp)\.w12\.", r"\1.fc1."),
    (r"^(blocks\.\d+\.mlp)\.w3\.", r"\1.fc2."),
)


def dinov2_to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of DINOv2's ViT in timm's names; one that has timm's names already stays as it is.

    With registers the positional table has no row for the class token in timm (``no_embed_class=True``): that row is
    added to the class token.
    """
    state = {rename(name, _DINOV2): x for name, x in state.items()}
    if {"register_tokens", "cls_token", "pos_embed"} <= set(state):
        positions = state["pos_embed"]
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
    return state


_HUGGING_FACE = (  # names of transformers' ViT and ViTMAE, to version 4 and from version 5 on → timm's and MAE's
    (r"^vit\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    # version 5 saves decoder_layers as decoder_encoder.layer
    (r"^decoder\.decoder_(?:encoder\.layer|layers)\.(\d+)\.", r"decoder_blocks.\1."),
    (r"^decoder\.", ""),
    (r"(blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"(blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
    (r"(blocks\.\d+)\.attention\.attention\.(query|key|value)\.", r"\1.attn.\2."),
    (r"(blocks\.\d+)\.attention\.q_proj\.", r"\1.attn.query."),
    (r"(blocks\.\d+)\.attention\.k_proj\.", r"\1.attn.key."),
    (r"(blocks\.\d+)\.attention\.v_proj\.", r"\1.attn.value."),
    (r"(blocks\.\d+)\.attention\.(?:output\.dense|o_proj)\.", r"\1.attn.proj."),
    (r"(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)


def is_hugging_face(names: dict[str, Tensor]) -> bool:
    """True for names of Hugging Face's ViT or ViTMAE."""
    return any(re.search(r"(^|\.)embeddings\.patch_embeddings\.projection\.weight$", name) for name in names)


def _hugging_face_to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renamed, with the projections to queries, keys and values as one."""
    renamed = {rename(name, _HUGGING_FACE): x for name, x in state.items()}
    joined: dict[str, Tensor] = {}
    for name, x in renamed.items():
        match = re.fullmatch(r"(.*\.attn)\.(query|key|value)\.(weight|bias)", name)
        if not match:
            joined[name] = x
            continue
        parts = [f"{match[1]}.{part}.{match[3]}" for part in ("query", "key", "value")]
        if all(part in renamed for part in parts):
            joined[f"{match[1]}.qkv.{match[3]}"] = torch.cat([renamed[part] for part in parts])
        else:
            joined[name] = x  # unknown names are refused by who loads them
    return joined


_TO_TORCHVISION = (  # timm's names of a ViT → torchvision's
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^norm\.", "encoder.ln."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.encoder_layer_\1.ln_\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.encoder_layer_\1.self_attention.in_proj_"),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.encoder_layer_\1.self_attention.out_proj."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layers.encoder_layer_\1.mlp.0."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layers.encoder_layer_\1.mlp.3."),
)
_FROM_TORCHVISION = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"(blocks\.\d+)\.ln_([12])\.", r"\1.norm\2."),
    (r"(blocks\.\d+)\.self_attention\.in_proj_", r"\1.attn.qkv."),
    (r"(blocks\.\d+)\.self_attention\.out_proj\.", r"\1.attn.proj."),
    (r"(blocks\.\d+)\.mlp\.(?:0|linear_1)\.", r"\1.mlp.fc1."),  # linear_1 and linear_2: files of torchvision 0.11
    (r"(blocks\.\d+)\.mlp\.(?:3|linear_2)\.", r"\1.mlp.fc2."),
)


def timm_to_torchvision(name: str) -> str:
    """torchvision's name for a weight of a ViT in timm's names; an unknown name stays as it is."""
    return rename(name, _TO_TORCHVISION)


def rename(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    """The name after each replacement of a regular expression, in order."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name
