"""Attention on short sequences: those of vision transformers (50, 65, 197, 257 tokens; heads 32 to 128 wide).

A head's keys and values are a few tens of kilobytes, and a head needs about L/2 operations a byte (25 at L = 50, 98 at
197) where a card has some 300: memory is the limit, so every byte should be read once. q, k and v are read through
their strides from a packed [B, L, 3, H, E] and the result is written as [B, L, H, E]: no transposed copies.

Forward. A program holds BLOCK_L queries of a head, usually all that there are, and lets the keys and values pass in
tiles of BLOCK_M with a running maximum.

    bytes        4·B·H·L·E·s, and 4·B·H·L for the logarithm of each row's sum; keys and values again from the L2 cache
                 where a head has several blocks of queries
    operations   4·B·H·L²·E, L rounded up to tiles

Backward, one launch without atomics. The softmax is made again from its stored logarithm. Where the gradient of all
queries of a head fits the registers (`RESIDENT`), a program owns a head: all its queries stay, keys pass in tiles, a
tile's dk and dv are complete at once, and dq grows in registers: 5 products. Otherwise (`_backward_by_block`: float32,
long or wide heads) a program owns a tile of keys and a tile of queries: it passes over the queries for dk and dv, and
then over the keys for dq, with two more products, since logits are made twice.

    bytes        resident 8·B·H·L·E·s; by block also q, dout and out again for each tile of keys, and k and v again for
                 each tile of queries, from the L2 cache
    operations   10·B·H·L²·E resident, 14 by block

Why the tiles are as they are: forward, 256 queries by 32 keys on 8 warps hold all of a 197-token head, so that keys and
values pass once; scores are 32 registers a thread, the result 64 at E = 64, which leaves room for two programs a
multiprocessor at E = 32. 257 tokens take three programs of 128, not two of 256 that would idle half the time. On an
H200, where this was measured, many small programs beat that: of 64 queries and 64 keys it took 219 µs, of 256 by 32 331
(B = 256, L = 197, H = 12, E = 64); what other blocks read again comes from the L2 cache. Backward,
two tiles of scores and the gradient of the queries must be held at once: 256 queries of width 32 fit everywhere, of
width 64 only where products read their operands from 148 kB of shared memory (Hopper, Blackwell). float32 is multiplied
in three parts and float64 takes twice the registers: smaller tiles, and heads of up to 64.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .tile import LN2, LOG2E, LOWEST, TRITON_DTYPES, card, choose, power_of_2, precision, rows, two_floats, wide

# {architecture: {bytes of an element: {widest head: (longest BLOCK_L, BLOCK_M, warps at that length, stages)}}}
FORWARD = {"sm_80": {2: {64: (256, 32, 8, 2), 128: (128, 32, 8, 2)}, 4: {64: (64, 32, 8, 1)}, 8: {64: (32, 32, 4, 1)}}}
FORWARD |= {arch: FORWARD["sm_80"] for arch in ("sm_100", "gfx942")}
FORWARD["sm_90"] = FORWARD["sm_80"] | {2: {64: (64, 64, 4, 3), 128: (128, 32, 8, 2)}}  # measured, on an H200
FORWARD["sm_120"] = FORWARD["sm_80"] | {8: {64: (16, 16, 8, 1)}}  # no tensor cores for float64

# {architecture: {bytes of an element: {(BLOCK_L, BLOCK_E): (BLOCK_M, warps)}}}: where a backward pass is resident
RESIDENT = {
    "sm_80": {2: {(64, 32): (32, 4), (128, 32): (32, 4), (256, 32): (32, 8), (64, 64): (32, 4), (128, 64): (32, 8)}}
}
RESIDENT["sm_90"] = {  # measured, on an H200
    2: {
        (64, 32): (32, 4),
        (128, 32): (32, 4),
        (256, 32): (64, 8),
        (64, 64): (64, 4),
        (128, 64): (64, 8),
        (256, 64): (32, 8),
    }
}
RESIDENT["sm_100"] = {2: RESIDENT["sm_80"][2] | {(128, 64): (64, 8), (256, 64): (16, 8)}}
RESIDENT["sm_120"] = {2: RESIDENT["sm_80"][2] | {(128, 64): (64, 8)}}
RESIDENT["gfx942"] = {2: RESIDENT["sm_80"][2] | {(256, 32): (16, 8)}}

# {architecture: {bytes of an element: {widest head: (BLOCK, warps, stages)}}} of a backward pass by blocks
BY_BLOCK = {"sm_80": {2: {64: (64, 4, 1), 128: (32, 4, 1)}, 4: {64: (16, 4, 1)}, 8: {64: (16, 4, 1)}}}
BY_BLOCK |= {arch: BY_BLOCK["sm_80"] for arch in ("sm_90", "sm_100")}
BY_BLOCK["sm_120"] = BY_BLOCK["sm_80"] | {2: {64: (32, 4, 2), 128: (32, 4, 1)}, 8: {64: (16, 8, 1)}}
BY_BLOCK["gfx942"] = BY_BLOCK["sm_80"] | {2: {64: (32, 4, 1), 128: (32, 8, 1)}}


@triton.jit
def _rows(x_ptr, start, length, stride, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """[BLOCK, BLOCK_E] of one head from row `start`, zeros outside.

    The 64-bit part of an address is one number a tile; inside a tile 32 bits do, and all tiles of a tensor share them,
    which is what keeps several tiles of pointers out of the registers (`_near` sees to it that they fit).
    """
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    near = row[:, None] * stride + column[None, :]
    return tl.load(
        x_ptr + tl.cast(start, tl.int64) * stride + near,
        mask=(row < length - start)[:, None] & (column < E)[None, :],
        other=0.0,
    )


@triton.jit
def _put(x_ptr, start, length, stride, E, x, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    tl.store(
        x_ptr + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :],
        x.to(x_ptr.dtype.element_ty),
        mask=(row < length - start)[:, None] & (column < E)[None, :],
    )


@triton.jit
def _head(x_ptr, head, H, stride_b, stride_h):
    """Where a head of a sample begins; heads are numbered through the batch."""
    return x_ptr + (head // H).to(tl.int64) * stride_b + (head % H).to(tl.int64) * stride_h


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    L,
    M,
    H,
    E,
    scale,
    rest,
    blocks,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    scale = tl.cast(scale, WIDE) + tl.cast(rest, WIDE)
    head = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_L
    q_ptr = _head(q_ptr, head, H, stride_qb, stride_qh)
    k_ptr = _head(k_ptr, head, H, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, head, H, stride_vb, stride_vh)
    out_ptr = _head(out_ptr, head, H, H * E * L, E)

    q = _rows(q_ptr, first, L, stride_ql, E, BLOCK_L, BLOCK_E)
    top = tl.full([BLOCK_L], LOWEST, WIDE)
    total = tl.zeros([BLOCK_L], WIDE)
    out = tl.zeros([BLOCK_L, BLOCK_E], WIDE)
    for start in range(0, M, BLOCK_M):
        k = _rows(k_ptr, start, M, stride_kl, E, BLOCK_M, BLOCK_E)
        v = _rows(v_ptr, start, M, stride_vl, E, BLOCK_M, BLOCK_E)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=WIDE) * scale
        scores = tl.where((tl.arange(0, BLOCK_M) < M - start)[None, :], scores, float("-inf"))  # [BLOCK_L, BLOCK_M]
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2((scores - new_top[:, None]) * LOG2E)  # the difference is small, and so is its rounding
        shrink = tl.exp2((top - new_top) * LOG2E)
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION, out_dtype=WIDE)
        top = new_top
    _put(out_ptr, first, L, H * E, E, out / total[:, None], BLOCK_L, BLOCK_E)
    row = first + tl.arange(0, BLOCK_L)
    tl.store(lse_ptr + head.to(tl.int64) * L + row, top + tl.log2(total) * LN2, mask=row < L)


@triton.jit
def _gradients(
    q, k, v, dout, lse, delta, start, M, scale, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr
):
    """(weights, dscores) of a tile [queries, keys], dscores without the factor `scale`."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=WIDE) * scale
    weights = tl.exp2((scores - lse[:, None]) * LOG2E)
    # A key that does not exist has score 0, which may be far above a row's sum; a query that does not exist has dout 0.
    weights = tl.where((tl.arange(0, BLOCK_M) < M - start)[None, :], weights, 0.0)
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION, out_dtype=WIDE)
    return weights, weights * (dweights - delta[:, None])


