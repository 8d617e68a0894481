"""Weights files: export to the layouts of timm, torchvision and the official code, and loading of all of these, of
DINOv2 and of Hugging Face's ViTMAE.

    timm         the encoder alone, with the names of timm's VisionTransformer or ResNet with num_classes=0
    torchvision  the encoder alone, with the names of torchvision's ResNet with fc = Identity() or VisionTransformer
                 with heads = Identity(); other networks of timm and torchvision have their own names in their format
    mae          the whole model, as MAE's official checkpoints: {"model": …}
    moco         the whole model, as MoCo's and MoCo v3's official checkpoints: {"arch": …, "state_dict":
                 {"module.…": …}}; simsiam is the same for SimSiam, swav for SwAV and DeepCluster-v2
    barlow_twins the whole model, as Barlow Twins' official checkpoints: {"model": {"module.…": …}}; vicreg is the same
                 for VICReg
    dino         the whole model, as DINO's official checkpoints: {"student": {"module.…": …}, "teacher": {…},
                 "dino_loss": {…}}
    beit         the whole model without its tokenizer, as BEiT's official checkpoints: {"model": …}; simmim is the same
                 for SimMIM
    densecl      the whole model, as DenseCL's official checkpoints: {"state_dict": …}, without their second copy of the
                 backbone, which is left out of a file too
    albef        the whole model, as ALBEF's official checkpoints: {"model": …}, with the names that they have twice
    imagegpt     the whole model in a .safetensors, with the names of Hugging Face's ImageGPT, and iGPT's palette
    open_clip    the whole model of CLIP or SigLIP, as open_clip's checkpoints: {"state_dict": …}
    safetensors  the whole model in a .safetensors, with the names of `state_dict()`

Files are .safetensors for timm, imagegpt and safetensors, and .pth for the others, readable by
``torch.load(weights_only=True)``.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastssl.files import write_atomically
from fastssl.nn.momentum import MomentumEncoder
from fastssl.text import printable
from fastssl.tower_names import to_open_clip
from fastssl.weight_files import WeightsFile, read_file
from fastssl.weight_names import plain_name, timm_to_torchvision, to_image_gpt, with_repeated_names

GENERAL_FORMATS = ("timm", "torchvision", "safetensors")  # layouts that every method can be exported to
REFERENCE_FORMATS = {  # layouts of reference checkpoints: key of the state dict in the file, prefix of its names
    "moco": ("state_dict", "module."),
    "mae": ("model", ""),
    "simsiam": ("state_dict", "module."),
    "barlow_twins": ("model", "module."),
    "vicreg": ("model", "module."),
    "swav": ("state_dict", "module."),
    "densecl": ("state_dict", ""),
    "albef": ("model", ""),
    "beit": ("model", ""),
    "simmim": ("model", ""),
    "open_clip": ("state_dict", ""),
}
PARTED_FORMATS = {  # layouts with a dict for each part of the method: names of the parts, prefix of the names in each
    "dino": {"student": "module.", "teacher": "", "dino_loss": ""}
}
FORMATS = (*GENERAL_FORMATS, *REFERENCE_FORMATS, *PARTED_FORMATS, "imagegpt")
LONGEST_NAME = 200  # characters of a name that an error shows
# Prefixes of names in checkpoints: of heads, of what a whole method has beside its encoder, of the encoder.
HEADS = (
    *("head.", "head_dist.", "heads.", "fc.", "classifier.", "pooler.", "dino_head.", "ibot_head.", "lm_head."),
    *("projector.", "bn.", "projection_head.", "prototypes."),  # Barlow Twins, VICReg, SwAV: encoders without a prefix
    *("bank.", "criterion."),  # InstDisc, likewise
)
PAIR_QUEUES = ("image_queue", "text_queue")
METHOD_PARTS = (
    *("encoder_k.", "momentum_encoder.", "target.", "predictor.", "queue", "memory.", "assignments"),
    *("encoder_q.1.", "contexts.", "losses.", "bank_", "criterion_"),  # DenseCL, CPC, CMC
    *("decoder.", "student.", "teacher.", "dino_loss.", "ibot_patch_loss."),
    *("visual_encoder_m.", "text_encoder", "text_proj", "vision_proj", "itm_head.", "temp", *PAIR_QUEUES),  # ALBEF
    *("text.", "projection.", "logit_scale", "logit_bias"),  # CLIP, SigLIP
)
ENCODERS = (
    *("", "encoder_q.", "encoder_q.0.", "base_encoder.", "online.", "encoder.", "teacher.backbone."),
    *("visual_encoder.", "visual."),
)
DERIVED = ("num_batches_tracked", "relative_position_index")  # ends of names that a file may lack
STARTED_ANEW = (  # what a run fills by itself
    *("queue", *PAIR_QUEUES, "memory.", "assignments", "bank", "criterion", "palette.", "counts"),
)


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
    state = to_open_clip(state) if layout == "open_clip" else state
    path = _without_suffix(path)
    state = to_image_gpt(state) if layout == "imagegpt" else state
    if layout in ("timm", "imagegpt", "safetensors"):
        path = path.with_name(f"{path.name}.safetensors")
        save_file(state, path, {"format": "pt", "architecture": arch})
        return path
    path = path.with_name(f"{path.name}.pth")
    content: dict[str, Any] = state  # torchvision
    if layout in REFERENCE_FORMATS:
        key, prefix = REFERENCE_FORMATS[layout]
        state = with_repeated_names(state) if layout == "albef" else state
        content = {key: {f"{prefix}{name}": x for name, x in state.items()}}
        content |= {"arch": arch} if key == "state_dict" else {}
    for part, prefix in PARTED_FORMATS.get(layout, {}).items():
        names = [name for name in state if name.startswith(f"{part}.")]
        content[part] = {prefix + name.removeprefix(f"{part}."): content.pop(name) for name in names}
    with write_atomically(path, "wb") as file:  # an earlier file stays whole when the disk is full
        torch.save(content, file)
    return path


def _encoder_state(method: nn.Module, layout: str) -> dict[str, Tensor]:
    """State dict of the method's encoder with the names of timm or torchvision."""
    encoder: Any = method.encoder
    state = encoder.timm_state() if hasattr(encoder, "timm_state") else encoder.state_dict()
    if any(name.startswith("l_to_ab.") for name in state):
        reason = "neither timm nor torchvision has CMC's two encoders"
        raise ValueError(f"export: {reason}: use --format safetensors")
    if "transformer.wte.weight" in state:
        raise ValueError(
            "export: neither timm nor torchvision has an encoder like iGPT's: use --format imagegpt or safetensors"
        )
    if "blocks.output.conv.w" in state or "codebook.weight" in state:
        raise ValueError(f"export: {layout} has no encoder of codes: use --format safetensors")
    if "patch_embed.proj.0.weight" in state:
        reason = "neither timm's ViT nor torchvision's has MoCo v3's convolutional stem"
        raise ValueError(f"export: {reason}: use --format moco or safetensors")
    library = getattr(encoder, "library", layout)  # of a `ForeignNetwork`
    if library != layout:
        raise ValueError(
            f"export: {encoder.name} has the names of {library} alone: use --format {library} or safetensors"
        )
    if layout == "timm" or not any(name.startswith("blocks.") for name in state):
        return state
    renamed = {timm_to_torchvision(name): x for name, x in state.items()}
    unknown = [name for name in state if timm_to_torchvision(name) == name]
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
    """Loads a file that `export`, timm, torchvision, Hugging Face, open_clip or the official code wrote, strictly.

    What layer norms add to the variance is set to the number of the file if that is another: 1e-12 for Hugging Face's
    ViT and ViTMAE, or `layer_norm_eps` of a config.json beside it. A file does not tell the number of heads.

    Args:
        module: a method, or a `ViT` or ResNet where the file holds an encoder; compiled and wrapped ones, too.
        path: file for `read_weights`.
        encoder_only: load the encoder alone. A method's other parts keep their weights, but its momentum encoders
            become copies of what they follow. A decoder, a mask token and heads (`HEADS`) of the file are left out,
            and of a file with a whole method everything but its encoder.

    Raises:
        ValueError: the file is damaged, needs more than weights_only allows, holds NaN or infinity, or its names,
            shapes or kinds of numbers do not fit. With encoder_only, also where it holds weights of an encoder that the
            module lacks, such as LayerScale's.
    """
    file = _read(path, module)
    if encoder_only:
        encoder = getattr(module, "encoder", module)
        _load_encoder(module, encoder, file)
    else:
        encoder = module
        _check_whole(module, file)
        _load(module, file.state, file.name)
    if file.eps is not None:
        for part in (encoder, *(child for child in module.modules() if isinstance(child, MomentumEncoder))):
            for norm in _layer_norms(part):
                norm.eps = file.eps


