"""Attention with an additive bias, and the gradient of the bias, a sum over the samples where they share it.

Result and gradients of q, k and v come from the kernels of attention, which add a bias [L, M] to each tile of scores;
it is read again for each sample, from the L2 cache where it is shared: 4·B·H·L·M bytes in float32, half in bfloat16.

The gradient of the bias has a kernel of its own, whose result does not depend on the order in which programs run. A
program owns a tile [BLOCK, BLOCK] of one head and passes over the samples: for each it computes the scores and the
gradient of the weights again, and adds to a sum in registers.

    bytes        (L/BLOCK)·(5 B·H·L·E·s + 4 B·H·L), with q, k, v, out and dout of a sample read once for each row or
                 column of tiles, mostly from the L2 cache; the bias and its gradient once. No [B, H, L, M] is written.
    operations   4·B·H·L·M·E, beside 10 or 14 of the other gradients
"""

import triton
import triton.language as tl
from torch import Tensor

from .attention import (
    _head_ptr,
    _load_rows,
    _row_dot,
    _softmax_and_gradient,
    _with_32_bit_rows,
    bias_arguments,
    launch_attention_bwd,
    launch_attention_fwd,
)
from .attention_plan import bias_gradient_plan
from .tile import TRITON_DTYPES, dot_precision, two_floats


@triton.jit
def attention_dbias_kernel(
    dout_ptr,  # [B, L, H, E]
    q_ptr,  # [B, L, H, E]
    k_ptr,  # [B, M, H, E]
    v_ptr,  # [B, M, H, E]
    bias_ptr,  # [B, H, L, M]
    out_ptr,  # [B, L, H, E] contiguous
    lse_ptr,  # [B, H, L]
    dbias_ptr,  # [parts, H, L, M], written: sums over the samples of each part
    B,
    L,
    M,
    H,
    E,
    scale,
    scale_rest,  # rounding error of `scale` as float32
    samples,  # of a part
    row_tiles,
    column_tiles,
    stride_db,
    stride_dl,
    stride_dh,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_bb,
    stride_bh,
    stride_bl,
    stride_bm,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One tile of one head, through the samples of a part."""
    scale = tl.cast(scale, ACC_DTYPE) + tl.cast(scale_rest, ACC_DTYPE)
    head = tl.program_id(0) // (row_tiles * column_tiles)  # numbered through the parts
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    row_start, column_start = tile // column_tiles * BLOCK, tile % column_tiles * BLOCK
    first = head // H * samples
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], ACC_DTYPE)
    for sample in range(first, tl.minimum(first + samples, B)):
        place = sample * H + head % H  # of the head, numbered through the batch
        q = _load_rows(_head_ptr(q_ptr, place, H, stride_qb, stride_qh), row_start, L, stride_ql, E, BLOCK, BLOCK_E)
        k = _load_rows(_head_ptr(k_ptr, place, H, stride_kb, stride_kh), column_start, M, stride_kl, E, BLOCK, BLOCK_E)
        v = _load_rows(_head_ptr(v_ptr, place, H, stride_vb, stride_vh), column_start, M, stride_vl, E, BLOCK, BLOCK_E)
        dout_head = _head_ptr(dout_ptr, place, H, stride_db, stride_dh)
        dout = _load_rows(dout_head, row_start, L, stride_dl, E, BLOCK, BLOCK_E)
        out_head = _head_ptr(out_ptr, place, H, H * E * L, E)
        row_dot = _row_dot(out_head, dout, row_start, L, H * E, E, ACC_DTYPE, BLOCK, BLOCK_E)
        lse = tl.load(lse_ptr + tl.cast(place, tl.int64) * L + row_start + row, mask=row < L - row_start, other=0.0)
        bias_head = _head_ptr(bias_ptr, place, H, stride_bb, stride_bh)
        _, dscores = _softmax_and_gradient(
            q, k, v, dout, lse, row_dot, bias_head, row_start, column_start, L, M, scale, stride_bl, stride_bm, True,
            BLOCK, BLOCK, PRECISION, ACC_DTYPE,
        )  # fmt: skip
        total += dscores
    in_tile = (row < L - row_start)[:, None] & (column < M - column_start)[None, :]
    dbias_ptr += (tl.cast(head, tl.int64) * L + row_start) * M + column_start
    tl.store(dbias_ptr + row[:, None] * M + column[None, :], total.to(dbias_ptr.dtype.element_ty), mask=in_tile)


def attention_bias_fwd(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return launch_attention_fwd(q, k, v, bias, scale)


def attention_packed_bias_fwd(qkv: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return launch_attention_fwd(*qkv.unbind(2), bias, scale)


def attention_bias_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    with_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if lse.numel():
        launch_attention_bwd(dout, (q, k, v), bias, out, lse, scale, (dq, dk, dv))
    else:
        dk.zero_(), dv.zero_()
    return dq, dk, dv, _dbias(dout, (q, k, v), bias, out, lse, scale, with_dbias)


def attention_packed_bias_bwd(
    dout: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, lse: Tensor, scale: float, with_dbias: bool
) -> tuple[Tensor, Tensor]:
    dqkv, inputs = qkv.new_empty(qkv.shape), qkv.unbind(2)
    if lse.numel():
        launch_attention_bwd(dout, inputs, bias, out, lse, scale, dqkv.unbind(2))
    return dqkv, _dbias(dout, inputs, bias, out, lse, scale, with_dbias)


def _dbias(
    dout: Tensor, inputs: tuple[Tensor, ...], bias: Tensor, out: Tensor, lse: Tensor, scale: float, wanted: bool
) -> Tensor:
    """The gradient of the bias, in its dtype; empty unless wanted."""
    if not wanted:
        return bias.new_empty(0)
    if not lse.numel():
        return bias.new_zeros(bias.shape)
    dout, q, k, v = _with_32_bit_rows(dout), *map(_with_32_bit_rows, inputs)
    (B, L, H, E), M = q.shape, k.shape[1]
    plan = bias_gradient_plan(B, L, M, H, E, q.element_size(), bias.dim() == 3)
    parts, rows, columns = (triton.cdiv(n, size) for n, size in ((B, plan.samples), (L, plan.block), (M, plan.block)))
    sums_parts = bias.dim() == 3 and parts > 1
    dbias = q.new_empty(parts, H, L, M, dtype=lse.dtype if sums_parts else bias.dtype)
    bias_argument, bias_strides, _ = bias_arguments(bias, q)
    attention_dbias_kernel[(parts * H * rows * columns,)](
        dout,
        q,
        k,
        v,
        bias_argument,
        out,
        lse,
        dbias,
        B,
        L,
        M,
        H,
        E,
        *two_floats(scale),
        plan.samples,
        rows,
        columns,
        *dout.stride()[:3],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *bias_strides,
        ACC_DTYPE=TRITON_DTYPES[lse.dtype],
        PRECISION=dot_precision(q.dtype),
        BLOCK=plan.block,
        BLOCK_E=plan.block_e,
        num_warps=plan.warps,
        num_stages=1,
    )
    if sums_parts:
        return dbias.sum(0).to(bias.dtype)
    return dbias.view(bias.shape)