@triton.jit
def _delta(out_ptr, dout, first, L, stride, E, WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Σ_e out·dout of each query: what the softmax takes off its gradient."""
    return tl.sum(_rows(out_ptr, first, L, stride, E, BLOCK, BLOCK_E).to(WIDE) * dout.to(WIDE), 1)


@triton.jit
def _backward_resident(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    L,
    M,
    H,
    E,
    scale,
    rest,
    stride_ob,
    stride_ol,
    stride_oh,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One head: its queries and their gradients stay while the keys pass, BLOCK_M at a time."""
    scale = tl.cast(scale, WIDE) + tl.cast(rest, WIDE)
    head = tl.program_id(0)
    q_ptr = _head(q_ptr, head, H, stride_qb, stride_qh)
    k_ptr = _head(k_ptr, head, H, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, head, H, stride_vb, stride_vh)
    dout_ptr = _head(dout_ptr, head, H, stride_ob, stride_oh)
    out_ptr, dq_ptr = _head(out_ptr, head, H, H * E * L, E), _head(dq_ptr, head, H, PACKED * H * E * L, E)
    dk_ptr, dv_ptr = _head(dk_ptr, head, H, PACKED * H * E * M, E), _head(dv_ptr, head, H, PACKED * H * E * M, E)
    lse_ptr += head.to(tl.int64) * L

    q = _rows(q_ptr, 0, L, stride_ql, E, BLOCK_L, BLOCK_E)
    dout = _rows(dout_ptr, 0, L, stride_ol, E, BLOCK_L, BLOCK_E)
    delta = _delta(out_ptr, dout, 0, L, H * E, E, WIDE, BLOCK_L, BLOCK_E)
    row = tl.arange(0, BLOCK_L)
    lse = tl.load(lse_ptr + row, mask=row < L, other=0.0)
    dq = tl.zeros([BLOCK_L, BLOCK_E], WIDE)
    for start in range(0, M, BLOCK_M):
        k = _rows(k_ptr, start, M, stride_kl, E, BLOCK_M, BLOCK_E)
        v = _rows(v_ptr, start, M, stride_vl, E, BLOCK_M, BLOCK_E)
        weights, dscores = _gradients(q, k, v, dout, lse, delta, start, M, scale, BLOCK_M, PRECISION, WIDE)
        dv = tl.dot(tl.trans(weights.to(q.dtype)), dout, input_precision=PRECISION, out_dtype=WIDE)
        dscores = dscores.to(q.dtype)
        dk = tl.dot(tl.trans(dscores), q, input_precision=PRECISION, out_dtype=WIDE)
        dq = tl.dot(dscores, k, dq, input_precision=PRECISION, out_dtype=WIDE)
        _put(dk_ptr, start, M, PACKED * H * E, E, dk * scale, BLOCK_M, BLOCK_E)
        _put(dv_ptr, start, M, PACKED * H * E, E, dv, BLOCK_M, BLOCK_E)
    _put(dq_ptr, 0, L, PACKED * H * E, E, dq * scale, BLOCK_L, BLOCK_E)


@triton.jit
def _backward_by_block(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    L,
    M,
    H,
    E,
    scale,
    rest,
    blocks,
    stride_ob,
    stride_ol,
    stride_oh,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One tile of keys, which meets all queries, and one tile of queries, which meets all keys."""
    scale = tl.cast(scale, WIDE) + tl.cast(rest, WIDE)
    head = tl.program_id(0) // blocks
    own = tl.program_id(0) % blocks * BLOCK
    at = tl.arange(0, BLOCK)
    q_ptr = _head(q_ptr, head, H, stride_qb, stride_qh)
    k_ptr = _head(k_ptr, head, H, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, head, H, stride_vb, stride_vh)
    dout_ptr = _head(dout_ptr, head, H, stride_ob, stride_oh)
    out_ptr, dq_ptr = _head(out_ptr, head, H, H * E * L, E), _head(dq_ptr, head, H, PACKED * H * E * L, E)
    dk_ptr, dv_ptr = _head(dk_ptr, head, H, PACKED * H * E * M, E), _head(dv_ptr, head, H, PACKED * H * E * M, E)
    lse_ptr += head.to(tl.int64) * L

    k = _rows(k_ptr, own, M, stride_kl, E, BLOCK, BLOCK_E)
    v = _rows(v_ptr, own, M, stride_vl, E, BLOCK, BLOCK_E)
    dk = tl.zeros([BLOCK, BLOCK_E], WIDE)
    dv = tl.zeros([BLOCK, BLOCK_E], WIDE)
    for start in range(0, L, BLOCK):
        q = _rows(q_ptr, start, L, stride_ql, E, BLOCK, BLOCK_E)
        dout = _rows(dout_ptr, start, L, stride_ol, E, BLOCK, BLOCK_E)
        lse = tl.load(lse_ptr + start + at, mask=at < L - start, other=0.0)
        delta = _delta(out_ptr, dout, start, L, H * E, E, WIDE, BLOCK, BLOCK_E)
        weights, dscores = _gradients(q, k, v, dout, lse, delta, own, M, scale, BLOCK, PRECISION, WIDE)
        dv = tl.dot(tl.trans(weights.to(q.dtype)), dout, dv, input_precision=PRECISION, out_dtype=WIDE)
        dk = tl.dot(tl.trans(dscores.to(q.dtype)), q, dk, input_precision=PRECISION, out_dtype=WIDE)
    _put(dk_ptr, own, M, PACKED * H * E, E, dk * scale, BLOCK, BLOCK_E)
    _put(dv_ptr, own, M, PACKED * H * E, E, dv, BLOCK, BLOCK_E)

    q = _rows(q_ptr, own, L, stride_ql, E, BLOCK, BLOCK_E)
    dout = _rows(dout_ptr, own, L, stride_ol, E, BLOCK, BLOCK_E)
    lse = tl.load(lse_ptr + own + at, mask=at < L - own, other=0.0)
    delta = _delta(out_ptr, dout, own, L, H * E, E, WIDE, BLOCK, BLOCK_E)
    dq = tl.zeros([BLOCK, BLOCK_E], WIDE)
    for start in range(0, M, BLOCK):
        k = _rows(k_ptr, start, M, stride_kl, E, BLOCK, BLOCK_E)
        v = _rows(v_ptr, start, M, stride_vl, E, BLOCK, BLOCK_E)
        _, dscores = _gradients(q, k, v, dout, lse, delta, start, M, scale, BLOCK, PRECISION, WIDE)
        dq = tl.dot(dscores.to(q.dtype), k, dq, input_precision=PRECISION, out_dtype=WIDE)
    _put(dq_ptr, own, L, PACKED * H * E, E, dq * scale, BLOCK, BLOCK_E)


def _block(L: int, longest: int) -> int:
    """Queries a program: as many as there are, unless the last program would then be idle for the most part (257)."""
    block, shortest = min(longest, power_of_2(L, 64)), min(longest, 64)
    while block > shortest and triton.cdiv(L, block) * block > 4 / 3 * triton.cdiv(L, shortest) * shortest:
        block //= 2
    return block


def _near(x: Tensor) -> Tensor:
    """x with contiguous rows that lie no further apart than 32-bit offsets inside a tile reach."""
    return rows(x) if x.stride(1) < 2**23 else x.contiguous()


class Cut(NamedTuple):
    resident: bool  # of a backward pass: one program a head
    block_l: int
    block_m: int
    block_e: int
    warps: int
    stages: int


def forward_plan(L: int, E: int, size: int, arch: str) -> Cut:
    """How a forward pass over L queries of width E, `size` bytes an element, is cut."""
    width = power_of_2(E, 32)
    longest, block_m, warps, stages = choose(FORWARD[arch][size], width)
    block_l = _block(L, longest)
    return Cut(False, block_l, block_m, width, max(4, warps * block_l // longest), stages)


def backward_plan(L: int, M: int, E: int, size: int, arch: str) -> Cut:
    width, block_l = power_of_2(E, 32), power_of_2(L, 64)
    if resident := RESIDENT[arch].get(size, {}).get((block_l, width)):
        return Cut(True, block_l, resident[0], width, resident[1], 1)
    block, warps, stages = choose(BY_BLOCK[arch][size], width)
    return Cut(False, block, block, width, warps, stages)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _near(q), _near(k), _near(v)
    (B, L, H, E), M, dtype = q.shape, k.shape[1], wide(q.dtype)
    out, lse = q.new_empty(B, L, H, E), q.new_empty(B, H, L, dtype=dtype)
    if lse.numel():
        cut = forward_plan(L, E, q.element_size(), card(q).arch)
        blocks = triton.cdiv(L, cut.block_l)
        _forward[(B * H * blocks,)](
            q,
            k,
            v,
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
            WIDE=TRITON_DTYPES[dtype],
            PRECISION=precision(q.dtype),
            BLOCK_L=cut.block_l,
            BLOCK_M=cut.block_m,
            BLOCK_E=cut.block_e,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
    return out, lse


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (B, L, H, E), M = q.shape, k.shape[1]
    gradients = q.new_empty(B, L, H, E), q.new_empty(B, M, H, E), q.new_empty(B, M, H, E)
    if lse.numel():
        _backward(dout, (q, k, v), out, lse, scale, gradients)
    else:
        gradients[1].zero_(), gradients[2].zero_()
    return gradients


def attention_packed_fwd(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return attention_fwd(*qkv.unbind(2), scale)


def attention_packed_bwd(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    gradient = qkv.new_empty(qkv.shape)
    if lse.numel():
        _backward(dout, qkv.unbind(2), out, lse, scale, gradient.unbind(2))
    return gradient


def _backward(dout: Tensor, inputs: tuple, out: Tensor, lse: Tensor, scale: float, gradients: tuple) -> None:
    """Into the gradients of q, k and v, whose tokens lie equally far apart in all three, each head's values together
    and the samples one after another."""
    dout, q, k, v = _near(dout), *map(_near, inputs)
    (B, L, H, E), M = q.shape, k.shape[1]
    cut = backward_plan(L, M, E, q.element_size(), card(q).arch)
    tensors = (dout, q, k, v, out, lse, *gradients, L, M, H, E, *two_floats(scale))
    strides = (*dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    options = {
        "PACKED": gradients[0].stride(1) // (H * E),
        "WIDE": TRITON_DTYPES[lse.dtype],
        "PRECISION": precision(q.dtype),
        "BLOCK_E": cut.block_e,
        "num_warps": cut.warps,
        "num_stages": cut.stages,
    }
    if cut.resident:
        _backward_resident[(B * H,)](*tensors, *strides, **options, BLOCK_L=cut.block_l, BLOCK_M=cut.block_m)
    else:
        blocks = triton.cdiv(max(L, M), cut.block_l)
        _backward_by_block[(B * H * blocks,)](*tensors, blocks, *strides, **options, BLOCK=cut.block_l)
