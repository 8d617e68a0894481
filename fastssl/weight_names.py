"""Names of weights: those of other libraries in timm's, and without what wrappers of modules add."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

# What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names, at any depth.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PARAMETRIZED = (  # names of torch.nn.utils.parametrizations.weight_norm → those of torch.nn.utils.weight_norm
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
)
HUGGING_FACE_EPS = 1e-12  # default `layer_norm_eps` of Hugging Face's ViT and ViTMAE


def plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the parts of names that wrappers add, and without DINO's "backbone."; DenseCL's second copy
    of its backbone is left out, and what `with_repeated_names` adds.

    Raises:
        ValueError: two names become the same.
    """
    plain: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    names = {plain_name(name) for name in state}
    for name, x in state.items():
        short = plain_name(name)
        if ("backbone." in name and f"encoder_q.0.{short}" in names) or _is_repeated(name, state):
            continue
        if short in plain:
            raise ValueError(f"{sources[short]} and {name} are one name, {short}, without the wrappers' parts")
        plain[short], sources[short] = x, name
    return plain


_DECODER, _POSITIONS = "cls.predictions.decoder.", "bert.embeddings.position_ids"


def with_repeated_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with all names of Hugging Face's BERT of version 4: the decoder's weights, which are those of the
    word embeddings and of the bias, and the numbers of positions."""
    more: dict[str, Tensor] = {}
    for name in state:
        bert = name.removesuffix("bert.embeddings.word_embeddings.weight")
        if bert == name:
            continue
        positions = len(state[f"{bert}bert.embeddings.position_embeddings.weight"])
        more |= {f"{bert}{_POSITIONS}": torch.arange(positions)[None], f"{bert}{_DECODER}weight": state[name]}
        more[f"{bert}{_DECODER}bias"] = state[f"{bert}cls.predictions.bias"]
    return state | more


def _is_repeated(name: str, state: dict[str, Tensor]) -> bool:
    """True for what `with_repeated_names` adds."""
    if name.endswith(_POSITIONS):
        return True
    bert, found, part = name.partition(_DECODER)
    original = {"weight": "bert.embeddings.word_embeddings.weight", "bias": "cls.predictions.bias"}.get(part)
    first = state.get(f"{bert}{original}") if found else None
    return first is not None and torch.equal(first, state[name])


def plain_name(name: str) -> str:
    """One name for `plain_names`."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS).removeprefix("backbone.")
    return rename(name, _PARAMETRIZED)


def to_timm(state: dict[str, Tensor], fold: bool = True) -> dict[str, Tensor]:
    """A state dict of DINOv2's ViT, torchvision's ViT or Hugging Face's ViT or ViTMAE in timm's names (the decoder of
    ViTMAE in those of the official MAE); any other stays as it is. `fold`: see `dinov2_to_timm`."""
    if is_hugging_face(state):
        return _hugging_face_to_timm(state)
    if {"class_token", "conv_proj.weight", "encoder.pos_embedding"} <= set(state):
        return {rename(name, _FROM_TORCHVISION): x for name, x in state.items()}
    # other networks have stages of blocks, whose names look like chunks of DINOv2's
    return dinov2_to_timm(state, fold) if "cls_token" in state else state


_DINOV2 = (  # names of DINOv2's code → timm's
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # chunks of blocks for FSDP; the second number counts all blocks
    (r"^(blocks\.\d+\.mlp)\.w12\.", r"\1.fc1."),
    (r"^(blocks\.\d+\.mlp)\.w3\.", r"\1.fc2."),
    (r"^register_tokens$", "reg_token"),
    (r"^masked_embed$", "mask_token"),  # iBOT's
)


def dinov2_to_timm(state: dict[str, Tensor], fold: bool = True) -> dict[str, Tensor]:
    """A state dict of DINOv2's or iBOT's ViT in timm's names; one that has timm's names already stays as it is.

    With registers the positional table has no row for the class token in timm (``no_embed_class=True``): with `fold`
    that row is added to the class token.
    """
    registers = "register_tokens" in state
    state = {rename(name, _DINOV2): x for name, x in state.items()}
    return fold_class_position(state) if fold and registers and {"cls_token", "pos_embed"} <= set(state) else state