def load_initial_weights(method: nn.Module, path: Path | str) -> list[str]:
    """Loads the weights from which a run starts; returns sentences on what does not come from the file.

    The file holds the whole method; or all but its momentum encoders, which become copies, and its queue or bank, which
    start at random, also where they have another size in the file; or an encoder, as for
    ``load_weights(…, encoder_only=True)``. Layer norms stay as they are, because a run is built again from its
    configuration.

    Args:
        method: a `contract.Method` with initial weights.
        path: file for `read_weights`.

    Raises:
        ValueError: as for `load_weights`.
    """
    file = _read(path, method)
    names, given = set(_real_names(method)), set(file.state)
    followers = [path for path, part in method.named_modules() if isinstance(part, MomentumEncoder)]
    momentum_names = {name for name in names if name.startswith(tuple(f"{plain_name(path)}." for path in followers))}
    remade = momentum_names | {name for name in names if name.startswith(STARTED_ANEW) or _is_centre(name)}
    missing = {name for name in names - given if not name.endswith(DERIVED)}
    has_decoder = any(name.startswith("decoder_") for name in given & names)
    notes: list[str] = []
    sizes = {plain_name(name): x.shape for name, x in method.state_dict().items()}
    fresh = {name for name in given & names if name.startswith(STARTED_ANEW)}
    if given <= names and any(file.state[name].shape != sizes[name] for name in fresh):
        parts, kept = _parts(fresh), {name: x for name, x in file.state.items() if name not in fresh}
        file, given = file._replace(state=kept), given - fresh
        notes.append(f"{file.name} has {parts} of another size: left out, so that they start at random")
        missing -= fresh
    if given <= names and missing <= remade:
        _load(method, file.state, file.name)
        if missing:
            copied = _copy_to_momentum_encoders(method) if missing & momentum_names else []
            notes.append(f"{file.name} has no {_parts(missing)}: {_origins(missing - momentum_names, copied)}")
    elif has_decoder or not hasattr(method, "encoder"):
        _check_whole(method, file)
    else:
        encoder: Any = method.encoder
        left_out, copied = _load_encoder(method, encoder, file)
        loaded = {id(x) for x in encoder.state_dict(keep_vars=True).values()}
        tensors = {plain_name(name): x for name, x in method.state_dict(keep_vars=True).items()}
        others = {name for name, x in tensors.items() if id(x) not in loaded}
        # of a student that became a copy of its teacher, see `_copy_to_momentum_encoders`
        others -= {name.replace("teacher.", "student.", 1) for name in set(tensors) - others}
        notes.append(f"{file.name} gives the encoder alone: {_origins(others - momentum_names, copied)}")
        if left_out:
            notes.append(f"{file.name} also has {_parts(left_out)}: left out")
        notes += _notes_on_heads(encoder, file)
    own = {norm.eps for norm in _layer_norms(method)}
    if file.eps is not None and own - {file.eps}:
        notes.append(
            f"{file.name} is of layer norms that add {file.eps:g} to the variance, and those of this method add "
            f"{max(own):g}: its features differ by rounding, more where inputs hardly vary"
        )
    return notes


