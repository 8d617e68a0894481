"""Weights files: export to the layouts of timm, torchvision and the official code, and loading of all of these.

    timm         the encoder alone, with the names of timm's VisionTransformer or ResNet with num_classes=0
    torchvision  the encoder alone, with the names of torchvision's ResNet with fc = Identity() or VisionTransformer
                 with heads = Identity()
    mae          the whole model, as MAE's official checkpoints: {"model": …}
    moco         the whole model, as MoCo's and MoCo v3's official checkpoints: {"arch": …, "state_dict":
                 {"module.…": …}}; simsiam is the same for SimSiam
    barlow_twins the whole model, as Barlow Twins' official checkpoints: {"model": {"module.…": …}}; vicreg is the same
                 for VICReg
    safetensors  the whole model in a .safetensors, with the names of `state_dict()`

Files are .safetensors for timm and safetensors, and .pth for the others, readable by ``torch.load(weights_only=True)``.
"""

import pickle
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GENERAL_FORMATS = ("timm", "torchvision", "safetensors")  # layouts that every method can be exported to
REFERENCE_FORMATS = {  # layouts of reference checkpoints: key of the state dict in the file, prefix of its names
    "moco": ("state_dict", "module."),
    "mae": ("model", ""),
    "simsiam": ("state_dict", "module."),
    "barlow_twins": ("model", "module."),
    "vicreg": ("model", "module."),
}
FORMATS = (*GENERAL_FORMATS, *REFERENCE_FORMATS)
HEADS = ("head.", "head_dist.", "fc.", "dino_head.", "ibot_head.")  # prefixes of the names of heads in checkpoints


def export(method: nn.Module, layout: str, path: Path | str, arch: str = "") -> Path:
    """Writes the weights of a method to a file and returns its path.

    Args:
        method: a `contract.Method`. The module that defines its class names the layout of its reference checkpoint in
            `OFFICIAL`; its state dict has the names of that checkpoint.
        layout: one of `FORMATS`.
        path: file in a folder that exists; the layout's suffix is added, or replaces that of a weights file.
        arch: name of the backbone, for the files that hold one.

    Raises:
        ValueError: the layout is unknown, or the method has no weights in it.
    """
    if layout not in FORMATS:
        raise ValueError(f"export: unknown format {layout!r}, there are {', '.join(FORMATS)}")
    official = getattr(sys.modules[type(method).__module__], "OFFICIAL", None)
    if layout not in (*GENERAL_FORMATS, official):
        formats = ", ".join(filter(None, (*GENERAL_FORMATS, official)))
        raise ValueError(f"export: {type(method).__name__} has no weights in the format {layout}: use {formats}")
    state = _encoder_state(method, layout) if layout in ("timm", "torchvision") else method.state_dict()
    state = {name: x.detach().cpu().contiguous() for name, x in state.items()}
    path = _without_suffix(path)
    if layout in ("timm", "safetensors"):
        path = path.with_name(f"{path.name}.safetensors")
        save_file(state, path, {"format": "pt", "architecture": arch})
        return path
    path = path.with_name(f"{path.name}.pth")
    if layout in REFERENCE_FORMATS:
        key, prefix = REFERENCE_FORMATS[layout]
        file = {"arch": arch} if key == "state_dict" else {}
        torch.save({**file, key: {f"{prefix}{name}": x for name, x in state.items()}}, path)
    else:  # torchvision
        torch.save(state, path)
    return path


def _encoder_state(method: nn.Module, layout: str) -> dict[str, Tensor]:
    """State dict of the method's encoder with the names of timm or torchvision."""
    encoder: Any = method.encoder
    state = encoder.state_dict()
    if "patch_embed.proj.0.weight" in state:
        reason = "neither timm's ViT nor torchvision's has MoCo v3's convolutional stem"
        raise ValueError(f"export: {reason}: use --format moco or safetensors")
    if layout == "timm" or not any(name.startswith("blocks.") for name in state):
        return state
    renamed = {_rename(name, _TORCHVISION): x for name, x in state.items()}
    unknown = [name for name in state if _rename(name, _TORCHVISION) == name]
    if unknown:
        raise ValueError(f"export: torchvision's ViT has no {_first(unknown)}: use --format timm or safetensors")
    missing = {"class_token", "encoder.pos_embedding"} - set(renamed)
    if missing:
        raise ValueError(f"export: torchvision's ViT needs {_first(missing)}: use --format timm or safetensors")
    return renamed


