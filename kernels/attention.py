"""Attention on short sequences: those of vision transformers (50, 65, 197, 257 tokens; heads 32 to 128 wide).

A head's keys and values are a few tens of kilobytes. A head needs about L/2 operations per byte (25 at L = 50, 98 at
197), and a GPU can do about 300 in the time that it reads a byte: memory is the limit, so every byte should be read
once. q, k and v are read through their strides from a packed [B, L, 3, H, E] and the result is written as [B, L, H, E]:
no transposed copies.

Forward. A program holds BLOCK_L queries of a head, usually all of them, and passes over the keys and values in tiles of
BLOCK_M with a running maximum.

    bytes        4·B·H·L·E·s, and 4·B·H·L for the logarithm of each row's sum; keys and values are read again from
                 the L2 cache where a head has several blocks of queries
    operations   4·B·H·L²·E, L rounded up to tiles

Backward, one launch without atomics. The softmax is recomputed from its stored logarithm. Where the gradient of all
queries of a head fits the registers (table BWD_PER_HEAD), a program owns a head: all its queries stay in registers, the
keys pass in tiles, a tile's dk and dv are complete at once, and dq grows in registers: 5 products. Otherwise
(table BWD_PER_BLOCK: float32, long or wide heads) a program owns a tile of keys and a tile of queries: it passes over
the queries for dk and dv, and then over the keys for dq, with two more products, since it computes the scores twice.

    bytes        by head 8·B·H·L·E·s; by block also q, dout and out again for each tile of keys, and k and v again for
                 each tile of queries, from the L2 cache
    operations   10·B·H·L²·E by head, 14 by block
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_plan import backward_plan, forward_plan
from .tile import LN2, LOG2E, TRITON_DTYPES, acc_dtype, card, contiguous_rows, dot_precision, two_floats

# Starts of a running maximum, the lowest numbers of a dtype: a mask may consist of them. Finite, so that −∞ less one of
# them is −∞ and not NaN.
LOWEST_32, LOWEST_64 = tl.constexpr(torch.finfo(torch.float32).min), tl.constexpr(torch.finfo(torch.float64).min)


@triton.jit
def _load_rows(x_ptr, start, length, stride, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """[BLOCK, BLOCK_E] of one head from row `start`, zeros outside the tensor.

    A tile has one 64-bit offset. The offsets within a tile have 32 bits and are shared by all tiles of a tensor, which
    keeps several tiles of pointers out of the registers. `_with_32_bit_rows` makes sure that these offsets fit.
    """
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    offset = row[:, None] * stride + column[None, :]
    return tl.load(
        x_ptr + tl.cast(start, tl.int64) * stride + offset,
        mask=(row < length - start)[:, None] & (column < E)[None, :],
        other=0.0,
    )


@triton.jit
def _store_rows(x_ptr, start, length, stride, E, x, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Stores [BLOCK, BLOCK_E] of one head from row `start`."""
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    tl.store(
        x_ptr + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :],
        x.to(x_ptr.dtype.element_ty),
        mask=(row < length - start)[:, None] & (column < E)[None, :],
    )


@triton.jit
def _load_bias(
    bias_ptr,
    row_start,
    start,
    L,
    M,
    stride_l,
    stride_m,
    ACC_DTYPE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """[BLOCK_L, BLOCK_M] of one head's bias, zeros outside the tensor."""
    row, column = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_M)
    bias = tl.load(
        bias_ptr
        + tl.cast(row_start, tl.int64) * stride_l
        + tl.cast(start, tl.int64) * stride_m
        + (row[:, None] * stride_l + column[None, :] * stride_m),
        mask=(row < L - row_start)[:, None] & (column < M - start)[None, :],
        other=0.0,
    )
    return bias.to(ACC_DTYPE)


