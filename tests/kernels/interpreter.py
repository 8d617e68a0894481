"""Triton's interpreter with correct bfloat16, checks of bounds and races, and counts of bytes and operations.

Triton 3.8's interpreter holds bfloat16 as uint16 and computes on these integers: dots multiply bit patterns, sums add
them, and rounding truncates. Here dots and casts are correct, and other arithmetic on bfloat16 raises (a kernel must
convert to float32 first). The interpreter runs programs one after the other, so a race would still give the right
result; here each launch records which program read and wrote which cell, and raises on a conflict.

    with watch() as seen:
        keep_tokens_fwd(x, ids, None)
    seen.requested, seen.distinct, seen.operations
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from fastssl.ops import dispatch

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
NO_PROGRAM, SEVERAL = -1, -2


class Watch:
    """Record of the launches inside `watch()`."""

    def __init__(self, reachable: dict[str, torch.Tensor]):
        self.reachable = reachable  # tensors that kernels find through a table of addresses
        self.requested = defaultdict(int)  # {"kernel.argument": bytes loaded and stored}
        self.distinct = defaultdict(int)  # the same, each byte once for each launch
        self.operations = 0  # of matrix products, 2·M·N·K each
        self.launches = []  # (kernel, grid)
        self.args = []  # tensor arguments of the current launch

    @property
    def bytes(self) -> int:
        return sum(self.requested.values())


class Argument:
    """The memory of a tensor argument of a launch, with a record of reads and writes for each cell."""

    def __init__(self, name: str, x: torch.Tensor):
        self.name, self.size = name, x.element_size()
        self.first = x.data_ptr()
        cells = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride())) if x.numel() else 0
        self.end = self.first + cells * self.size
        self.reader = np.full(cells, NO_PROGRAM) if cells < 2**26 else None  # of huge views only the bounds are checked
        self.writer = np.full(cells, NO_PROGRAM) if cells < 2**26 else None

    def touch(self, addresses: np.ndarray, program: int, writes: bool) -> None:
        if self.reader is None:
            return
        cells = ((addresses - np.uint64(self.first)) // np.uint64(self.size)).astype(np.int64)
        writer, reader = self.writer[cells], self.reader[cells]
        if ((writer != NO_PROGRAM) & (writer != program)).any():
            raise IndexError(f"race: {self.name} is {'written' if writes else 'read'} where another program writes")
        if writes:
            if ((reader != NO_PROGRAM) & (reader != program)).any():
                raise IndexError(f"race: {self.name} is written where another program reads")
            if len(np.unique(cells)) != len(cells):
                raise IndexError(f"race: one store writes a cell of {self.name} twice")
            self.writer[cells] = program
        else:
            self.reader[cells] = np.where((reader == NO_PROGRAM) | (reader == program), program, SEVERAL)

    def distinct(self) -> int:
        if self.reader is None:
            return 0
        return int(((self.reader != NO_PROGRAM) | (self.writer != NO_PROGRAM)).sum()) * self.size


_watch: Watch | None = None


@contextlib.contextmanager
def watch(reachable: dict[str, torch.Tensor] | None = None) -> Iterator[Watch]:
    """Within this context the interpreter is corrected, and launches are checked and recorded.

    Args:
        reachable: {name: tensor} that kernels find through a table of addresses, beside their arguments.
    """
    global _watch
    _watch = Watch(reachable or {})
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in _replacements():
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield _watch
    _watch = None


@contextlib.contextmanager
def triton_on_cpu(reachable: dict[str, torch.Tensor] | None = None) -> Iterator[Watch]:
    """Within this context the public ops run the interpreted Triton kernels on CPU tensors."""
    with torch.library._scoped_library("fastssl", "IMPL") as library, watch(reachable) as seen:
        for name, load in dispatch._triton_loaders.items():
            library.impl(name, load(), "CPU", allow_override=True)
        yield seen


def _replacements() -> list[tuple[type, str, object]]:
    load, store = Builder.create_masked_load, Builder.create_masked_store
    cast, binary, to_fp = Builder.cast_impl, Builder.binary_op, Builder.create_fp_to_fp
    call = interpreter.GridExecutor.__call__

    def watched_load(self, ptrs, mask, *rest):
        _touch(self, ptrs, mask, writes=False)
        return load(self, ptrs, mask, *rest)

    def watched_store(self, ptrs, value, mask, *rest):
        _touch(self, ptrs, mask, writes=True)
        return store(self, ptrs, value, mask, *rest)

    def corrected_dot(self, a, b, d, *rest):
        _watch.operations += 2 * math.prod(a.data.shape[-2:]) * b.data.shape[-1]
        product = np.matmul(_number(a), _number(b), dtype=d.data.dtype)
        return Handle(product + d.data, d.dtype.scalar)

    def corrected_cast(self, x, to):
        source, target = x.dtype.scalar, to.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return cast(self, x, to)
        if target == tl.bfloat16:
            return Handle(_to_bf16(np.asarray(x.data, np.float32)), tl.bfloat16)
        return Handle(_number(x).astype(interpreter._get_np_dtype(target)), target)

    def corrected_to_fp(self, x, to, rounding):
        if tl.bfloat16 in (x.dtype.scalar, to.scalar):
            return corrected_cast(self, x, to)
        return to_fp(self, x, to, rounding)

    def checked_binary(self, a, b, op):
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            raise TypeError("arithmetic on bfloat16: convert to float32 first")
        return binary(self, a, b, op)

    def watched_call(self, *args, **kwargs):
        args = [_as_passed(x) for x in args]
        names = dict(zip(self.arg_names, args)) | kwargs
        kernel = self.fn.__name__
        _watch.args = [Argument(f"{kernel}.{n}", x) for n, x in names.items() if isinstance(x, torch.Tensor)]
        _watch.args += [Argument(f"{kernel}.{n}", x) for n, x in _watch.reachable.items()]
        _watch.launches.append((kernel, self.grid))
        with np.errstate(all="ignore"):
            call(self, *args, **kwargs)
        for arg in _watch.args:
            _watch.distinct[arg.name] += arg.distinct()

    return [
        (Builder, "create_masked_load", watched_load),
        (Builder, "create_masked_store", watched_store),
        (Builder, "create_dot", corrected_dot),
        (Builder, "cast_impl", corrected_cast),
        (Builder, "create_fp_ext", corrected_cast),
        (Builder, "create_fp_trunc", corrected_cast),
        (Builder, "create_fp_to_fp", corrected_to_fp),
        (Builder, "binary_op", checked_binary),
        (interpreter.GridExecutor, "__call__", watched_call),
    ]


def _touch(builder, ptrs, mask, writes: bool) -> None:
    size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
    mask = np.broadcast_to(mask.data, np.broadcast_shapes(ptrs.data.shape, mask.data.shape))
    addresses = np.broadcast_to(ptrs.data, mask.shape)[mask]
    (x, y, z), (_, columns, depths) = builder.grid_idx, builder.grid_dim
    program = (x * columns + y) * depths + z
    for arg in _watch.args:
        inside = (addresses >= arg.first) & (addresses + np.uint64(size) <= arg.end)
        if inside.any():
            _watch.requested[arg.name] += int(inside.sum()) * size
            arg.touch(addresses[inside], program, writes)
            addresses = addresses[~inside]
    if addresses.size:
        kernel = _watch.launches[-1][0]
        raise IndexError(f"{kernel}: {addresses.size} lanes {'store' if writes else 'load'} outside every argument")


def _as_passed(x):
    """A number as a GPU kernel receives it: Triton passes float32, while the interpreter passes Python's float."""
    return float(np.float32(x)) if isinstance(x, float) else x


def _number(x) -> np.ndarray:
    """The values of a handle, bfloat16 as float32."""
    return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data


def _to_bf16(x: np.ndarray) -> np.ndarray:
    """Rounds to nearest even, as the hardware does."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)
