"""Weights in and out: files in the layouts of timm, torchvision and the official code, and checkpoints of the latter.

A format says which names a file has:

    timm         the encoder alone, as timm's VisionTransformer or ResNet with num_classes=0 takes it
    torchvision  the encoder alone, as torchvision's ResNet with fc = Identity() or VisionTransformer with
                 heads = Identity() takes it
    mae          the whole model, as the official MAE's checkpoint: {"model": …}
    moco         the whole model, as MoCo's and MoCo v3's checkpoints: {"arch": …, "state_dict": {"module.…": …}}
    safetensors  the whole model in a .safetensors, names as in `state_dict()`

Files are .safetensors for timm and safetensors, and .pth for the others, readable by ``torch.load(weights_only=True)``.
"""

import pickle
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMATS = ("timm", "torchvision", "safetensors", "moco", "mae")


def export(method: nn.Module, layout: str, path: Path, arch: str = "") -> Path:
    """Writes the weights of a method (MAE, MoCo, MoCoV3) to `path`, whose suffix is set, and returns that.

    Args:
        method: a method (`contract.Method`) with the official names in its state dict.
        layout: one of `FORMATS`.
        path: in a folder that exists; a suffix of weights files is replaced by that of the layout.
        arch: name of the backbone, which the moco layout carries.

    Raises:
        ValueError: an unknown layout, or one that this method has no weights for.
    """
    if layout not in FORMATS:
        raise ValueError(f"export: unknown format {layout!r}, there are {', '.join(FORMATS)}")
    official = "mae" if hasattr(method, "decoder_pred") else "moco"
    if layout in ("mae", "moco") and layout != official:
        raise ValueError(f"export: {type(method).__name__} has no weights in the format {layout}, but in {official}")
    if layout in ("timm", "torchvision"):
        state = method.encoder.state_dict()
        if "patch_embed.proj.0.weight" in state:
            other = "neither timm's ViT nor torchvision's has MoCo v3's convolutional stem"
            raise ValueError(f"export: {other}: use --format moco or safetensors")
        if layout == "torchvision" and "cls_token" in state:
            state = _torchvision_vit(state)
    else:
        state = method.state_dict()
    state = {name: x.detach().cpu().contiguous() for name, x in state.items()}
    path = _beside(path)
    if layout in ("timm", "safetensors"):
        path = path.with_name(f"{path.name}.safetensors")
        save_file(state, path, {"format": "pt", "architecture": arch})
        return path
    if layout == "mae":
        state = {"model": state}
    elif layout == "moco":
        state = {"arch": arch, "state_dict": {f"module.{name}": x for name, x in state.items()}}
    path = path.with_name(f"{path.name}.pth")
    torch.save(state, path)
    return path


def _beside(path: Path | str) -> Path:
    """The path without the suffix of a weights file."""
    path = Path(path)
    if not path.name or path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"export: the file must be named, in a folder that exists, got {path}")
    for suffix in (".safetensors", ".pth.tar", ".pth", ".pt"):
        if path.name.endswith(suffix):
            return path.with_name(path.name.removesuffix(suffix))
    return path


def load_weights(module: nn.Module, path: Path, encoder_only: bool = False) -> None:
    """Loads a file that `export` or the official code wrote, strictly.

    Args:
        module: a method, or a `ViT` where the file holds an encoder in timm's names.
        path: .safetensors, or what torch.load reads: {"model": …}, {"state_dict": …} or bare names, with the "module."
            of DistributedDataParallel and the "_orig_mod." of torch.compile before them or not.
        encoder_only: loads the encoder of a MAE file, with its decoder or without, into a `MAE` or `ViT`; a decoder of
            the module keeps its weights.

    Raises:
        ValueError: the file is damaged, needs more than weights_only allows, or its names or shapes do not fit.
    """
    state, wanted = read_weights(path), module.state_dict()
    if encoder_only:
        encoder = module.encoder.state_dict() if hasattr(module, "encoder") else wanted
        if not set(encoder) <= set(wanted):
            raise ValueError(f"weights: encoder_only loads into a ViT or MAE, got {type(module).__name__}")
        wanted, state = encoder, {name: x for name, x in state.items() if name in encoder}
    for names, what in ((set(wanted) - set(state), "lacks"), (set(state) - set(wanted), "has beside the model")):
        if names:
            more = f" and {len(names) - 1} more names" if len(names) > 1 else ""
            alone = not encoder_only and set(state) and set(state) < set(wanted) and "decoder_pred.weight" in names
            way_out = " (it holds an encoder alone: encoder_only=True loads that)" if alone else ""
            raise ValueError(f"weights: {path} {what} {min(names)}{more}{way_out}")
    try:
        module.load_state_dict(state, strict=not encoder_only)
    except RuntimeError as error:
        raise ValueError(f"weights: {path} does not fit: {str(error).splitlines()[-1].strip()}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a weights file, without the wrapping of the official checkpoints."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights: {path} is no file")
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
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    named = isinstance(state, dict) and all(isinstance(n, str) and isinstance(x, Tensor) for n, x in state.items())
    if not named:
        raise ValueError(f"weights: {path} holds no state dict: a name with its tensor for each weight")
    return {name.removeprefix("module.").removeprefix("_orig_mod."): x for name, x in state.items()}


_TORCHVISION = (  # timm's names of a ViT → torchvision's
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^norm\.", "encoder.ln."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)


def _torchvision_vit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, x in state.items():
        for pattern, replacement in _TORCHVISION:
            name = re.sub(pattern, replacement, name)
        renamed[name] = x
    return renamed
