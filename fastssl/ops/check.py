"""Checks of arguments, with one form of error: the op, the argument, what it must be, and what it is.

    info_nce: k must have shape [B=256, D=128], got [32, 128]

Checks read shapes, dtypes and devices only, never values on a device: no op waits for the GPU to validate its input.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_is_alias_of = torch._C._is_alias_of  # type: ignore[attr-defined]
SIGNATURES = 1024  # signatures that are remembered of an op, of programs whose sizes change at every step
_CONSTANTS = frozenset({type(None), bool, int, float, str, torch.dtype})  # types of arguments other than tensors


def once_a_signature(checks: Callable[..., None]) -> Callable[..., None]:
    """Marks checks that depend on shapes, dtypes and devices alone: they run at the first call of each signature.

    Arguments are passed by position. Checks of a small op take 2 to 3 µs, as long as its kernel; looking up the
    signature takes 0.2 µs an argument. In torch.compile and for subclasses of tensors the checks always run.
    """
    passed: set[tuple[Any, ...]] = set()

    @functools.wraps(checks)
    def run(*arguments: Any) -> None:
        if torch.compiler.is_compiling():
            return checks(*arguments)
        signature: list[Any] = []
        for value in arguments:
            kind = type(value)
            if kind is Tensor or kind is Parameter:
                signature += (value.shape, value.dtype, value.device)
            elif kind in _CONSTANTS:
                signature += (kind, value)
            else:
                return checks(*arguments)
        key = tuple(signature)
        if key not in passed:
            checks(*arguments)
            if len(passed) >= SIGNATURES:
                passed.clear()
            passed.add(key)

    return run


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


def is_tensor(op: str, name: str, value: object) -> None:
    """Checks that `value` is a tensor, of any shape."""
    if not isinstance(value, Tensor):
        fail(op, f"{name} must be a tensor, got {type(value).__name__}", TypeError)


def integer(op: str, **values: object) -> None:
    """Checks that each value is an integer, which `torch.compile` may trace as a symbol."""
    for name, value in values.items():
        if not isinstance(value, (int, torch.SymInt)):
            fail(op, f"{name} must be an integer, got {_shown(value)}", TypeError)


def number(op: str, **values: object) -> None:
    """Checks that each value is a number, not a tensor."""
    for name, value in values.items():
        if isinstance(value, Tensor) or not hasattr(value, "__float__"):
            fail(op, f"{name} must be a number, got {_shown(value)}", TypeError)


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, (int, float, str)) else type(value).__name__


def in_range(op: str, name: str, ids: Tensor, length: int, last: str = "") -> None:
    """Checks the values of ids on a CPU, for plain-torch bodies; the C++ kernels check what they use by themselves."""
    if ids.is_cpu and ids.numel() and not 0 <= (least := int(ids.min())) <= (most := int(ids.max())) < length:
        got = least if least < 0 else most
        fail(op, f"{name} must be between 0 and {last or f'L-1={length - 1}'}, got {got}", RuntimeError)


def floating(op: str, **tensors: Tensor) -> None:
    """Checks that each tensor has a floating dtype."""
    for name, value in tensors.items():
        is_tensor(op, name, value)
        if value.dtype not in FLOATS:
            fail(op, f"{name} must be float32, float64, bfloat16 or float16, got {dtype_name(value.dtype)}", TypeError)


def index(op: str, **tensors: Tensor) -> None:
    """Checks that each tensor is int64."""
    for name, value in tensors.items():
        is_tensor(op, name, value)
        if value.dtype != torch.int64:
            fail(op, f"{name} must be int64, got {dtype_name(value.dtype)}", TypeError)


def same_device(op: str, **tensors: Tensor) -> None:
    """Checks that each tensor is on the device of the first."""
    (first_name, first), *rest = tensors.items()
    for name, value in rest:
        if value.device != first.device:
            fail(op, f"{name} must be on {first.device} like {first_name}, got {value.device}")


def separate(op: str, written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Checks that no tensor that is written shares memory with itself or with another, as torch's in-place ops do.

    Where two views are not dense, only their first elements are compared: the columns of one matrix interleave without
    sharing an element.
    """
    if torch.compiler.is_compiling():
        return
    tensors = [*written.items(), *read.items()]
    for name, value in written.items():
        if not value.is_contiguous() and _overlaps_itself(value):
            strides = f"shape {list(value.shape)} and strides {list(value.stride())}"
            fail(op, f"{name} must have no two elements in one place of memory, got {strides}: pass {name}.clone()")
    for i, (name, value) in enumerate(tensors[1:], 1):
        for other_name, other in tensors[: min(i, len(written))]:
            if _is_alias_of(value, other) and _share_memory(value, other):
                fail(op, f"{name} must not share memory with {other_name}, got views of the same: pass {name}.clone()")


def _overlaps_itself(value: Tensor) -> bool:
    if value.numel() == 0:
        return False
    extent = 0
    for stride, size in sorted(zip(value.stride(), value.shape)):
        if size > 1 and stride <= extent:
            return True
        extent += (size - 1) * stride
    return False


def _share_memory(one: Tensor, other: Tensor) -> bool:
    if not (one.numel() and other.numel()):
        return False
    (begin, end), (other_begin, other_end) = _extent(one), _extent(other)
    return begin < other_end and other_begin < end


def _extent(value: Tensor) -> tuple[int, int]:
    """First and last byte in its storage: of the whole tensor if it is dense, else of its first element."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride()))
    begin, dense = int(value.storage_offset()) * value.element_size(), span == value.numel()
    return begin, begin + (span if dense else 1) * value.element_size()


TAU = (1e-30, 1e30)  # the smallest and the largest temperature; sums of many 1/tau stay finite in float32


def temperature(op: str, tau: float | Tensor, like: Tensor) -> Tensor:
    """tau as a 0-dim tensor on the device of `like`. A number must be in the range `TAU`; a tensor's is not read."""
    if not isinstance(tau, Tensor):
        number(op, tau=tau)
        if not TAU[0] <= tau <= TAU[1]:
            fail(op, f"tau must be > 0, from {TAU[0]} to {TAU[1]}, so that 1/tau is finite in float32, got {tau}")
    return scalar(op, "tau", tau, like)


def scalar(op: str, name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A number, or a tensor with one element, as a 0-dim tensor on the device of `like`."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            fail(op, f"{name} must be a number or a tensor with one element, got shape {list(value.shape)}")
        floating(op, **{name: value})
        if value.is_meta and not like.is_meta:
            fail(op, f"{name} must be on {like.device} or have a value there, got meta")
        return value.reshape(()).to(like.device)
    number(op, **{name: value})
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if abs(value) > torch.finfo(dtype).max:  # torch.full raises for what it would round to infinity
        value = math.inf if value > 0 else -math.inf
    return torch.full((), value, dtype=dtype, device=like.device)


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")
