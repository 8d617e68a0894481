"""GELU of a linear layer's output with the layer's bias added on the way, and the gradient of both in one pass.

Forward. A program holds a tile of rows and columns.

    bytes        M·K·(s_x + s_y), the bias once
    operations   an error function for each value: nothing beside the bytes

Backward. A program holds a block of columns and takes every `programs`-th block of rows. It sums the gradient that it
writes over its rows in registers and writes the sum once; torch adds these partial sums up. So the gradient of the bias
costs no further pass over [M, K], as a sum after the product does, and the same card always gives the same bits.

    bytes        M·K·(s_y + 2·s_x), and a partial sum [K] a program
    operations   an error function and an exponential for each value

Tile sizes: 1,024 values on 2 warps, 16 a thread, of which the backward pass holds three tensors; columns of at least
512 bytes, whole sectors of memory. As many programs as in the layer norm's backward pass fill the card. Not measured.
"""

import triton
import triton.language as tl
from torch import Tensor

from .tile import ARCHITECTURES, TRITON_DTYPES, Launch, acc_dtype, card, cast_via, power_of_2

GELU = dict.fromkeys(ARCHITECTURES, Launch(2, 4096))  # {architecture: warps of a program, bytes of sums in its tile}
PROGRAMS = 16  # programs of the backward pass per multiprocessor

SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_TWO_PI = tl.constexpr(2.5066282746310002)


@triton.jit
def bias_gelu_fwd_kernel(
    x_ptr,  # [M, K]
    bias_ptr,  # [K]
    y_ptr,  # [M, K], written
    M,
    K,
    ACC_DTYPE: tl.constexpr,
    CAST_VIA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of rows and columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < M)[:, None] & (column < K)[None, :]
    offsets = row.to(tl.int64)[:, None] * K + column[None, :]
    bias = tl.load(bias_ptr + column, mask=column < K, other=0.0).to(ACC_DTYPE)
    z = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC_DTYPE) + bias[None, :]
    y = 0.5 * z * (1.0 + tl.erf(z * SQRT_HALF))
    tl.store(y_ptr + offsets, y.to(CAST_VIA).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_gelu_bwd_kernel(
    dy_ptr,  # [M, K]
    x_ptr,  # [M, K]
    bias_ptr,  # [K]
    dx_ptr,  # [M, K], written
    dbias_ptr,  # [programs, K], written: partial sums
    M,
    K,
    programs,
    ACC_DTYPE: tl.constexpr,
    CAST_VIA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Every `programs`-th block of ROWS rows of a block of columns."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(bias_ptr + column, mask=column < K, other=0.0).to(ACC_DTYPE)
    dbias = tl.zeros([COLUMNS], ACC_DTYPE)
    for start in range(tl.program_id(0) * ROWS, M, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < M)[:, None] & (column < K)[None, :]
        offsets = row.to(tl.int64)[:, None] * K + column[None, :]
        z = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC_DTYPE) + bias[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(ACC_DTYPE)
        slope = 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * tl.exp(-0.5 * z * z) / SQRT_TWO_PI
        dx = dy * slope
        dbias += tl.sum(dx, 0)
        tl.store(dx_ptr + offsets, dx.to(CAST_VIA).to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dbias_ptr + tl.program_id(0) * K + column, dbias, mask=column < K)


def gelu_tile(K: int, size: int, launch: Launch) -> tuple[int, int]:
    """(rows, columns) of a program's tile, for elements of `size` bytes."""
    columns = min(power_of_2(K), max(16, 512 // size))
    return max(1, launch.bytes // (max(4, size) * columns)), columns


def gelu_programs(M: int, K: int, tile: tuple[int, int], multiprocessors: int) -> int:
    """Programs of the backward pass for each block of columns."""
    rows, columns = tile
    return max(1, min(triton.cdiv(M, rows), PROGRAMS * multiprocessors // triton.cdiv(K, columns)))


def bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    x, bias, (M, K) = x.contiguous(), bias.contiguous(), x.shape
    y = x.new_empty(M, K)
    if x.numel():
        launch = GELU[card(x).arch]
        rows, columns = gelu_tile(K, x.element_size(), launch)
        bias_gelu_fwd_kernel[(triton.cdiv(M, rows), triton.cdiv(K, columns))](
            x,
            bias,
            y,
            M,
            K,
            ACC_DTYPE=TRITON_DTYPES[acc_dtype(x.dtype)],
            CAST_VIA=cast_via(x.dtype),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=launch.warps,
        )
    return y


def bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dy, x, bias, (M, K) = dy.contiguous(), x.contiguous(), bias.contiguous(), x.shape
    dx, sum_dtype = x.new_empty(M, K), acc_dtype(x.dtype)
    if not x.numel():
        return dx, x.new_zeros(K, dtype=sum_dtype)
    gpu = card(x)
    tile = gelu_tile(K, x.element_size(), GELU[gpu.arch])
    programs = gelu_programs(M, K, tile, gpu.multiprocessors)
    partial_sums = x.new_empty(programs, K, dtype=sum_dtype)
    bias_gelu_bwd_kernel[(programs, triton.cdiv(K, tile[1]))](
        dy,
        x,
        bias,
        dx,
        partial_sums,
        M,
        K,
        programs,
        ACC_DTYPE=TRITON_DTYPES[sum_dtype],
        CAST_VIA=cast_via(x.dtype),
        ROWS=tile[0],
        COLUMNS=tile[1],
        num_warps=GELU[gpu.arch].warps,
    )
    return dx, partial_sums.sum(0)