def _load_encoder(module: nn.Module, encoder: nn.Module, file: WeightsFile) -> tuple[set[str], list[str]]:
    """Loads an encoder's weights into `encoder`, which shares them with `module`.

    Returns the names of the file that were left out, and a sentence for each momentum encoder that became a copy.
    """
    expected = set(_real_names(encoder))
    prefix = next((prefix for prefix in ENCODERS if any(prefix + name in file.state for name in expected)), "")
    state = {name.removeprefix(prefix): x for name, x in file.state.items() if name.startswith(prefix)}
    parts = METHOD_PARTS if prefix else ()
    left_out = {
        name
        for name in file.state
        if name.removeprefix(prefix) not in expected
        and (_is_optional(name.removeprefix(prefix)) or _is_part(name, prefix, parts) or _is_optional(name))
    }
    state = {name: x for name, x in state.items() if prefix + name not in left_out}
    unexpected = {name for name in file.state if not name.startswith(prefix)} - left_out | set(state) - expected
    if not state.keys() & expected:
        kind = type(encoder).__name__
        raise ValueError(f"weights: {file.name} has no weights of a {kind}, but {_first(set(file.state))}")
    remedy = " (build the encoder with the options of the one in the file)"
    _check_names(file.name, expected - set(state) - _given_palette(encoder), unexpected, remedy)
    _momentum_encoders(module)  # raises before anything is loaded
    _load(encoder, state, file.name)
    return left_out, _copy_to_momentum_encoders(module, encoder)


