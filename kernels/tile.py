"""Shared by the Triton kernels: the card they run on, tables of configurations, the precision of matrix products.

A configuration (the shape of a tile, warps, pipeline stages) decides how fast a kernel is, never what it computes.
Each kernel file holds its tables, with a row for each architecture. Nothing is tuned at run time, and importing these
files needs no driver.
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
LOWEST = tl.constexpr(-1e30)  # start of a running maximum: finite, so that −inf − LOWEST is −inf and not NaN

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")  # the rows of the tables

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

Row = TypeVar("Row")


class Card(NamedTuple):
    """A GPU, as far as the choice of a configuration depends on it."""

    arch: str  # row of the tables
    multiprocessors: int


class Launch(NamedTuple):
    """Configuration of a kernel without a matrix product."""

    warps: int  # of a program
    bytes: int  # of a tile


# Multiprocessors of the card that each row was written for: A100, H100 and H200, B200, RTX 5090, MI300X.
CARDS = {arch: Card(arch, count) for arch, count in zip(ARCHITECTURES, (108, 132, 148, 170, 304), strict=True)}
_assumed: Card | None = None


def card(x: torch.Tensor) -> Card:
    """The card that holds x. In Triton's interpreter, where x is on the CPU, an H100."""
    if _assumed is not None:
        return _assumed
    return _card(x.device.index or 0) if x.is_cuda else CARDS["sm_90"]


@contextlib.contextmanager
def assume_card(arch: str, multiprocessors: int | None = None) -> Iterator[Card]:
    """Chooses configurations as on another card, for tests and for benchmarks/static.py, which compiles without one."""
    global _assumed
    previous = _assumed
    _assumed = Card(arch, multiprocessors or CARDS[arch].multiprocessors)
    try:
        yield _assumed
    finally:
        _assumed = previous


@functools.cache
def _card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        if not properties.gcnArchName.startswith(("gfx94", "gfx95")):
            raise RuntimeError(
                f"fastssl: the Triton kernels need gfx942 (MI300) or gfx950, got {properties.gcnArchName}; run the ops "
                "in plain torch: `with fastssl.ops.dispatch.reference(): …`"
            )
        return Card("gfx942", properties.multi_processor_count)
    capability = (properties.major, properties.minor)
    if capability < (8, 0):
        raise RuntimeError(
            f"fastssl: the Triton kernels need compute capability 8.0 or later, got {properties.major}."
            f"{properties.minor} ({properties.name}); run the ops in plain torch: "
            "`with fastssl.ops.dispatch.reference(): …`"
        )
    # 8.6 and 8.9 have the shared memory of 12.0 (99 kB a block, 8.0 has 163) and its tensor-core instructions.
    names = {(8, 0): "sm_80", (8, 7): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    return Card(names.get(capability, "sm_120"), properties.multi_processor_count)


def choose(table: Mapping[int, Row], size: int) -> Row | None:
    """The first row whose key is at least `size`; None beyond the last."""
    return next((table[limit] for limit in sorted(table) if limit >= size), None)


def power_of_2(n: int, minimum: int = 16) -> int:
    """The smallest power of 2 that is at least n and at least `minimum`."""
    return max(minimum, triton.next_power_of_2(n))


def split_loop(programs: int, tiles: int, target: int) -> tuple[int, int]:
    """(parts, tiles of a part): cuts a loop over `tiles` so that `programs` × parts is close to `target` programs."""
    parts = max(1, min(tiles, target // max(1, programs)))
    tiles_per_part = triton.cdiv(tiles, parts)
    return max(1, triton.cdiv(tiles, max(1, tiles_per_part))), tiles_per_part


def contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension contiguous: x itself, or a copy where its rows have gaps."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def two_floats(x: float) -> tuple[float, float]:
    """x rounded to float32, and the rounding error: Triton passes numbers as float32, and a kernel adds the two."""
    (rounded,) = struct.unpack("f", struct.pack("f", x))
    return rounded, x - rounded


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel computes and sums: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def cast_via(dtype: torch.dtype) -> tl.dtype:
    """The dtype through which torch converts to `dtype`: float32 for 16-bit dtypes, also from float64."""
    return TRITON_DTYPES[dtype if dtype.itemsize > 2 else torch.float32]


def operand_dtype(dtype: torch.dtype, *tensors: torch.Tensor) -> torch.dtype:
    """The dtype in which tensors are multiplied for sums of `dtype`: their own if all share one that is
    summed in `dtype`, else `dtype`."""
    dtypes = {x.dtype for x in tensors}
    return dtypes.pop() if len(dtypes) == 1 and acc_dtype(next(iter(dtypes))) == dtype else dtype


def dot_precision(dtype: torch.dtype) -> str:
    """The `input_precision` of `tl.dot` for operands of `dtype`: float32 precision unless torch is allowed to use tf32.

    NVIDIA's tensor cores have no float32; three products of tf32 parts (the small ones first) keep 22 bits and run
    several times as fast as the float32 units. AMD's matrix cores have float32.
    """
    if dtype != torch.float32 or torch.version.hip or (_assumed is not None and _assumed.arch[:3] == "gfx"):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def move_tile(tokens: int, D: int, size: int, tile_bytes: int) -> tuple[int, int]:
    """(rows, columns) of a tile of [tokens, D] with `size` bytes an element: `tile_bytes`, or fewer if all rows fit."""
    half_kilobyte = max(1, 512 // size)
    columns = min(half_kilobyte, D & -D)  # a power of 2 that divides D leaves no lane idle
    if columns * size < 128:
        columns = min(half_kilobyte, power_of_2(D))
    return min(max(1, tile_bytes // (columns * size)), power_of_2(tokens, 1)), columns


def search_block(M: int) -> int:
    """Number of ids that `positions_in_row` compares at a time."""
    return min(64, power_of_2(M))


@triton.jit
def positions_in_row(
    ids_ptr,  # [M] int64, one row of ids
    stride_ids_m,
    M,
    numbers,  # [N] int32
    BLOCK_M: tl.constexpr,
):
    """Position of each number among the M ids of a row, −1 for a number that is not among them."""
    position = tl.full(numbers.shape, -1, tl.int32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        ids = tl.load(ids_ptr + m.to(tl.int64) * stride_ids_m, mask=m < M, other=-1)
        matches = tl.where(ids[None, :] == numbers[:, None], m[None, :], -1)
        position = tl.maximum(position, tl.max(matches, 1))
    return position


@triton.jit
def load_tile(x_ptr, row, in_row, column, stride, D):
    """[rows, columns] of a matrix, zeros outside."""
    offset = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(x_ptr + offset, mask=in_row[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def dot_in_chunks(
    a_ptr,  # [·, D]
    a_row,
    in_a,
    stride_a,
    b_ptr,  # [·, D]
    b_row,
    in_b,
    stride_b,
    D,
    OPERAND: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """a · bᵀ of rows that are too wide for the registers: CHUNK columns at a time."""
    dots = tl.zeros([a_row.shape[0], b_row.shape[0]], ACC_DTYPE)
    for start in range(0, D, CHUNK):
        column = start + tl.arange(0, CHUNK)
        a = load_tile(a_ptr, a_row, in_a, column, stride_a, D).to(OPERAND)
        b = load_tile(b_ptr, b_row, in_b, column, stride_b, D).to(OPERAND)
        dots = tl.dot(a, tl.trans(b), dots, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    return dots
