"""The one error sentence of the public door: op, argument, expectation with numbers, what came.

    info_nce: k must have shape [B=256, D=128], got [32, 128]

Checks read shapes, dtypes and devices only, never values on a device: no op waits for the GPU to validate its input.
"""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fail(op: str, message: str, error: type[Exception] = ValueError):
    raise error(f"{op}: {message}")


def tensor(op: str, name: str, value: object, dims: str, **sizes: int) -> None:
    """`value` is a tensor of the dims named in `dims` ("B L D"); those named in `sizes` have that size."""
    letters = dims.split()
    if isinstance(value, Tensor):
        shape = value.shape
        if len(shape) == len(letters):
            for letter, size in sizes.items():
                if shape[letters.index(letter)] != size:
                    break
            else:
                return
        wanted = ", ".join(f"{d}={sizes[d]}" if d in sizes and d != str(sizes[d]) else d for d in letters)
        fail(op, f"{name} must have shape [{wanted}], got {list(shape)}")
    fail(op, f"{name} must be a tensor of shape [{', '.join(letters)}], got {type(value).__name__}", TypeError)


def floating(op: str, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.dtype not in FLOATS:
            fail(op, f"{name} must be float32, float64, bfloat16 or float16, got {_dtype(value)}", TypeError)


def index(op: str, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.dtype != torch.int64:
            fail(op, f"{name} must be int64, got {_dtype(value)}", TypeError)


def same_device(op: str, **tensors: Tensor) -> None:
    (first, reference), *others = tensors.items()
    for name, value in others:
        if value.device != reference.device:
            fail(op, f"{name} must be on {reference.device} like {first}, got {value.device}")


def temperature(op: str, tau: float | Tensor, like: Tensor) -> Tensor:
    """tau as a 0-d tensor on the device of `like`; a number must be positive (a tensor's value is not looked at)."""
    if isinstance(tau, Tensor):
        if tau.numel() != 1:
            fail(op, f"tau must be a number or a tensor with one element, got shape {list(tau.shape)}")
        floating(op, tau=tau)
        return tau.reshape(()).to(like.device)
    if not tau > 0:
        fail(op, f"tau must be > 0, got {tau}")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((), tau, dtype=dtype, device=like.device)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