def _check_whole(module: nn.Module, file: WeightsFile) -> None:
    """Checks that the file has the names of the whole module."""
    expected, given = set(_real_names(module)), set(file.state)
    encoder = set(_real_names(getattr(module, "encoder", module)))
    missing, unexpected = expected - given - _given_palette(module), given - expected
    if missing and given == encoder <= expected:
        remedy = " (it holds an encoder alone: encoder_only=True loads that)"
    elif not missing and all(map(_is_optional, unexpected)):
        remedy = " (encoder_only=True leaves decoder, mask token and heads out)"
    else:
        remedy = ""
    _check_names(file.name, missing, unexpected, remedy)


def _given_palette(module: nn.Module) -> set[str]:
    """Names of a palette that was set already: a file of Hugging Face has none."""
    palette = getattr(module, "palette", None)
    return {f"palette.{name}" for name in palette.state_dict()} if getattr(palette, "is_set", False) else set()


def _check_names(file: str, missing: set[str], unexpected: set[str], remedy: str) -> None:
    missing = {name for name in missing if not name.endswith(DERIVED)}
    for names, verb in ((missing, "lacks"), (unexpected, "has beside the model")):
        if names:
            raise ValueError(f"weights: {file} {verb} {_first(names)}{remedy}")


def _load(module: nn.Module, state: dict[str, Tensor], file: str) -> None:
    """Loads the weights after their numbers were checked."""
    names, own = _real_names(module), module.state_dict()
    tables = [getattr(part, "tables", ()) for part in module.modules()]  # see `nn.vit.ViT.tables`
    fitted = {name for names_of_tables in tables if isinstance(names_of_tables, tuple) for name in names_of_tables}
    for name, x in state.items():
        current = own[names[name]]
        _check_kind(name, x, current, file)
        if x.shape != current.shape and name.rpartition(".")[2] not in fitted:
            shapes = f"{list(x.shape)} in the file, {list(current.shape)} in the model"
            raise ValueError(f"weights: {file} does not fit: size mismatch for {printable(name)}: {shapes}")
    check_finite(state, file)
    try:
        module.load_state_dict({names[name]: x for name, x in state.items()}, strict=False)
    except RuntimeError as error:
        reason = printable(str(error).splitlines()[-1].strip())
        raise ValueError(f"weights: {file} does not fit: {reason}") from error


