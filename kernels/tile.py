"""What all Triton kernels share: which card they run on, how a table of configurations is read, how dots are computed.

A configuration is what decides how fast a kernel is and never what it computes: the shape of a tile, warps, stages.
Each kernel's file holds one table, by architecture; nothing is tuned at run time, and importing needs no driver.
"""

import contextlib
import functools
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # where a running maximum starts: finite, so that −inf − LOWEST is −inf and not NaN

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")  # those that the tables have a row for

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

Row = TypeVar("Row")


class Card(NamedTuple):
    arch: str  # the row of the tables that fits it
    multiprocessors: int


class Launch(NamedTuple):
    """How many warps run a program of a kernel without a matrix product, and the bytes of a row it takes at a time."""

    warps: int
    bytes: int


# Multiprocessors of the card each row was written for: A100, H100 and H200, B200, RTX 5090, MI300X.
CARDS = {arch: Card(arch, count) for arch, count in zip(ARCHITECTURES, (108, 132, 148, 170, 304), strict=True)}
_pretended: Card | None = None


def card(x: torch.Tensor) -> Card:
    """The card that holds x. In Triton's interpreter, where x is on the CPU, an H100."""
    if _pretended is not None:
        return _pretended
    return _card(x.device.index or 0) if x.is_cuda else CARDS["sm_90"]


@contextlib.contextmanager
def pretend(arch: str, multiprocessors: int | None = None) -> Iterator[Card]:
    """Chooses configurations as on another card: for tests and for benchmarks/static.py, which compile without one."""
    global _pretended
    before = _pretended
    _pretended = Card(arch, multiprocessors or CARDS[arch].multiprocessors)
    try:
        yield _pretended
    finally:
        _pretended = before


@functools.cache
def _card(index: int) -> Card:
    facts = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        if not facts.gcnArchName.startswith(("gfx94", "gfx95")):
            raise RuntimeError(
                f"fastssl: the Triton kernels are made for gfx942 (MI300), this card is {facts.gcnArchName}; plain "
                "torch runs there: `with fastssl.ops.dispatch.reference(): …`"
            )
        return Card("gfx942", facts.multi_processor_count)
    capability = (facts.major, facts.minor)
    if capability < (8, 0):
        raise RuntimeError(
            f"fastssl: the Triton kernels need compute capability 8.0 or later, {facts.name} has {facts.major}."
            f"{facts.minor}; plain torch runs there: `with fastssl.ops.dispatch.reference(): …`"
        )
    # 8.6 and 8.9 have the shared memory of 12.0 (99 kB a block, 8.0 has 163) and its tensor-core instructions.
    names = {(8, 0): "sm_80", (8, 7): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    return Card(names.get(capability, "sm_120"), facts.multi_processor_count)


def choose(table: Mapping[int, Row], size: int) -> Row | None:
    """The first row whose key is at least `size`; None beyond the last."""
    return next((table[limit] for limit in sorted(table) if limit >= size), None)


def power_of_2(n: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(n))


def splits(programs: int, tiles: int, wanted: int) -> tuple[int, int]:
    """(parts, tiles a part): cuts a loop of `tiles` so that `programs` × parts come close to `wanted` programs."""
    parts = max(1, min(tiles, wanted // max(1, programs)))
    each = triton.cdiv(tiles, parts)
    return max(1, triton.cdiv(tiles, max(1, each))), each


def rows(x: torch.Tensor) -> torch.Tensor:
    """x with the last dimension contiguous: itself, unless its rows are spread out in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def two_floats(x: float) -> tuple[float, float]:
    """x as a float32 and what is left of it: Triton passes numbers as float32, and float64 needs the bits of both."""
    (first,) = struct.unpack("f", struct.pack("f", x))
    return first, x - first


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel sums: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def operand(dtype: torch.dtype, *tensors: torch.Tensor) -> torch.dtype:
    """The dtype in which tensors are multiplied for sums of `dtype`: their own if they agree and it is no wider."""
    own = {x.dtype for x in tensors}
    return own.pop() if len(own) == 1 and wide(next(iter(own))) == dtype else dtype


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32: as exactly as float32 does, unless torch is allowed to use tf32.

    NVIDIA's tensor cores have no float32; three products of tf32 parts (the small ones first) keep 22 bits and run
    several times as fast as the float32 units. AMD's matrix cores have float32.
    """
    if dtype != torch.float32 or torch.version.hip or (_pretended is not None and _pretended.arch[:3] == "gfx"):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def move_tile(tokens: int, D: int, size: int, held: int) -> tuple[int, int]:
    """(rows, columns) of a tile of `held` bytes, or less where there is no more."""
    half_kilobyte = max(1, 512 // size)
    columns = min(half_kilobyte, D & -D)  # a power of 2 that divides D leaves no lane idle
    if columns * size < 128:
        columns = min(half_kilobyte, power_of_2(D))
    return min(max(1, held // (columns * size)), power_of_2(tokens, 1)), columns


def search_block(M: int) -> int:
    """How many ids are compared at a time."""
    return min(64, power_of_2(M))


@triton.jit
def places(ids_ptr, ids_m, M, wanted, BLOCK_M: tl.constexpr):
    """Where each wanted id stands among the M of a row, −1 where it does not."""
    place = tl.full(wanted.shape, -1, tl.int32)
    for start in range(0, M, BLOCK_M):
        at = start + tl.arange(0, BLOCK_M)
        ids = tl.load(ids_ptr + at.to(tl.int64) * ids_m, mask=at < M, other=-1)
        found = tl.where(ids[None, :] == wanted[:, None], at[None, :], -1)
        place = tl.maximum(place, tl.max(found, 1))
    return place
