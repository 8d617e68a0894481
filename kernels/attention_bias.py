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
    LOG2E,
    _head_ptr,
    _load_bias,
    _load_rows,
    _row_dot,
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
    CHUNK: tl.constexpr,
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
        q_head, k_head, v_head, dout_head, out_head = (
            _head_ptr(q_ptr, place, H, stride_qb, stride_qh),
            _head_ptr(k_ptr, place, H, stride_kb, stride_kh),
            _head_ptr(v_ptr, place, H, stride_vb, stride_vh),
            _head_ptr(dout_ptr, place, H, stride_db, stride_dh),
            _head_ptr(out_ptr, place, H, H * E * L, E),
        )
        scores = tl.zeros([BLOCK, BLOCK], ACC_DTYPE)
        dweights = tl.zeros([BLOCK, BLOCK], ACC_DTYPE)
        row_dot = tl.zeros([BLOCK], ACC_DTYPE)
        for part in range(0, BLOCK_E, CHUNK):  # a stretch of the width at a time, for the sake of the registers
            rest = E - part
            q = _load_rows(q_head + part, row_start, L, stride_ql, rest, BLOCK, CHUNK)
            k = _load_rows(k_head + part, column_start, M, stride_kl, rest, BLOCK, CHUNK)
            scores += tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC_DTYPE)
            v = _load_rows(v_head + part, column_start, M, stride_vl, rest, BLOCK, CHUNK)
            dout = _load_rows(dout_head + part, row_start, L, stride_dl, rest, BLOCK, CHUNK)
            dweights += tl.dot(dout, tl.trans(v), input_precision=PRECISION, out_dtype=ACC_DTYPE)
            row_dot += _row_dot(out_head + part, dout, row_start, L, H * E, rest, ACC_DTYPE, BLOCK, CHUNK)
        bias_head = _head_ptr(bias_ptr, place, H, stride_bb, stride_bh)
        scores = scores * scale + _load_bias(
            bias_head, row_start, column_start, L, M, stride_bl, stride_bm, ACC_DTYPE, BLOCK, BLOCK
        )
        lse = tl.load(lse_ptr + tl.cast(place, tl.int64) * L + row_start + row, mask=row < L - row_start, other=0.0)
        weights = tl.exp2((scores - lse[:, None]) * LOG2E)
        # A key beyond the end has score 0, which may be far above a row's sum; a query beyond the end has dout 0.
        weights = tl.where((column < M - column_start)[None, :], weights, 0.0)
        total += weights * (dweights - row_dot[:, None])
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
        CHUNK=plan.block_e if q.element_size() == 2 else min(plan.block_e, 32),
        num_warps=plan.warps,
        num_stages=1,
    )
    if sums_parts:
        return dbias.sum(0).to(bias.dtype)
    return dbias.view(bias.shape)