def _check_kind(name: str, x: Tensor, own: Tensor, file: str) -> None:
    """Checks that a weight is a plain tensor of real numbers, or of whole ones where the module has those."""
    name = printable(name)
    if x.layout != torch.strided or x.is_quantized or x.is_meta:
        raise ValueError(f"weights: {file} has a sparse, quantized or empty tensor as {name}")
    whole = not x.is_floating_point() and not x.is_complex()
    fits = x.is_floating_point() if own.is_floating_point() else whole or bool((x == x.real.round()).all())
    if not fits:
        kind = str(x.dtype).removeprefix("torch.")
        needed = "real" if own.is_floating_point() else "whole"
        raise ValueError(f"weights: {file} has {kind} numbers in {name}, where {needed} ones are needed")


def check_finite(state: dict[str, Tensor], file: str) -> None:
    """Checks that weights hold no NaN and no infinity.

    Raises:
        ValueError: they do; the message names `file` and the first tensor.
    """
    floats = {name: x if x.element_size() > 1 else x.float() for name, x in state.items() if x.is_floating_point()}
    if broken := [name for name, x in floats.items() if not x.isfinite().all()]:
        raise ValueError(f"weights: {file} has NaN or infinity in {_first(broken)}")


def _real_names(module: nn.Module) -> dict[str, str]:
    """{name without wrappers: name in the state dict}."""
    names = list(module.state_dict())
    plain = {plain_name(name): name for name in names}
    return plain if len(plain) == len(names) else dict(zip(names, names))


def _momentum_encoders(method: nn.Module) -> list[tuple[str, MomentumEncoder, str, nn.Module]]:
    """(name, momentum encoder, name of what it follows, that): the module beside it with the same names of weights."""
    found = []
    for path, parent in method.named_modules():
        if isinstance(parent, MomentumEncoder):
            continue
        prefix, children = f"{path}." if path else "", dict(parent.named_children())
        for name, child in children.items():
            if not isinstance(child, MomentumEncoder):
                continue
            own = list(child.state_dict())
            same = [n for n, c in children.items() if c is not child and list(c.state_dict()) == own]
            same = [name.removesuffix("_m")] if name.removesuffix("_m") in same and name.endswith("_m") else same
            if len(same) != 1:
                raise ValueError(
                    f"weights: {prefix}{name} of {type(method).__name__} follows a module with the same names of "
                    f"weights, of which {len(same)} are beside it: load the weights yourself"
                )
            found.append((plain_name(prefix + name), child, plain_name(prefix + same[0]), children[same[0]]))
    return found


def _copy_to_momentum_encoders(method: nn.Module, encoder: nn.Module | None = None) -> list[str]:
    """Makes momentum encoders equal to what they follow; returns a phrase for each.

    Where the momentum encoder holds `encoder`, as DINO's teacher does, what it follows becomes a copy of it.
    """
    phrases = []
    loaded = set() if encoder is None else {id(p) for p in encoder.parameters()}
    for name, momentum_encoder, source_name, source in _momentum_encoders(method):
        if loaded & {id(p) for p in momentum_encoder.parameters()}:
            source.load_state_dict(momentum_encoder.state_dict())
            phrases.append(f"{source_name} is a copy of {name}")
        else:
            momentum_encoder.load_state_dict(source.state_dict())
            phrases.append(f"{name} is a copy of {source_name}")
    return phrases


