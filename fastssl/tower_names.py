"""Names of CLIP's and SigLIP's weights in files of OpenAI, open_clip and big_vision, and in ours.

Ours are those of timm's ViT for both towers: visual.blocks.0.attn.qkv.weight, text.blocks.0.attn.qkv.weight.
"""

import re

import torch
from torch import Tensor

from fastssl.weight_names import rename

_BLOCK = r"((?:visual|text)\.blocks\.\d+)"
_FROM_OPEN_CLIP = (
    (r"^(transformer|token_embedding|positional_embedding|ln_final|text_projection)\b", r"text.\1"),
    (r"^visual\.trunk\.", "visual."),  # a network of timm
    (r"^visual\.class_embedding$", "visual.cls_token"),
    (r"^visual\.positional_embedding$", "visual.pos_embed"),
    (r"^visual\.conv1\.", "visual.patch_embed.proj."),
    (r"^visual\.ln_pre\.", "visual.norm_pre."),
    (r"^visual\.ln_post\.", "visual.norm."),
    (r"^visual\.proj$", "projection.weight"),
    (r"^text\.ln_final\.", "text.norm."),
    (r"^text\.text_projection$", "text.projection.weight"),
    (r"^text\.text_projection\.", "text.projection."),
    (r"^(visual|text)\.transformer\.resblocks\.", r"\1.blocks."),
    (_BLOCK + r"\.ln_([12])\.", r"\1.norm\2."),
    (_BLOCK + r"\.attn\.in_proj_", r"\1.attn.qkv."),
    (_BLOCK + r"\.attn\.out_proj\.", r"\1.attn.proj."),
    (_BLOCK + r"\.mlp\.c_fc\.", r"\1.mlp.fc1."),
    (_BLOCK + r"\.mlp\.c_proj\.", r"\1.mlp.fc2."),
)
_NO_WEIGHTS = {"input_resolution", "context_length", "vocab_size"}  # what OpenAI's files hold beside weights
_TRANSPOSED = {"visual.proj", "text_projection", "text.text_projection"}  # parameters where ours are linear layers
_TO_OPEN_CLIP = (  # of a text tower with either name, and of an image tower of CLIP's
    (r"^text\.norm\.", "text.ln_final."),
    (r"^text\.projection\.", "text.text_projection."),
    (r"^visual\.cls_token$", "visual.class_embedding"),
    (r"^visual\.pos_embed$", "visual.positional_embedding"),
    (r"^visual\.patch_embed\.proj\.", "visual.conv1."),
    (r"^visual\.norm_pre\.", "visual.ln_pre."),
    (r"^visual\.norm\.", "visual.ln_post."),
    (r"^projection\.weight$", "visual.proj"),
    (_BLOCK + r"\.norm([12])\.", r"\1.ln_\2."),
    (_BLOCK + r"\.attn\.qkv\.", r"\1.attn.in_proj_"),
    (_BLOCK + r"\.attn\.proj\.", r"\1.attn.out_proj."),
    (_BLOCK + r"\.mlp\.fc1\.", r"\1.mlp.c_fc."),
    (_BLOCK + r"\.mlp\.fc2\.", r"\1.mlp.c_proj."),
    (r"^(visual|text)\.blocks\.", r"\1.transformer.resblocks."),
)


def to_towers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of CLIP or SigLIP in our names; any other stays as it is."""
    if any(name.removeprefix("params/").startswith(("img/", "txt/")) for name in state):
        return _from_big_vision({name.removeprefix("params/"): x for name, x in state.items()})
    if "logit_scale" not in state or not any(name.startswith("visual.") for name in state):
        return state
    ours: dict[str, Tensor] = {}
    for name, x in state.items():
        if name in _NO_WEIGHTS:
            continue
        x = x.T.contiguous() if name in _TRANSPOSED and x.ndim == 2 else x
        ours[rename(name, _FROM_OPEN_CLIP)] = x
    return {name: _reshape(name, x) for name, x in ours.items()}


def _reshape(name: str, x: Tensor) -> Tensor:
    if name in ("logit_scale", "logit_bias"):
        return x.reshape(1)
    if name in ("visual.cls_token", "visual.pos_embed"):
        return x.reshape(1, -1, x.shape[-1])
    return x


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of our CLIP in the names of OpenAI's and open_clip's, or of our SigLIP in those of open_clip's,
    which has timm's ViT as image tower."""
    is_clip = "projection.weight" in state
    theirs: dict[str, Tensor] = {}
    for name, x in state.items():
        if name in ("logit_scale", "logit_bias"):
            theirs[name] = x.reshape(())
        elif name.startswith("visual.") and not is_clip:
            theirs[f"visual.trunk.{name.removeprefix('visual.')}"] = x
        elif name.startswith(("visual.", "projection.")):
            x = x.T.contiguous() if name == "projection.weight" else x
            x = x.reshape(-1) if name == "visual.cls_token" else x[0] if name == "visual.pos_embed" else x
            theirs[rename(name, _TO_OPEN_CLIP)] = x
        elif is_clip and name == "text.projection.weight":
            theirs["text_projection"] = x.T.contiguous()
        else:
            renamed = rename(name, _TO_OPEN_CLIP)
            theirs[renamed.removeprefix("text.") if is_clip else renamed] = x
    return theirs


