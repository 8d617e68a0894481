"""MAE's masking: which tokens stay, gathering them, and restoring them. These kernels are limited by bytes alone.

`random_masking_kernel` finds the rank of each token's noise by counting the tokens that come before it: no sort and no
second argsort, and the count orders equal noise by index. A row of up to WHOLE_ROW tokens is one program, which loads
its noise once and holds it as row and as column; longer rows are cut, and each program passes over all of their noise.

`keep_tokens_fwd_kernel` gathers rows by their ids and adds their positions; `restore_tokens_fwd_kernel` is its inverse:
each row of the result is a prefix token, a kept token or the mask token. Their gradients also go by rows of the result,
so that each row is written once: `keep_tokens_bwd_kernel` searches ids_keep for every token and writes its gradient or
zeros, with no memset and no scatter; `restore_tokens_bwd_kernel` reads the gradient once in the order of memory, stores
the kept rows in their places and adds up the masked ones. Its programs write partial sums, which torch adds in a fixed
order, so there are no atomics, and results are the same bits every time.

    bytes        random_masking B·L·(s + 20): noise in; ids, ids_restore and mask out
                 keep_tokens    B·M·(2·D·s + 8) + L·D·s; backward B·D·s·(M + L) + 8·B·M
                 restore_tokens B·D·s·(2·prefix + M + L) + 8·B·L + (prefix + L)·D·s; backward the same without the
                                last term, and parts·D·8 for partial sums, under 3 % of it in MAE at B = 256
                 Positions, the mask token and the ids that are searched are read by many programs and come from the
                 L2 cache: memory reads them once. tests/support/kernel_model.py counts all this exactly.
    operations   random_masking B·L² comparisons, the others a few for each element
    limit        memory: B = 256, D = 768 in 16 bits take 39 MB forward and 96 MB backward

Tile sizes: by its data sheet (bandwidth times latency, over the multiprocessors) a card needs 10 to 40 kB in flight on
each multiprocessor. 4 warps ask for 4 kB at once, 32 bytes per thread in words of 16, and at 64 registers per thread 8
such programs fit side by side. A tile is TOKENS rows by COLUMNS values, half a kilobyte of a row where the row is that
long: one word for each thread of a warp. A row of a multiple of 16 values, as in every ViT, has no ragged end, so the
compiler can use such words. `restore_tokens_fwd_kernel` takes the same tokens of several samples, as many as leave 8
programs a multiprocessor, so that positions are not read again for each sample: that would be 0.8 times the bytes from
memory, and the L2 cache is not that much faster.

Ids are not checked here: to read one on the host would stop it until the GPU is done. An id outside its range gives a
row of zeros (in ids_restore a mask token) or is ignored; nothing outside the tensors is read or written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import (
    ARCHITECTURES,
    TRITON_DTYPES,
    Card,
    Launch,
    acc_dtype,
    card,
    contiguous_rows,
    move_tile,
    positions_in_row,
    power_of_2,
    search_block,
    split_loop,
)

WHOLE_ROW = 512  # the longest row that one program ranks

# {architecture: warps of a program of random_masking}. A batch is two programs per multiprocessor, so latency decides.
MASK = dict.fromkeys(ARCHITECTURES, 8) | {"gfx942": 4}  # warps of gfx942 have 64 lanes
# {architecture: configuration} of keep_tokens, forward and backward, and of restore_tokens forward
MOVE = dict.fromkeys(ARCHITECTURES, Launch(4, 4096)) | {"gfx942": Launch(4, 8192)}
# {architecture: (configuration, programs per multiprocessor)} of restore_tokens backward. As many programs as fit side
# by side: each writes a partial sum, and none should wait until another ends.
SUM = {
    "sm_80": (Launch(4, 8192), 4),
    "sm_90": (Launch(4, 8192), 4),
    "sm_100": (Launch(4, 8192), 5),
    "sm_120": (Launch(4, 8192), 4),
    "gfx942": (Launch(4, 8192), 2),
}


@triton.jit
def _sortable_bits(noise):
    """Integers in the order of the noise: −0.0 equals 0.0, and every NaN comes after +∞."""
    if noise.dtype == tl.float64:
        bits = noise.to(tl.int64, bitcast=True)
        magnitude = bits & 0x7FFFFFFFFFFFFFFF
        order = tl.where(magnitude > 0x7FF0000000000000, 0x7FFFFFFFFFFFFFFF, tl.where(bits < 0, -magnitude, magnitude))
    else:
        bits = noise.to(tl.float32).to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        order = tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, tl.where(bits < 0, -magnitude, magnitude))
    return order


@triton.jit
def _count_before(chunk, chunk_token, order, token):
    """How many values of a chunk come before each value of `order`; equal values are ordered by token."""
    earlier = chunk_token[:, None] < token[None, :]
    before = (chunk[:, None] < order[None, :]) | ((chunk[:, None] == order[None, :]) & earlier)
    return tl.sum(before.to(tl.int32), 0)


@triton.jit
def random_masking_kernel(
    noise_ptr,  # [B, L]
    ids_keep_ptr,  # [B, keep] int64, written
    ids_masked_ptr,  # [B, L − keep] int64, written
    ids_restore_ptr,  # [B, L] int64, written
    mask_ptr,  # [B, L] float32, written
    L,
    keep,
    blocks,  # of a row
    stride_noise_b,
    stride_noise_l,
    WHOLE: tl.constexpr,  # a program holds a whole row
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Ranks BLOCK tokens of one row. Beyond the end of the row the noise is NaN, which comes last."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    in_l = token < L
    row_ptr = noise_ptr + sample * stride_noise_b
    order = _sortable_bits(tl.load(row_ptr + token.to(tl.int64) * stride_noise_l, mask=in_l, other=float("nan")))
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, L, CHUNK):
        chunk_token = start + tl.arange(0, CHUNK)
        if WHOLE:  # select the chunk from the row in registers
            chunk_start = tl.arange(0, BLOCK // CHUNK)[:, None] * CHUNK
            chunk = tl.sum(tl.where(chunk_start == start, tl.reshape(order, [BLOCK // CHUNK, CHUNK]), 0), 0)
        else:
            chunk_ptr = row_ptr + chunk_token.to(tl.int64) * stride_noise_l
            chunk = _sortable_bits(tl.load(chunk_ptr, mask=chunk_token < L, other=float("nan")))
        rank += _count_before(chunk, chunk_token, order, token)
    offset = sample * L + token
    tl.store(ids_restore_ptr + offset, rank.to(tl.int64), mask=in_l)
    tl.store(mask_ptr + offset, (rank >= keep).to(tl.float32), mask=in_l)
    tl.store(ids_keep_ptr + sample * keep + rank, token.to(tl.int64), mask=in_l & (rank < keep))
    tl.store(ids_masked_ptr + sample * (L - keep) + (rank - keep), token.to(tl.int64), mask=in_l & (rank >= keep))


@triton.jit
def keep_tokens_fwd_kernel(
    x_ptr,  # [B, L, D], rows contiguous
    ids_ptr,  # [B, M] int64
    pos_ptr,  # [L, D], rows contiguous, or None
    out_ptr,  # [B, M, D], written
    L,
    M,
    D,
    blocks,  # of a sample
    stride_xb,
    stride_xl,
    stride_ids_b,
    stride_ids_m,
    stride_pos_l,
    ACC_DTYPE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """TOKENS kept tokens of one sample."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    m = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    in_m = m < M
    token = tl.load(ids_ptr + sample * stride_ids_b + m.to(tl.int64) * stride_ids_m, mask=in_m, other=-1)
    exists = ((token >= 0) & (token < L))[:, None]
    x_row, out_row = x_ptr + sample * stride_xb + token[:, None] * stride_xl, out_ptr + (sample * M + m)[:, None] * D
    for start in range(0, D, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        kept = tl.load(x_row + column, mask=exists & (column < D), other=0.0)
        if pos_ptr is not None:
            pos = tl.load(pos_ptr + token[:, None] * stride_pos_l + column, mask=exists & (column < D), other=0.0)
            kept = kept.to(ACC_DTYPE) + pos.to(ACC_DTYPE)
        tl.store(out_row + column, kept, mask=in_m[:, None] & (column < D))


@triton.jit
def keep_tokens_bwd_kernel(
    dkept_ptr,  # [B, M, D], rows contiguous
    ids_ptr,  # [B, M] int64
    dx_ptr,  # [B, L, D], written
    L,
    M,
    D,
    blocks,  # of a sample
    stride_dkept_b,
    stride_dkept_m,
    stride_ids_b,
    stride_ids_m,
    BLOCK_M: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """TOKENS whole rows of dx: the ids are searched once for them, and the result serves all columns."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    m = positions_in_row(ids_ptr + sample * stride_ids_b, stride_ids_m, M, token, BLOCK_M)[:, None].to(tl.int64)
    dkept_row = dkept_ptr + sample * stride_dkept_b + m * stride_dkept_m
    dx_row = dx_ptr + (sample * L + token)[:, None] * D
    for start in range(0, D, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        mask = (token < L)[:, None] & (column < D)
        tl.store(dx_row + column, tl.load(dkept_row + column, mask=mask & (m >= 0), other=0.0), mask=mask)


@triton.jit
def _source_row(ids_ptr, token, stride_ids_l, L, prefix, kept):
    """(row of x, whether there is one) of each of the prefix + L tokens; a token without one is a mask token."""
    in_prefix = token < prefix
    has_rank = (token >= prefix) & (token < prefix + L)
    rank = tl.load(ids_ptr + (token - prefix).to(tl.int64) * stride_ids_l, mask=has_rank, other=0)
    return tl.where(in_prefix, token.to(tl.int64), prefix + rank), in_prefix | ((rank >= 0) & (rank < kept))


@triton.jit
def restore_tokens_fwd_kernel(
    x_ptr,  # [B, prefix + kept, D], rows contiguous
    mask_token_ptr,  # [D]
    ids_ptr,  # [B, L] int64: ids_restore
    pos_ptr,  # [prefix + L, D], rows contiguous, or None
    out_ptr,  # [B, prefix + L, D], written
    B,
    L,
    D,
    prefix,
    kept,
    samples_per_part,
    blocks,  # of a sample
    stride_xb,
    stride_xm,
    stride_ids_b,
    stride_ids_l,
    stride_pos_l,
    ACC_DTYPE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The same TOKENS of several samples: mask token and positions are read once for all of them."""
    part = tl.program_id(0) // blocks
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)  # in 0 … prefix + L − 1
    for start in range(0, D, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        mask = (token < prefix + L)[:, None] & (column < D)
        mask_token = tl.load(mask_token_ptr + column, mask=column < D, other=0.0).to(ACC_DTYPE)
        if pos_ptr is not None:
            pos = pos_ptr + token.to(tl.int64)[:, None] * stride_pos_l + column
            pos = tl.load(pos, mask=mask, other=0.0).to(ACC_DTYPE)
        for b in range(part * samples_per_part, tl.minimum((part + 1) * samples_per_part, B)):
            sample = tl.cast(b, tl.int64)
            source, in_x = _source_row(ids_ptr + sample * stride_ids_b, token, stride_ids_l, L, prefix, kept)
            x = x_ptr + sample * stride_xb + source[:, None] * stride_xm + column
            x = tl.load(x, mask=mask & in_x[:, None], other=0.0).to(ACC_DTYPE)
            out = tl.where(in_x[:, None], x, mask_token)
            if pos_ptr is not None:
                out += pos
            tl.store(out_ptr + (sample * (prefix + L) + token)[:, None] * D + column, out, mask=mask)


@triton.jit
def restore_tokens_bwd_kernel(
    dout_ptr,  # [B, prefix + L, D], rows contiguous
    ids_ptr,  # [B, L] int64: ids_restore
    dx_ptr,  # [B, prefix + kept, D], written
    dmask_token_ptr,  # [parts, D], written: partial sums
    L,
    D,
    prefix,
    kept,
    tiles,
    tiles_per_part,
    blocks,  # of a sample
    stride_dout_b,
    stride_dout_l,
    stride_ids_b,
    stride_ids_l,
    ACC_DTYPE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Several tiles of TOKENS tokens, one after the other; their sum stays in registers until the last tile."""
    part = tl.program_id(1)
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    total = tl.zeros([TOKENS, COLUMNS], ACC_DTYPE)
    for tile in range(part * tiles_per_part, tl.minimum((part + 1) * tiles_per_part, tiles)):
        sample = (tile // blocks).to(tl.int64)
        token = tile % blocks * TOKENS + tl.arange(0, TOKENS)  # in 0 … prefix + L − 1
        source, in_x = _source_row(ids_ptr + sample * stride_ids_b, token, stride_ids_l, L, prefix, kept)
        mask = (token < prefix + L)[:, None] & (column < D)
        dout = dout_ptr + sample * stride_dout_b + token.to(tl.int64)[:, None] * stride_dout_l + column
        dout = tl.load(dout, mask=mask, other=0.0)
        dx = dx_ptr + (sample * (prefix + kept) + source)[:, None] * D + column
        tl.store(dx, dout, mask=mask & in_x[:, None])
        total += tl.where(in_x[:, None], 0.0, dout.to(ACC_DTYPE))
    partial = dmask_token_ptr + part.to(tl.int64) * D + column
    tl.store(partial, tl.sum(total, 0)[None, :], mask=column < D)


def random_masking(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, L = noise.shape
    ids_keep, ids_masked = (noise.new_empty(B, count, dtype=torch.int64) for count in (keep, L - keep))
    ids_restore, mask = (noise.new_empty(B, L, dtype=dtype) for dtype in (torch.int64, torch.float32))
    if B:
        block, blocks = mask_tile(L)
        random_masking_kernel[(B * blocks,)](
            noise,
            ids_keep,
            ids_masked,
            ids_restore,
            mask,
            L,
            keep,
            blocks,
            *noise.stride(),
            WHOLE=L <= WHOLE_ROW,
            BLOCK=block,
            CHUNK=min(32, block),
            num_warps=MASK[card(noise).arch],
        )
    return ids_keep, ids_masked, ids_restore, mask


def keep_tokens_fwd(x: Tensor, ids_keep: Tensor, pos: Tensor | None) -> Tensor:
    (B, L, D), M = x.shape, ids_keep.shape[1]
    out = x.new_empty(B, M, D, dtype=x.dtype if pos is None else torch.promote_types(x.dtype, pos.dtype))
    if out.numel():
        x, pos, launch = contiguous_rows(x), None if pos is None else contiguous_rows(pos), MOVE[card(x).arch]
        tokens, columns = move_tile(M, D, x.element_size(), launch.bytes)
        blocks = triton.cdiv(M, tokens)
        keep_tokens_fwd_kernel[(B * blocks,)](
            x,
            ids_keep,
            pos,
            out,
            L,
            M,
            D,
            blocks,
            *x.stride()[:2],
            *ids_keep.stride(),
            0 if pos is None else pos.stride(0),
            ACC_DTYPE=TRITON_DTYPES[acc_dtype(out.dtype)],
            TOKENS=tokens,
            COLUMNS=columns,
            num_warps=launch.warps,
        )
    return out


def keep_tokens_bwd(dkept: Tensor, ids_keep: Tensor, length: int) -> Tensor:
    B, M, D = dkept.shape
    dx = dkept.new_empty(B, length, D)
    if dx.numel():
        dkept, launch = contiguous_rows(dkept), MOVE[card(dkept).arch]
        tokens, columns = move_tile(length, D, dkept.element_size(), launch.bytes)
        blocks = triton.cdiv(length, tokens)
        keep_tokens_bwd_kernel[(B * blocks,)](
            dkept,
            ids_keep,
            dx,
            length,
            M,
            D,
            blocks,
            *dkept.stride()[:2],
            *ids_keep.stride(),
            BLOCK_M=search_block(M),
            TOKENS=tokens,
            COLUMNS=columns,
            num_warps=launch.warps,
        )
    return dx


def restore_tokens_fwd(x: Tensor, mask_token: Tensor, ids_restore: Tensor, pos: Tensor | None, prefix: int) -> Tensor:
    (B, tokens_in, D), L = x.shape, ids_restore.shape[1]
    dtype = torch.promote_types(x.dtype, mask_token.dtype)
    out = x.new_empty(B, prefix + L, D, dtype=dtype if pos is None else torch.promote_types(dtype, pos.dtype))
    if out.numel():
        x, mask_token, gpu = contiguous_rows(x), contiguous_rows(mask_token), card(x)
        pos = None if pos is None else contiguous_rows(pos)
        (tokens, columns), blocks, parts, samples_per_part = restore_tile(B, prefix + L, D, x.element_size(), gpu)
        restore_tokens_fwd_kernel[(parts * blocks,)](
            x,
            mask_token,
            ids_restore,
            pos,
            out,
            B,
            L,
            D,
            prefix,
            tokens_in - prefix,
            samples_per_part,
            blocks,
            *x.stride()[:2],
            *ids_restore.stride(),
            0 if pos is None else pos.stride(0),
            ACC_DTYPE=TRITON_DTYPES[acc_dtype(out.dtype)],
            TOKENS=tokens,
            COLUMNS=columns,
            num_warps=MOVE[gpu.arch].warps,
        )
    return out


def restore_tokens_bwd(dout: Tensor, ids_restore: Tensor, prefix: int, kept: int) -> tuple[Tensor, Tensor]:
    (B, _, D), L, sum_dtype = dout.shape, ids_restore.shape[1], acc_dtype(dout.dtype)
    dx = dout.new_empty(B, prefix + kept, D)
    if not dout.numel():
        return dx, dout.new_zeros(D, dtype=sum_dtype)
    dout, gpu = contiguous_rows(dout), card(dout)
    (tokens, columns), blocks, parts, tiles_per_part = sum_tile(B, prefix + L, D, dout.element_size(), gpu)
    partial_sums = dout.new_empty(parts, D, dtype=sum_dtype)
    restore_tokens_bwd_kernel[(triton.cdiv(D, columns), parts)](
        dout,
        ids_restore,
        dx,
        partial_sums,
        L,
        D,
        prefix,
        kept,
        B * blocks,
        tiles_per_part,
        blocks,
        *dout.stride()[:2],
        *ids_restore.stride(),
        ACC_DTYPE=TRITON_DTYPES[sum_dtype],
        TOKENS=tokens,
        COLUMNS=columns,
        num_warps=SUM[gpu.arch][0].warps,
    )
    return dx, partial_sums.sum(0)


def mask_tile(L: int) -> tuple[int, int]:
    """(tokens of a program, programs of a row) of random_masking."""
    block = power_of_2(L) if L <= WHOLE_ROW else 256
    return block, triton.cdiv(L, block)


def restore_tile(B: int, tokens: int, D: int, size: int, gpu: Card) -> tuple[tuple[int, int], int, int, int]:
    """(tile, tiles of a sample, parts of the batch, samples of a part) of restore_tokens."""
    tile = move_tile(tokens, D, size, MOVE[gpu.arch].bytes)
    blocks = triton.cdiv(tokens, tile[0])
    return tile, blocks, *split_loop(blocks, B, 8 * gpu.multiprocessors)


def sum_tile(B: int, tokens: int, D: int, size: int, gpu: Card) -> tuple[tuple[int, int], int, int, int]:
    """(tile, tiles of a sample, parts, tiles of a part) of the gradient of restore_tokens."""
    launch, programs = SUM[gpu.arch]
    tile = move_tile(tokens, D, size, launch.bytes)
    blocks = triton.cdiv(tokens, tile[0])
    return tile, blocks, *split_loop(triton.cdiv(D, tile[1]), B * blocks, programs * gpu.multiprocessors)