def _without_suffix(path: Path | str) -> Path:
    """The path without the suffix of a weights file."""
    path = Path(path)
    if not path.name or path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"export: the file must be named, in a folder that exists, got {path}")
    for suffix in (".safetensors", ".pth.tar", ".pth", ".pt"):
        if path.name.endswith(suffix):
            return path.with_name(path.name.removesuffix(suffix))
    return path


def load_weights(module: nn.Module, path: Path | str, encoder_only: bool = False) -> None:
    """Loads a file that `export`, timm or the official code wrote, strictly.

    Args:
        module: a method, or a `ViT` or ResNet where the file holds an encoder in its names.
        path: file for `read_weights`.
        encoder_only: load the encoder alone, into a `ViT`, a ResNet or a `MAE`, whose decoder keeps its weights. A
            decoder, a mask token and heads (`HEADS`) of the file are left out.

    Raises:
        ValueError: the file is damaged, needs more than weights_only allows, or its names or shapes do not fit. With
            encoder_only, also where it holds weights of an encoder that the module lacks, such as LayerScale's.
    """
    expected = module.state_dict()
    state = {name if name in expected else _named_in(name, expected): x for name, x in read_weights(path).items()}
    encoder = getattr(module, "encoder", module).state_dict()
    if encoder_only:
        if not set(encoder) <= set(expected):
            raise ValueError(f"weights: encoder_only loads into a ViT or MAE, got {type(module).__name__}")
        expected, state = encoder, {name: x for name, x in state.items() if name in encoder or not _is_optional(name)}
    missing, unexpected = set(expected) - set(state), set(state) - set(expected)
    if encoder_only:
        remedy = " (build the encoder with the options of the one in the file)"
    elif missing and set(state) == set(encoder) <= set(expected):
        remedy = " (it holds an encoder alone: encoder_only=True loads that)"
    elif not missing and all(map(_is_optional, unexpected)):
        remedy = " (encoder_only=True leaves decoder, mask token and heads out)"
    else:
        remedy = ""
    for names, verb in ((missing, "lacks"), (unexpected, "has beside the model")):
        if names:
            raise ValueError(f"weights: {path} {verb} {_first(names)}{remedy}")
    try:
        module.load_state_dict(state, strict=not encoder_only)
    except RuntimeError as error:
        raise ValueError(f"weights: {path} does not fit: {str(error).splitlines()[-1].strip()}") from error


def _is_optional(name: str) -> bool:
    """True for weights that a checkpoint has beside its encoder: a decoder, the mask token, heads."""
    return name == "mask_token" or name.startswith(("decoder_", *HEADS))


def _first(names: set[str] | list[str]) -> str:
    """The first name in alphabetical order, and the number of others."""
    return min(names) + (f" and {len(names) - 1} more names" if len(names) > 1 else "")


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Names and tensors of a weights file.

    Removed are the dict around them in official checkpoints ({"model": …}, {"state_dict": …}, DINO's {"teacher": …})
    and the prefixes "module." of DistributedDataParallel, "_orig_mod." of torch.compile and "backbone." of DINO.
    DINOv2's names become timm's, see `dinov2_to_timm`.

    Args:
        path: .safetensors, or any other file for ``torch.load(weights_only=True)``.

    Raises:
        ValueError: the file does not exist, is damaged, needs more than weights_only allows, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights: {path} is no file")
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and key errors of a damaged file have no common base
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise ValueError(
                f"weights: {path} holds more than weights, and reading that could run code of its author. If you trust "
                f"it, c = torch.load('{path}', weights_only=False), and then "
                "torch.save({'model': c.get('model', c.get('state_dict'))}, 'clean.pth') makes a file of weights alone"
            ) from error
        raise ValueError(f"weights: {path} is damaged or no weights file ({type(error).__name__})") from error
    for key in ("model", "state_dict", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(n, str) and isinstance(x, Tensor) for n, x in state.items()):
        raise ValueError(f"weights: {path} holds no state dict: a name with its tensor for each weight")
    return dinov2_to_timm({_without_prefixes(name): x for name, x in state.items()})


def _named_in(name: str, expected: dict[str, Tensor]) -> str:
    """The name with "backbone." where a method, such as Barlow Twins, has that prefix which `read_weights` removed."""
    return f"backbone.{name}" if f"backbone.{name}" in expected else name


def _without_prefixes(name: str) -> str:
    for prefix in ("module.", "_orig_mod.", "backbone."):
        name = name.removeprefix(prefix)
    return name


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
    state = {_rename(name, _DINOV2): x for name, x in state.items()}
    if {"register_tokens", "cls_token", "pos_embed"} <= set(state):
        positions = state["pos_embed"]
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
    return state


_TORCHVISION = (  # timm's names of a ViT → torchvision's
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


def _rename(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name
