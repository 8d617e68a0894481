"""Triton's interpreter, repaired for bfloat16 and made to watch: bounds, races, bytes and operations.

Triton 3.8 keeps bfloat16 as uint16 in its interpreter and computes on those integers: dots multiply bit patterns, sums
add them, and rounding cuts off. Here dots and casts are right, and other arithmetic on bfloat16 raises (a kernel should
widen first). Programs run one after the other there, so a race computes the right thing; here each launch remembers who
read and wrote what, and raises where two programs meet.

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
NOBODY, SEVERAL = -1, -2


class Watch:
    """What the launches inside `watch()` did."""

    def __init__(self):
        self.requested = defaultdict(int)  # {"kernel.argument": bytes loaded and stored}
        self.distinct = defaultdict(int)  # the same, each byte once a launch: as if the caches held it all
        self.operations = 0  # of dots: 2·M·N·K each
        self.launches = []  # (kernel, grid)
        self.args = []  # of the launch that runs

    @property
    def bytes(self) -> int:
        return sum(self.requested.values())


class Argument:
    """The memory that a tensor argument of a launch may touch, with a record for each of its cells."""

    def __init__(self, name: str, x: torch.Tensor):
        self.name, self.size = name, x.element_size()
        self.first = x.data_ptr()
        cells = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride())) if x.numel() else 0
        self.end = self.first + cells * self.size
        self.reader = np.full(cells, NOBODY) if cells < 2**26 else None  # huge views are only checked for bounds
        self.writer = np.full(cells, NOBODY) if cells < 2**26 else None

    def touch(self, addresses: np.ndarray, program: int, writes: bool) -> None:
        if self.reader is None:
            return
        cells = ((addresses - np.uint64(self.first)) // np.uint64(self.size)).astype(np.int64)
        writer, reader = self.writer[cells], self.reader[cells]
        if ((writer != NOBODY) & (writer != program)).any():
            raise IndexError(f"race: {self.name} is {'written' if writes else 'read'} where another program writes")
        if writes:
            if ((reader != NOBODY) & (reader != program)).any():
                raise IndexError(f"race: {self.name} is written where another program reads")
            if len(np.unique(cells)) != len(cells):
                raise IndexError(f"race: one store writes a cell of {self.name} twice")
            self.writer[cells] = program
        else:
            self.reader[cells] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)

    def distinct(self) -> int:
        return 0 if self.reader is None else int(((self.reader != NOBODY) | (self.writer != NOBODY)).sum()) * self.size


_watch: Watch | None = None


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
    """Repairs the interpreter and watches its launches."""
    global _watch
    _watch = Watch()
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in _replacements():
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield _watch
    _watch = None


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[Watch]:
    """Serves CPU tensors by the Triton kernels, interpreted, so that the public ops can be tried with them."""
    with torch.library._scoped_library("fastssl", "IMPL") as library, watch() as seen:
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

    def right_dot(self, a, b, d, *rest):
        _watch.operations += 2 * math.prod(a.data.shape[-2:]) * b.data.shape[-1]
        product = np.matmul(_number(a), _number(b), dtype=d.data.dtype)
        return Handle(product + d.data, d.dtype.scalar)

    def right_cast(self, x, to):
        source, target = x.dtype.scalar, to.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return cast(self, x, to)
        if target == tl.bfloat16:
            return Handle(_to_bf16(np.asarray(x.data, np.float32)), tl.bfloat16)
        return Handle(_number(x).astype(interpreter._get_np_dtype(target)), target)

    def right_to_fp(self, x, to, rounding):
        return right_cast(self, x, to) if tl.bfloat16 in (x.dtype.scalar, to.scalar) else to_fp(self, x, to, rounding)

    def guarded_binary(self, a, b, op):
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            raise TypeError("arithmetic on bfloat16: widen to float32 first")
        return binary(self, a, b, op)

    def watched_call(self, *args, **kwargs):
        args = [_as_passed(x) for x in args]
        names = dict(zip(self.arg_names, args)) | kwargs
        kernel = self.fn.__name__
        _watch.args = [Argument(f"{kernel}.{n}", x) for n, x in names.items() if isinstance(x, torch.Tensor)]
        _watch.launches.append((kernel, self.grid))
        with np.errstate(all="ignore"):
            call(self, *args, **kwargs)
        for arg in _watch.args:
            _watch.distinct[arg.name] += arg.distinct()

    return [
        (Builder, "create_masked_load", watched_load),
        (Builder, "create_masked_store", watched_store),
        (Builder, "create_dot", right_dot),
        (Builder, "cast_impl", right_cast),
        (Builder, "create_fp_ext", right_cast),
        (Builder, "create_fp_trunc", right_cast),
        (Builder, "create_fp_to_fp", right_to_fp),
        (Builder, "binary_op", guarded_binary),
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
    """A number as a GPU kernel gets it: Triton passes float32, its interpreter what it is given."""
    return float(np.float32(x)) if isinstance(x, float) else x


def _number(x) -> np.ndarray:
    return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data


def _to_bf16(x: np.ndarray) -> np.ndarray:
    """Rounds to nearest even, as the hardware does."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)
