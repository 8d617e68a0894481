"""Reading of weights files: state dicts in the layouts of this package, of official code and of other libraries."""

import json
import pickle
import warnings
import zipfile
from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastssl.text import printable
from fastssl.tower_names import to_towers
from fastssl.weight_names import (
    HUGGING_FACE_EPS,
    from_image_gpt,
    is_hugging_face,
    is_image_gpt,
    plain_names,
    student_and_teacher,
    to_timm,
)


class WeightsFile(NamedTuple):
    """Content of a weights file."""

    name: str  # the path, as messages show it
    state: dict[str, Tensor]  # by names without wrappers, those of an encoder as in timm
    eps: float | None  # what its layer norms add to the variance, where it is not 1e-6


def read_file(
    path: Path | str, names: Set[str] = frozenset(), own_names: bool = False, fold: bool = True
) -> WeightsFile:
    """The state dict of a file, with the names of timm unless they are those of the module to load.

    Args:
        path: .safetensors, .npz (big_vision's SigLIP), or any other file for ``torch.load(weights_only=True)``, also a
            TorchScript archive (OpenAI's CLIP).
        names: names of the module to load; a file with these, or with those of a student and a teacher where the module
            has them, keeps them.
        own_names: keep the file's names in any case.
        fold: add a position of the class token beside registers to it, as `weight_names.to_timm` does.

    Raises:
        ValueError: the file does not exist, is damaged, needs more than weights_only allows, or holds no state dict.
    """
    path = Path(path)
    name, content = printable(path), _read_content(path)
    try:
        if any(n.startswith("student.") for n in names) and set(content) != names:
            state = student_and_teacher(content, fold)
            if state:
                return WeightsFile(name, state, None)
        state = plain_names(_state_of(content, name))
        state = from_image_gpt(state) if is_image_gpt(state) else state
    except ValueError as error:
        prefix = "" if str(error).startswith("weights: ") else f"weights: {name}: "
        raise ValueError(f"{prefix}{printable(error)}") from error
    if own_names or set(state) == names:
        return WeightsFile(name, state, None)
    state = to_towers(state)
    return WeightsFile(name, to_timm(state, fold), _hugging_face_eps(path) if is_hugging_face(state) else None)


def _hugging_face_eps(path: Path) -> float:
    """`layer_norm_eps` of the config.json beside a file, else the default of Hugging Face's ViTs."""
    try:
        return float(json.loads((path.parent / "config.json").read_text())["layer_norm_eps"])
    except (OSError, ValueError, KeyError, TypeError):
        return HUGGING_FACE_EPS


def _read_content(path: Path) -> Any:
    """What a file holds."""
    name = printable(path)
    if not path.is_file():
        raise ValueError(f"weights: {name} is no file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()}
        if _is_torchscript(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated; such files remain
                return dict(torch.jit.load(path, map_location="cpu").state_dict())
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and key errors of a damaged file have no common base
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise ValueError(
                f"weights: {name} holds more than weights, and reading that could run code of its author. If you trust "
                f"it, c = torch.load('{name}', weights_only=False), and then "
                "torch.save({k: v for k, v in c.items() if isinstance(v, dict)}, 'clean.pth') makes a file without that"
            ) from error
        raise ValueError(f"weights: {name} is damaged or no weights file ({type(error).__name__})") from error


def _is_torchscript(path: Path) -> bool:
    """True for an archive of torch.jit. Loading one may run TorchScript of the archive, but no Python."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _state_of(content: Any, name: str) -> dict[str, Tensor]:
    """The state dict in the content of a file of that name."""
    state = content
    for key in ("model", "state_dict", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    is_state = isinstance(state, dict) and all(isinstance(n, str) and isinstance(x, Tensor) for n, x in state.items())
    if not is_state or not state:
        raise ValueError(f"weights: {name} holds no state dict: a name with its tensor for each weight")
    return state