def _origins(fresh: set[str], copied: list[str]) -> str:
    """Where the parts of a method come from that are not in the file."""
    palette = {name for name in fresh if name.startswith("palette.")}
    phrases = ["the palette comes from --palette or k-means"] * bool(palette)
    fresh = fresh - palette
    for names, origin in (({n for n in fresh if not _is_centre(n)}, "random"), (set(filter(_is_centre, fresh)), "0")):
        parts = _parts(names)
        phrases += [f"{parts} {'start' if ' and ' in parts else 'starts'} at {origin}"] * bool(names)
    return ", ".join(phrases + copied) or "nothing else is needed"


def _parts(names: set[str]) -> str:
    """Names of weights as names of parts: "encoder_q.fc and queue"."""
    parts = set()
    has_decoder = any(name.startswith("decoder_") for name in names)
    for name in names:
        first, second, *_ = [*name.split("."), ""]
        if name.startswith("decoder_") or (has_decoder and name == "mask_token"):
            parts.add("decoder")
        elif f"{first}." in (*ENCODERS, "student.", "teacher."):
            parts.add(f"{first}.{second}")
        else:
            parts.add("queue" if first in ("queue_ptr", *PAIR_QUEUES) else first)
    *most, last = sorted(parts) or [""]
    return f"{', '.join(most)} and {last}" if most else last


def _notes_on_heads(encoder: Any, file: WeightsFile) -> list[str]:
    """A sentence for a ViT with narrow heads, as in MoCo v3: a file of more usual ones would load as well."""
    blocks = getattr(encoder, "blocks", None)
    if not blocks or encoder.embed_dim // blocks[0].attn.num_heads >= 64:
        return []
    heads = blocks[0].attn.num_heads
    width = encoder.embed_dim // heads
    return [f"{file.name} does not tell its number of heads: this encoder has {heads} of {width} channels"]


def _layer_norms(module: nn.Module) -> list[nn.LayerNorm]:
    return [part for part in module.modules() if isinstance(part, nn.LayerNorm)]


def _is_optional(name: str) -> bool:
    """True for weights that a checkpoint has beside its encoder: a decoder, the mask token, heads."""
    return name == "mask_token" or name.startswith(("decoder_", *HEADS))


def _is_centre(name: str) -> bool:
    """True for the centre of DINO's and iBOT's losses, which starts at 0."""
    return name.endswith("_loss.center")


def _is_part(name: str, prefix: str, parts: tuple[str, ...]) -> bool:
    """True for a weight of a method beside its encoder, whose names have the prefix."""
    return name.startswith(parts) and not name.startswith(prefix)


def _first(names: set[str] | list[str]) -> str:
    """The first name in alphabetical order, and the number of others."""
    first = min(names)
    first = first if len(first) <= LONGEST_NAME else f"{first[:LONGEST_NAME]}…"
    return printable(first) + (f" and {len(names) - 1} more names" if len(names) > 1 else "")


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Names and tensors of a weights file.

    Removed are the dict around them in official checkpoints ({"model": …}, {"state_dict": …}, DINO's {"teacher": …})
    and the parts of names that DistributedDataParallel, torch.compile and FSDP add at any depth ("module.",
    "_orig_mod."), and DINO's "backbone.". Names of DINOv2, of torchvision's ViT and of Hugging Face's ViT and ViTMAE
    become timm's, see `weight_names.to_timm`.

    Args:
        path: .safetensors, or any other file for ``torch.load(weights_only=True)``.

    Raises:
        ValueError: the file does not exist, is damaged, needs more than weights_only allows, or holds no state dict.
    """
    return _read(path).state


def _read(path: Path | str, module: nn.Module | None = None) -> WeightsFile:
    """A weights file. Names that are those of `module` stay as they are."""
    if module is None:
        return read_file(path)
    own_names = getattr(getattr(module, "encoder", module), "library", "") == "torchvision"  # a `ForeignNetwork`
    # DINOv2's code has a position of the class token beside registers, see `ViT`
    fold = not any(getattr(part, "no_embed_reg", False) for part in module.modules())
    return read_file(path, set(_real_names(module)), own_names, fold)