def fold_class_position(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's state dict with the class token's position added to the class token."""
    positions = state["pos_embed"]
    return {**state, "cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}


_NETWORKS, _HEADS = ("student", "teacher"), ("head.", "dino_head.", "ibot_head.")
_CENTRES = {  # names of a centre in checkpoints of DINO, iBOT and DINOv2 → ours
    "dino_loss.center": "dino_loss.center",
    "ibot_loss.center": "dino_loss.center",
    "ibot_loss.center2": "ibot_patch_loss.center",
    "ibot_patch_loss.center": "ibot_patch_loss.center",
}


def student_and_teacher(content: dict, fold: bool) -> dict[str, Tensor]:
    """State dict of a training checkpoint of DINO, iBOT or DINOv2 in our names: `student.backbone.…`, `student.head.…`,
    `teacher.…`, `dino_loss.center`, `ibot_patch_loss.center`. It is empty for a file of another kind.

    Args:
        content: the file's content: a dict for each part ({"student": …, "teacher": …, "dino_loss": …}), or one state
            dict, maybe behind "model", with the parts' names in front. Of a teacher alone the student becomes a copy.
        fold: see `dinov2_to_timm`.
    """
    content = content["model"] if isinstance(content.get("model"), dict) else content
    flat: dict[str, Tensor] = {}
    for name, x in content.items():
        for inner, tensor in x.items() if isinstance(x, dict) else ((None, x),):
            flat[name if inner is None else f"{name}.{inner}"] = tensor
    state: dict[str, Tensor] = {}
    for network in _NETWORKS:
        part = {name.removeprefix(f"{network}."): x for name, x in flat.items() if name.startswith(f"{network}.")}
        part = plain_names({name: x for name, x in part.items() if isinstance(x, Tensor)})
        heads = {name: x for name, x in part.items() if name.startswith(_HEADS)}
        backbone = to_timm({name: x for name, x in part.items() if name not in heads}, fold)
        state |= {f"{network}.backbone.{name}": x for name, x in backbone.items()}
        state |= {f"{network}.{name}": x for name, x in heads.items() if not _repeats_last_layer(name, heads)}
    if state and not any(name.startswith("student.") for name in state):
        state |= {name.replace("teacher.", "student.", 1): x for name, x in state.items()}
    if state:
        state |= {_CENTRES[name]: x.reshape(1, -1) for name, x in flat.items() if name in _CENTRES}
    return state


def _repeats_last_layer(name: str, state: dict[str, Tensor]) -> bool:
    """True for what iBOT's shared head saves twice, as last_layer and last_layer2."""
    first = state.get(name.replace("last_layer2.", "last_layer."))
    return "last_layer2." in name and first is not None and torch.equal(first, state[name])


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


_IMAGE_GPT_LAYERS = re.compile(r"(.*\bh\.\d+\.(?:attn|mlp)\.c_(?:attn|proj|fc))\.(weight|bias)")
_IMAGE_GPT_MASKS = re.compile(r"(.*\bh\.\d+\.attn)\.(?:masked_)?bias")  # in files of older versions


def is_image_gpt(names: Iterable[str]) -> bool:
    """True for names of Hugging Face's ImageGPT: its layers have biases, and ours have none."""
    return any(name.endswith("h.0.attn.c_attn.bias") for name in names)


def from_image_gpt(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of Hugging Face's ImageGPT in the names and layout of iGPT here: weights transposed, no biases.

    Raises:
        ValueError: a bias is not zero.
    """
    converted = {}
    for name, x in state.items():
        layer = _IMAGE_GPT_LAYERS.fullmatch(name)
        if layer and layer[2] == "bias" and x.count_nonzero():
            raise ValueError(f"{name} must be zero, since iGPT has no biases, got up to {x.abs().max():.3g}")
        if _IMAGE_GPT_MASKS.fullmatch(name) or (layer and layer[2] == "bias"):
            continue
        beside = name.startswith(("transformer.", "lm_head.", "palette."))
        converted[name if beside else f"transformer.{name}"] = x.T.contiguous() if layer and x.ndim == 2 else x
    return converted


def to_image_gpt(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `from_image_gpt`; biases are zeros."""
    converted = {}
    for name, x in state.items():
        layer = _IMAGE_GPT_LAYERS.fullmatch(name)
        converted[name] = x.T.contiguous() if layer else x
        if layer:
            converted[f"{layer[1]}.bias"] = x.new_zeros(len(x))
    return converted