@triton.jit
def _head_ptr(x_ptr, head, H, stride_b, stride_h):
    """Pointer to the first value of a head; heads are numbered through the batch."""
    return x_ptr + (head // H).to(tl.int64) * stride_b + (head % H).to(tl.int64) * stride_h


@triton.jit
def attention_fwd_kernel(
    q_ptr,  # [B, L, H, E]
    k_ptr,  # [B, M, H, E]
    v_ptr,  # [B, M, H, E]
    bias_ptr,  # [B, H, L, M] if BIAS
    out_ptr,  # [B, L, H, E] contiguous, written
    lse_ptr,  # [B, H, L], written: log-sum-exp of the scaled scores
    L,
    M,
    H,
    E,
    scale,
    scale_rest,  # rounding error of `scale` as float32
    blocks,  # number of blocks of queries per head
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
    BIAS: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """BLOCK_L queries of one head."""
    scale = tl.cast(scale, ACC_DTYPE) + tl.cast(scale_rest, ACC_DTYPE)
    head = tl.program_id(0) // blocks
    block_start = tl.program_id(0) % blocks * BLOCK_L
    q_ptr = _head_ptr(q_ptr, head, H, stride_qb, stride_qh)
    k_ptr = _head_ptr(k_ptr, head, H, stride_kb, stride_kh)
    v_ptr = _head_ptr(v_ptr, head, H, stride_vb, stride_vh)
    bias_ptr = _head_ptr(bias_ptr, head, H, stride_bb, stride_bh)
    out_ptr = _head_ptr(out_ptr, head, H, H * E * L, E)

    q = _load_rows(q_ptr, block_start, L, stride_ql, E, BLOCK_L, BLOCK_E)
    lowest = LOWEST_64 if tl.float64 == ACC_DTYPE else LOWEST_32
    running_max = tl.full([BLOCK_L], lowest, ACC_DTYPE)
    total = tl.zeros([BLOCK_L], ACC_DTYPE)
    out = tl.zeros([BLOCK_L, BLOCK_E], ACC_DTYPE)
    for start in range(0, M, BLOCK_M):
        k = _load_rows(k_ptr, start, M, stride_kl, E, BLOCK_M, BLOCK_E)
        v = _load_rows(v_ptr, start, M, stride_vl, E, BLOCK_M, BLOCK_E)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC_DTYPE) * scale
        if BIAS:
            scores += _load_bias(bias_ptr, block_start, start, L, M, stride_bl, stride_bm, ACC_DTYPE, BLOCK_L, BLOCK_M)
        scores = tl.where((tl.arange(0, BLOCK_M) < M - start)[None, :], scores, float("-inf"))  # [BLOCK_L, BLOCK_M]
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        weights = tl.exp2((scores - new_max[:, None]) * LOG2E)  # rounding errors are small, because the difference is
        rescale = tl.exp2((running_max - new_max) * LOG2E)
        total = total * rescale + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * rescale[:, None], input_precision=PRECISION, out_dtype=ACC_DTYPE)
        running_max = new_max
    _store_rows(out_ptr, block_start, L, H * E, E, out / total[:, None], BLOCK_L, BLOCK_E)
    row = block_start + tl.arange(0, BLOCK_L)
    tl.store(lse_ptr + head.to(tl.int64) * L + row, running_max + tl.log2(total) * LN2, mask=row < L)


@triton.jit
def _softmax_and_gradient(
    q,
    k,
    v,
    dout,
    lse,
    row_dot,
    bias_ptr,
    row_start,
    start,
    L,
    M,
    scale,
    stride_bl,
    stride_bm,
    BIAS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):
    """(softmax weights, gradient of the scores without the factor `scale`) of a tile [queries, keys]."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC_DTYPE) * scale
    if BIAS:
        scores += _load_bias(bias_ptr, row_start, start, L, M, stride_bl, stride_bm, ACC_DTYPE, BLOCK_L, BLOCK_M)
    weights = tl.exp2((scores - lse[:, None]) * LOG2E)
    # A key beyond the end has score 0, which may be far above a row's sum; a query beyond the end has dout 0.
    weights = tl.where((tl.arange(0, BLOCK_M) < M - start)[None, :], weights, 0.0)
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION, out_dtype=ACC_DTYPE)
    return weights, weights * (dweights - row_dot[:, None])


@triton.jit
def _row_dot(out_ptr, dout, start, L, stride, E, ACC_DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Σ_e out·dout of each query, which the gradient of the softmax subtracts."""
    return tl.sum(_load_rows(out_ptr, start, L, stride, E, BLOCK, BLOCK_E).to(ACC_DTYPE) * dout.to(ACC_DTYPE), 1)


