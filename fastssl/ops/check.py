"""Checks of arguments, with one form of error: the op, the argument, what it must be, and what it is.

    info_nce: k must have shape [B=256, D=128], got [32, 128]

Checks read shapes, dtypes and devices only, never values on a device: no op waits for the GPU to validate its input.
"""

from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fail(op: str, message: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: {message}")


def tensor(op: str, name: str, value: object, dims: str, **sizes: int) -> None:
    """Checks that `value` is a tensor with the dimensions in `dims` ("B L D"), of the sizes given in `sizes`."""
    letters = dims.split()
    if isinstance(value, Tensor):
        shape = value.shape
        if len(shape) == len(letters):
            for letter, size in sizes.items():
                if shape[letters.index(letter)] != size:
                    break
            else:
                return
        expected = ", ".join(f"{d}={sizes[d]}" if d in sizes and d != str(sizes[d]) else d for d in letters)
        fail(op, f"{name} must have shape [{expected}], got {list(shape)}")
    fail(op, f"{name} must be a tensor of shape [{', '.join(letters)}], got {type(value).__name__}", TypeError)


def floating(op: str, **tensors: Tensor) -> None:
    """Checks that each tensor has a floating dtype."""
    for name, value in tensors.items():
        if value.dtype not in FLOATS:
            fail(op, f"{name} must be float32, float64, bfloat16 or float16, got {dtype_name(value.dtype)}", TypeError)


def index(op: str, **tensors: Tensor) -> None:
    """Checks that each tensor is int64."""
    for name, value in tensors.items():
        if value.dtype != torch.int64:
            fail(op, f"{name} must be int64, got {dtype_name(value.dtype)}", TypeError)


def same_device(op: str, **tensors: Tensor) -> None:
    """Checks that each tensor is on the device of the first."""
    (first_name, first), *rest = tensors.items()
    for name, value in rest:
        if value.device != first.device:
            fail(op, f"{name} must be on {first.device} like {first_name}, got {value.device}")


def temperature(op: str, tau: float | Tensor, like: Tensor) -> Tensor:
    """tau as a 0-dim tensor on the device of `like`. A number must be positive; a tensor's value is not checked."""
    if isinstance(tau, Tensor):
        if tau.numel() != 1:
            fail(op, f"tau must be a number or a tensor with one element, got shape {list(tau.shape)}")
        floating(op, tau=tau)
        return tau.reshape(()).to(like.device)
    if not tau > 0:
        fail(op, f"tau must be > 0, got {tau}")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((), tau, dtype=dtype, device=like.device)


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")