_FROM_BIG_VISION = (
    (r"^img/", "visual/"),
    (r"^txt/", "text/"),
    (r"/(?:Transformer|Encoder_0)/", "/"),
    (r"/encoderblock_(\d+)/", r"/blocks/\1/"),
    (r"/encoder_norm/", "/norm/"),
    (r"/MAPHead_0/LayerNorm_0/", "/attn_pool/norm/"),
    (r"/MAPHead_0/probe$", "/attn_pool/latent"),
    (r"/MAPHead_0/MultiHeadDotProductAttention_0/", "/attn_pool/"),
    (r"/MAPHead_0/", "/attn_pool/"),
    (r"/LayerNorm_0/", "/norm1/"),
    (r"/LayerNorm_1/", "/norm2/"),
    (r"/MultiHeadDotProductAttention_0/", "/attn/"),
    (r"/MlpBlock_0/Dense_0/", "/mlp/fc1/"),
    (r"/MlpBlock_0/Dense_1/", "/mlp/fc2/"),
    (r"/out/", "/proj/"),
    (r"^text/Embed_0/embedding$", "text/token_embedding/weight"),
    (r"^text/pos_embedding$", "text/positional_embedding"),
    (r"^visual/pos_embedding$", "visual/pos_embed"),
    (r"^visual/embedding/", "visual/patch_embed/proj/"),
    (r"^text/head/", "text/projection/"),
    (r"^t$", "logit_scale"),
    (r"^b$", "logit_bias"),
    (r"/(?:kernel|scale)$", "/weight"),
    (r"/", "."),
)


def _from_big_vision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """flax's names and layouts in ours; blocks may be stacked along a first dimension, as flax's `scan` saves them."""
    parts: dict[str, Tensor] = {}
    for name, x in state.items():
        if "/encoderblock/" in name:
            for i, of_block in enumerate(x):
                numbered = name.replace("/encoderblock/", f"/encoderblock_{i}/")
                parts[rename(numbered, _FROM_BIG_VISION)] = _flax_layout(numbered, of_block)
        else:
            parts[rename(name, _FROM_BIG_VISION)] = _flax_layout(name, x)
    ours: dict[str, Tensor] = {}
    for name, x in parts.items():
        match = re.fullmatch(r"(.*\.(attn|attn_pool))\.(query|key|value)\.(weight|bias)", name)
        if not match:
            ours[name] = x
            continue
        prefix, kind, part, which = match.groups()
        joined = ("query", "key", "value") if kind == "attn" else ("key", "value")
        if part not in joined:
            ours[f"{prefix}.q.{which}"] = x
        elif all(f"{prefix}.{other}.{which}" in parts for other in joined):
            target = f"{prefix}.{'qkv' if kind == 'attn' else 'kv'}.{which}"
            ours[target] = torch.cat([parts[f"{prefix}.{other}.{which}"] for other in joined])
        else:
            ours[name] = x  # unknown names are refused by who loads them
    return ours


def _flax_layout(name: str, x: Tensor) -> Tensor:
    """A weight of flax in torch's layout: kernels have their inputs first."""
    if name == "txt/pos_embedding":
        return x[0]
    if name == "img/embedding/kernel":  # [p, p, C, D]
        return x.permute(3, 2, 0, 1).contiguous()
    if name.endswith("/out/kernel"):  # [H, E, D]
        return x.flatten(0, 1).T.contiguous()
    if name.endswith("/kernel"):  # [D, H, E] or [K, N]
        return x.flatten(1).T.contiguous()
    return x.flatten() if name.endswith(("query/bias", "key/bias", "value/bias")) else x