@triton.jit
def attention_bwd_per_head_kernel(
    dout_ptr,  # [B, L, H, E]
    q_ptr,  # [B, L, H, E]
    k_ptr,  # [B, M, H, E]
    v_ptr,  # [B, M, H, E]
    bias_ptr,  # [B, H, L, M] if BIAS
    out_ptr,  # [B, L, H, E] contiguous
    lse_ptr,  # [B, H, L]
    dq_ptr,  # [B, L, H, E], written
    dk_ptr,  # [B, M, H, E], written
    dv_ptr,  # [B, M, H, E], written
    L,
    M,
    H,
    E,
    scale,
    scale_rest,  # rounding error of `scale` as float32
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
    BIAS: tl.constexpr,
    PACKED: tl.constexpr,  # 1, or 3 where dq, dk and dv are views of one [B, L, 3, H, E]
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One head: its queries and dq stay in registers while the keys pass, BLOCK_M at a time."""
    scale = tl.cast(scale, ACC_DTYPE) + tl.cast(scale_rest, ACC_DTYPE)
    head = tl.program_id(0)
    q_ptr = _head_ptr(q_ptr, head, H, stride_qb, stride_qh)
    k_ptr = _head_ptr(k_ptr, head, H, stride_kb, stride_kh)
    v_ptr = _head_ptr(v_ptr, head, H, stride_vb, stride_vh)
    bias_ptr = _head_ptr(bias_ptr, head, H, stride_bb, stride_bh)
    dout_ptr = _head_ptr(dout_ptr, head, H, stride_db, stride_dh)
    out_ptr = _head_ptr(out_ptr, head, H, H * E * L, E)
    dq_ptr = _head_ptr(dq_ptr, head, H, PACKED * H * E * L, E)
    dk_ptr = _head_ptr(dk_ptr, head, H, PACKED * H * E * M, E)
    dv_ptr = _head_ptr(dv_ptr, head, H, PACKED * H * E * M, E)
    lse_ptr += head.to(tl.int64) * L

    q = _load_rows(q_ptr, 0, L, stride_ql, E, BLOCK_L, BLOCK_E)
    dout = _load_rows(dout_ptr, 0, L, stride_dl, E, BLOCK_L, BLOCK_E)
    row_dot = _row_dot(out_ptr, dout, 0, L, H * E, E, ACC_DTYPE, BLOCK_L, BLOCK_E)
    row = tl.arange(0, BLOCK_L)
    lse = tl.load(lse_ptr + row, mask=row < L, other=0.0)
    dq = tl.zeros([BLOCK_L, BLOCK_E], ACC_DTYPE)
    for start in range(0, M, BLOCK_M):
        k = _load_rows(k_ptr, start, M, stride_kl, E, BLOCK_M, BLOCK_E)
        v = _load_rows(v_ptr, start, M, stride_vl, E, BLOCK_M, BLOCK_E)
        weights, dscores = _softmax_and_gradient(
            q, k, v, dout, lse, row_dot, bias_ptr, 0, start, L, M, scale, stride_bl, stride_bm, BIAS, BLOCK_L, BLOCK_M,
            PRECISION, ACC_DTYPE,
        )  # fmt: skip
        dv = tl.dot(tl.trans(weights.to(q.dtype)), dout, input_precision=PRECISION, out_dtype=ACC_DTYPE)
        dscores = dscores.to(q.dtype)
        dk = tl.dot(tl.trans(dscores), q, input_precision=PRECISION, out_dtype=ACC_DTYPE)
        dq = tl.dot(dscores, k, dq, input_precision=PRECISION, out_dtype=ACC_DTYPE)
        _store_rows(dk_ptr, start, M, PACKED * H * E, E, dk * scale, BLOCK_M, BLOCK_E)
        _store_rows(dv_ptr, start, M, PACKED * H * E, E, dv, BLOCK_M, BLOCK_E)
    _store_rows(dq_ptr, 0, L, PACKED * H * E, E, dq * scale, BLOCK_L, BLOCK_E)


@triton.jit
def attention_bwd_per_block_kernel(
    dout_ptr,  # [B, L, H, E]
    q_ptr,  # [B, L, H, E]
    k_ptr,  # [B, M, H, E]
    v_ptr,  # [B, M, H, E]
    bias_ptr,  # [B, H, L, M] if BIAS
    out_ptr,  # [B, L, H, E] contiguous
    lse_ptr,  # [B, H, L]
    dq_ptr,  # [B, L, H, E], written
    dk_ptr,  # [B, M, H, E], written
    dv_ptr,  # [B, M, H, E], written
    L,
    M,
    H,
    E,
    scale,
    scale_rest,  # rounding error of `scale` as float32
    blocks,  # number of blocks per head, of queries or keys, whichever are more
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
    BIAS: tl.constexpr,
    PACKED: tl.constexpr,  # 1, or 3 where dq, dk and dv are views of one [B, L, 3, H, E]
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dk and dv of one tile of keys, through all queries, and dq of one tile of queries, through all keys."""
    scale = tl.cast(scale, ACC_DTYPE) + tl.cast(scale_rest, ACC_DTYPE)
    head = tl.program_id(0) // blocks
    block_start = tl.program_id(0) % blocks * BLOCK
    row = tl.arange(0, BLOCK)
    q_ptr = _head_ptr(q_ptr, head, H, stride_qb, stride_qh)
    k_ptr = _head_ptr(k_ptr, head, H, stride_kb, stride_kh)
    v_ptr = _head_ptr(v_ptr, head, H, stride_vb, stride_vh)
    bias_ptr = _head_ptr(bias_ptr, head, H, stride_bb, stride_bh)
    dout_ptr = _head_ptr(dout_ptr, head, H, stride_db, stride_dh)
    out_ptr = _head_ptr(out_ptr, head, H, H * E * L, E)
    dq_ptr = _head_ptr(dq_ptr, head, H, PACKED * H * E * L, E)
    dk_ptr = _head_ptr(dk_ptr, head, H, PACKED * H * E * M, E)
    dv_ptr = _head_ptr(dv_ptr, head, H, PACKED * H * E * M, E)
    lse_ptr += head.to(tl.int64) * L

    k = _load_rows(k_ptr, block_start, M, stride_kl, E, BLOCK, BLOCK_E)
    v = _load_rows(v_ptr, block_start, M, stride_vl, E, BLOCK, BLOCK_E)
    dk = tl.zeros([BLOCK, BLOCK_E], ACC_DTYPE)
    dv = tl.zeros([BLOCK, BLOCK_E], ACC_DTYPE)
    for start in range(0, L, BLOCK):
        q = _load_rows(q_ptr, start, L, stride_ql, E, BLOCK, BLOCK_E)
        dout = _load_rows(dout_ptr, start, L, stride_dl, E, BLOCK, BLOCK_E)
        lse = tl.load(lse_ptr + start + row, mask=row < L - start, other=0.0)
        row_dot = _row_dot(out_ptr, dout, start, L, H * E, E, ACC_DTYPE, BLOCK, BLOCK_E)
        weights, dscores = _softmax_and_gradient(
            q, k, v, dout, lse, row_dot, bias_ptr, start, block_start, L, M, scale, stride_bl, stride_bm, BIAS, BLOCK,
            BLOCK, PRECISION, ACC_DTYPE,
        )  # fmt: skip
        dv = tl.dot(tl.trans(weights.to(q.dtype)), dout, dv, input_precision=PRECISION, out_dtype=ACC_DTYPE)
        dk = tl.dot(tl.trans(dscores.to(q.dtype)), q, dk, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    _store_rows(dk_ptr, block_start, M, PACKED * H * E, E, dk * scale, BLOCK, BLOCK_E)
    _store_rows(dv_ptr, block_start, M, PACKED * H * E, E, dv, BLOCK, BLOCK_E)

    q = _load_rows(q_ptr, block_start, L, stride_ql, E, BLOCK, BLOCK_E)
    dout = _load_rows(dout_ptr, block_start, L, stride_dl, E, BLOCK, BLOCK_E)
    lse = tl.load(lse_ptr + block_start + row, mask=row < L - block_start, other=0.0)
    row_dot = _row_dot(out_ptr, dout, block_start, L, H * E, E, ACC_DTYPE, BLOCK, BLOCK_E)
    dq = tl.zeros([BLOCK, BLOCK_E], ACC_DTYPE)
    for start in range(0, M, BLOCK):
        k = _load_rows(k_ptr, start, M, stride_kl, E, BLOCK, BLOCK_E)
        v = _load_rows(v_ptr, start, M, stride_vl, E, BLOCK, BLOCK_E)
        _, dscores = _softmax_and_gradient(
            q, k, v, dout, lse, row_dot, bias_ptr, block_start, start, L, M, scale, stride_bl, stride_bm, BIAS, BLOCK,
            BLOCK, PRECISION, ACC_DTYPE,
        )  # fmt: skip
        dq = tl.dot(dscores.to(q.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC_DTYPE)
    _store_rows(dq_ptr, block_start, L, PACKED * H * E, E, dq * scale, BLOCK, BLOCK_E)


def _with_32_bit_rows(x: Tensor) -> Tensor:
    """x with contiguous rows that are close enough for 32-bit offsets inside a tile: x itself, or a copy."""
    return contiguous_rows(x) if x.stride(1) < 2**23 else x.contiguous()


def bias_arguments(bias: Tensor | None, q: Tensor) -> tuple[Tensor, tuple[int, ...], bool]:
    """(bias, its strides of samples, heads, queries and keys, True); without one (q, zeros, False)."""
    if bias is None:
        return q, (0, 0, 0, 0), False
    if max(bias.stride(-2) * bias.shape[-2], bias.stride(-1) * bias.shape[-1]) >= 2**30:  # offsets in a tile: 32 bits
        bias = bias.contiguous()
    return bias, ((0,) if bias.dim() == 3 else ()) + bias.stride(), True


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return launch_attention_fwd(q, k, v, None, scale)


def launch_attention_fwd(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _with_32_bit_rows(q), _with_32_bit_rows(k), _with_32_bit_rows(v)
    (B, L, H, E), M, sum_dtype = q.shape, k.shape[1], acc_dtype(q.dtype)
    out, lse = q.new_empty(B, L, H, E), q.new_empty(B, H, L, dtype=sum_dtype)
    if lse.numel():
        plan = forward_plan(L, E, q.element_size(), card(q).arch, bias is not None)
        blocks = triton.cdiv(L, plan.block_l)
        bias, bias_strides, with_bias = bias_arguments(bias, q)
        attention_fwd_kernel[(B * H * blocks,)](
            q,
            k,
            v,
            bias,
            out,
            lse,
            L,
            M,
            H,
            E,
            *two_floats(scale),
            blocks,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *bias_strides,
            BIAS=with_bias,
            ACC_DTYPE=TRITON_DTYPES[sum_dtype],
            PRECISION=dot_precision(q.dtype),
            BLOCK_L=plan.block_l,
            BLOCK_M=plan.block_m,
            BLOCK_E=plan.block_e,
            num_warps=plan.warps,
            num_stages=plan.stages,
        )
    return out, lse


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (B, L, H, E), M = q.shape, k.shape[1]
    dq, dk, dv = q.new_empty(B, L, H, E), q.new_empty(B, M, H, E), q.new_empty(B, M, H, E)
    if lse.numel():
        launch_attention_bwd(dout, (q, k, v), None, out, lse, scale, (dq, dk, dv))
    else:
        dk.zero_(), dv.zero_()
    return dq, dk, dv


def attention_packed_fwd(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return attention_fwd(*qkv.unbind(2), scale)


def attention_packed_bwd(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    dqkv = qkv.new_empty(qkv.shape)
    if lse.numel():
        launch_attention_bwd(dout, qkv.unbind(2), None, out, lse, scale, dqkv.unbind(2))
    return dqkv


def launch_attention_bwd(
    dout: Tensor,
    inputs: tuple[Tensor, ...],
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    gradients: tuple[Tensor, ...],
) -> None:
    """Writes the gradients of the inputs q, k and v: contiguous tensors, or the three views of a contiguous qkv."""
    dout, q, k, v = _with_32_bit_rows(dout), *map(_with_32_bit_rows, inputs)
    (B, L, H, E), M = q.shape, k.shape[1]
    plan = backward_plan(L, M, E, q.element_size(), card(q).arch, bias is not None)
    bias, bias_strides, with_bias = bias_arguments(bias, q)
    arguments = (dout, q, k, v, bias, out, lse, *gradients, L, M, H, E, *two_floats(scale))
    strides = (*dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *bias_strides)
    options = {
        "BIAS": with_bias,
        "PACKED": gradients[0].stride(1) // (H * E),
        "ACC_DTYPE": TRITON_DTYPES[lse.dtype],
        "PRECISION": dot_precision(q.dtype),
        "BLOCK_E": plan.block_e,
        "num_warps": plan.warps,
        "num_stages": plan.stages,
    }
    if plan.per_head:
        attention_bwd_per_head_kernel[(B * H,)](
            *arguments, *strides, **options, BLOCK_L=plan.block_l, BLOCK_M=plan.block_m
        )
    else:
        blocks = triton.cdiv(max(L, M), plan.block_l)
        attention_bwd_per_block_kernel[(B * H * blocks,)](*arguments, blocks, *strides, **options, BLOCK=plan.block_l)
