"""MAE's masking: which tokens stay, taking them out, putting them back. Only bytes count here.

`_mask` finds the rank of each token's noise by counting the tokens that come before it: no sort, no second argsort, and
ties are ordered by index because the count says so. A row of up to WHOLE_ROW tokens is one program, which loads its
noise once and holds it as row and as column; longer rows are cut, and each program passes over all of their noise.

`_keep` copies rows that are named, adding their position, and `_restore` is its inverse: each row of the result is a
prefix, a kept row or the mask token. Their gradients also go by rows of the result, so that each is written once:
`_keep_bwd` looks every token up in ids_keep and writes its gradient or zeros, with no memset and no scatter;
`_restore_bwd` reads the gradient once in the order of memory, stores the kept rows in their places and adds up the
masked ones. Its programs leave partial sums, which torch adds in a fixed order, so no atomics and always the same bits.

    bytes        random_masking B·L·(s + 20): noise in; ids, ids_restore and mask out
                 keep_tokens    B·M·(2·D·s + 8) + L·D·s; backward B·D·s·(M + L) + 8·B·M
                 restore_tokens B·D·s·(2·prefix + M + L) + 8·B·L + (prefix + L)·D·s; backward the same without the
                                last term, and parts·D·8 for partial sums, under 3 % of it in MAE at B = 256
                 Positions, the mask token and the ids that a row of a batch looks up are read by many programs and
                 come from the L2 cache: memory sees them once. benchmarks/model.py counts all this exactly.
    operations   random_masking B·L² compares, the others a few for each element
    limit        memory: B = 256, D = 768 in 16 bits take 39 MB forward and 96 MB backward

Why the tiles are as they are: by its data sheet (bandwidth times latency, over the multiprocessors) a card needs 10 to
40 kB under way on each. 4 warps ask for 4 kB at once, 32 bytes a thread in words of 16, and at 64 registers a thread 8
such programs fit side by side. A tile is TOKENS rows by COLUMNS values, half a kilobyte of a row where the row is so
long: one word for each thread of a warp. A row of a multiple of 16 values, as in every ViT, has no ragged end, which is
what lets the compiler use such words. `_restore` takes the same tokens of several samples, as many as leave 8 programs
a multiprocessor, so that positions are not read again for each: that would be 0.8 times the bytes from memory, and the
L2 cache is not that much faster.

Ids are not checked here: reading one on the host would stop it until the GPU is done. An id outside its range is taken
as a row of zeros (in ids_restore as a mask token), or finds no place; nothing outside the tensors is read or written.
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
    card,
    move_tile,
    places,
    power_of_2,
    rows,
    search_block,
    splits,
    wide,
)

WHOLE_ROW = 512  # the longest row that one program ranks

# {architecture: warps of a program}. A batch is two programs a multiprocessor, so what counts is how soon one is done.
MASK = dict.fromkeys(ARCHITECTURES, 8) | {"gfx942": 4}  # a warp has 64 lanes there
# {architecture: warps of a program, bytes of the tile that it takes at a time}: keep_tokens both ways, restore_tokens
MOVE = dict.fromkeys(ARCHITECTURES, Launch(4, 4096)) | {"gfx942": Launch(4, 8192)}
# The same, and how many programs a multiprocessor gets: as many as fit beside each other, since each leaves a partial
# sum behind and none should wait for another's end.
SUM = {
    "sm_80": (Launch(4, 8192), 4),
    "sm_90": (Launch(4, 8192), 4),
    "sm_100": (Launch(4, 8192), 5),
    "sm_120": (Launch(4, 8192), 4),
    "gfx942": (Launch(4, 8192), 2),
}


@triton.jit
def _order(noise):
    """Integers that are ordered as the noise is: −0.0 equals 0.0, and every NaN comes after +∞."""
    if noise.dtype == tl.float64:
        bits = noise.to(tl.int64, bitcast=True)
        size = bits & 0x7FFFFFFFFFFFFFFF
        order = tl.where(size > 0x7FF0000000000000, 0x7FFFFFFFFFFFFFFF, tl.where(bits < 0, -size, size))
    else:
        bits = noise.to(tl.float32).to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        order = tl.where(size > 0x7F800000, 0x7FFFFFFF, tl.where(bits < 0, -size, size))
    return order


@triton.jit
def _count_before(others, other, own, token):
    """How many of `others` come before each of `own`; equal noise is ordered by index."""
    earlier = other[:, None] < token[None, :]
    before = (others[:, None] < own[None, :]) | ((others[:, None] == own[None, :]) & earlier)
    return tl.sum(before.to(tl.int32), 0)


@triton.jit
def _mask(
    noise_ptr,
    keep_ptr,
    masked_ptr,
    restore_ptr,
    mask_ptr,
    L,
    keep,
    blocks,
    noise_b,
    noise_l,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Ranks of BLOCK tokens of one row. Beyond the row's end all is NaN, which comes before nothing."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    in_l = token < L
    row = noise_ptr + sample * noise_b
    own = _order(tl.load(row + token.to(tl.int64) * noise_l, mask=in_l, other=float("nan")))
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, L, OTHERS):
        other = start + tl.arange(0, OTHERS)
        if WHOLE:  # the program holds all of the row: cut the part out of it
            chunk = tl.arange(0, BLOCK // OTHERS)[:, None] * OTHERS
            others = tl.sum(tl.where(chunk == start, tl.reshape(own, [BLOCK // OTHERS, OTHERS]), 0), 0)
        else:
            others = _order(tl.load(row + other.to(tl.int64) * noise_l, mask=other < L, other=float("nan")))
        rank += _count_before(others, other, own, token)
    at = sample * L + token
    tl.store(restore_ptr + at, rank.to(tl.int64), mask=in_l)
    tl.store(mask_ptr + at, (rank >= keep).to(tl.float32), mask=in_l)
    tl.store(keep_ptr + sample * keep + rank, token.to(tl.int64), mask=in_l & (rank < keep))
    tl.store(masked_ptr + sample * (L - keep) + (rank - keep), token.to(tl.int64), mask=in_l & (rank >= keep))


@triton.jit
def _keep(
    x_ptr,
    ids_ptr,
    pos_ptr,
    out_ptr,
    L,
    M,
    D,
    blocks,
    x_b,
    x_l,
    ids_b,
    ids_m,
    pos_l,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    in_m = place < M
    token = tl.load(ids_ptr + sample * ids_b + place.to(tl.int64) * ids_m, mask=in_m, other=-1)
    exists = ((token >= 0) & (token < L))[:, None]
    x_row, out_row = x_ptr + sample * x_b + token[:, None] * x_l, out_ptr + (sample * M + place)[:, None] * D
    for start in range(0, D, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        kept = tl.load(x_row + column, mask=exists & (column < D), other=0.0)
        if pos_ptr is not None:
            pos = tl.load(pos_ptr + token[:, None] * pos_l + column, mask=exists & (column < D), other=0.0)
            kept = kept.to(WIDE) + pos.to(WIDE)
        tl.store(out_row + column, kept, mask=in_m[:, None] & (column < D))


@triton.jit
def _keep_bwd(
    dkept_ptr,
    ids_ptr,
    dx_ptr,
    L,
    M,
    D,
    blocks,
    dkept_b,
    dkept_m,
    ids_b,
    ids_m,
    BLOCK_M: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """TOKENS whole rows of dx: the search in ids is made once for them, and serves all columns."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    place = places(ids_ptr + sample * ids_b, ids_m, M, token, BLOCK_M)[:, None].to(tl.int64)
    dkept = dkept_ptr + sample * dkept_b + place * dkept_m
    dx = dx_ptr + (sample * L + token)[:, None] * D
    for start in range(0, D, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        inside = (token < L)[:, None] & (column < D)
        tl.store(dx + column, tl.load(dkept + column, mask=inside & (place >= 0), other=0.0), mask=inside)


@triton.jit
def _restore(
    x_ptr,
    mask_token_ptr,
    ids_ptr,
    pos_ptr,
    out_ptr,
    B,
    L,
    D,
    prefix,
    kept,
    each,
    blocks,
    x_b,
    x_m,
    ids_b,
    ids_l,
    pos_l,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The same TOKENS of `each` samples: mask token and positions are read once for all of them."""
    part = tl.program_id(0) // blocks
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)  # of the prefix + L
    for start in range(0, D, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        inside = (token < prefix + L)[:, None] & (column < D)
        mask_token = tl.load(mask_token_ptr + column, mask=column < D, other=0.0).to(WIDE)
        if pos_ptr is not None:
            pos = pos_ptr + token.to(tl.int64)[:, None] * pos_l + column
            pos = tl.load(pos, mask=inside, other=0.0).to(WIDE)
        for b in range(part * each, tl.minimum((part + 1) * each, B)):
            sample = tl.cast(b, tl.int64)
            source, is_given = _source(ids_ptr + sample * ids_b, token, ids_l, L, prefix, kept)
            x = x_ptr + sample * x_b + source[:, None] * x_m + column
            x = tl.load(x, mask=inside & is_given[:, None], other=0.0).to(WIDE)
            out = tl.where(is_given[:, None], x, mask_token)
            if pos_ptr is not None:
                out += pos
            tl.store(out_ptr + (sample * (prefix + L) + token)[:, None] * D + column, out, mask=inside)


@triton.jit
def _source(ids_ptr, token, ids_l, L, prefix, kept):
    """Of each of the prefix + L tokens: which row of x it is, and whether it is one at all or a mask token."""
    first = token < prefix
    among = (token >= prefix) & (token < prefix + L)
    rank = tl.load(ids_ptr + (token - prefix).to(tl.int64) * ids_l, mask=among, other=0)
    return tl.where(first, token.to(tl.int64), prefix + rank), first | ((rank >= 0) & (rank < kept))


@triton.jit
def _restore_bwd(
    dout_ptr,
    ids_ptr,
    dx_ptr,
    partial_ptr,
    L,
    D,
    prefix,
    kept,
    tiles,
    each,
    blocks,
    dout_b,
    dout_l,
    ids_b,
    ids_l,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`each` tiles of TOKENS tokens of a sample, one after the other; the sum stays in registers until the last."""
    part = tl.program_id(1)
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    total = tl.zeros([TOKENS, COLUMNS], WIDE)
    for tile in range(part * each, tl.minimum((part + 1) * each, tiles)):
        sample = (tile // blocks).to(tl.int64)
        token = tile % blocks * TOKENS + tl.arange(0, TOKENS)  # of the prefix + L
        source, is_given = _source(ids_ptr + sample * ids_b, token, ids_l, L, prefix, kept)
        inside = (token < prefix + L)[:, None] & (column < D)
        dout = tl.load(
            dout_ptr + sample * dout_b + token.to(tl.int64)[:, None] * dout_l + column, mask=inside, other=0.0
        )
        dx = dx_ptr + (sample * (prefix + kept) + source)[:, None] * D + column
        tl.store(dx, dout, mask=inside & is_given[:, None])
        total += tl.where(is_given[:, None], 0.0, dout.to(WIDE))
    partial = partial_ptr + part.to(tl.int64) * D + column
    tl.store(partial, tl.sum(total, 0)[None, :], mask=column < D)


def random_masking(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, L = noise.shape
    ids_keep, ids_masked = (noise.new_empty(B, count, dtype=torch.int64) for count in (keep, L - keep))
    ids_restore, mask = (noise.new_empty(B, L, dtype=dtype) for dtype in (torch.int64, torch.float32))
    if B:
        block, blocks = mask_tile(L)
        _mask[(B * blocks,)](
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
            OTHERS=min(32, block),
            num_warps=MASK[card(noise).arch],
        )
    return ids_keep, ids_masked, ids_restore, mask


def keep_tokens_fwd(x: Tensor, ids_keep: Tensor, pos: Tensor | None) -> Tensor:
    (B, L, D), M = x.shape, ids_keep.shape[1]
    out = x.new_empty(B, M, D, dtype=x.dtype if pos is None else torch.promote_types(x.dtype, pos.dtype))
    if out.numel():
        x, pos, launch = rows(x), None if pos is None else rows(pos), MOVE[card(x).arch]
        tokens, columns = move_tile(M, D, x.element_size(), launch.bytes)
        blocks = triton.cdiv(M, tokens)
        _keep[(B * blocks,)](
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
            WIDE=TRITON_DTYPES[wide(out.dtype)],
            TOKENS=tokens,
            COLUMNS=columns,
            num_warps=launch.warps,
        )
    return out


def keep_tokens_bwd(dkept: Tensor, ids_keep: Tensor, length: int) -> Tensor:
    B, M, D = dkept.shape
    dx = dkept.new_empty(B, length, D)
    if dx.numel():
        dkept, launch = rows(dkept), MOVE[card(dkept).arch]
        tokens, columns = move_tile(length, D, dkept.element_size(), launch.bytes)
        blocks = triton.cdiv(length, tokens)
        _keep_bwd[(B * blocks,)](
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
    (B, given, D), L = x.shape, ids_restore.shape[1]
    dtype = torch.promote_types(x.dtype, mask_token.dtype)
    out = x.new_empty(B, prefix + L, D, dtype=dtype if pos is None else torch.promote_types(dtype, pos.dtype))
    if out.numel():
        x, mask_token, pos, on = rows(x), rows(mask_token), None if pos is None else rows(pos), card(x)
        (tokens, columns), blocks, parts, each = restore_tile(B, prefix + L, D, x.element_size(), on)
        _restore[(parts * blocks,)](
            x,
            mask_token,
            ids_restore,
            pos,
            out,
            B,
            L,
            D,
            prefix,
            given - prefix,
            each,
            blocks,
            *x.stride()[:2],
            *ids_restore.stride(),
            0 if pos is None else pos.stride(0),
            WIDE=TRITON_DTYPES[wide(out.dtype)],
            TOKENS=tokens,
            COLUMNS=columns,
            num_warps=MOVE[on.arch].warps,
        )
    return out


def restore_tokens_bwd(dout: Tensor, ids_restore: Tensor, prefix: int, kept: int) -> tuple[Tensor, Tensor]:
    (B, _, D), L, dtype = dout.shape, ids_restore.shape[1], wide(dout.dtype)
    dx = dout.new_empty(B, prefix + kept, D)
    if not dout.numel():
        return dx, dout.new_zeros(D, dtype=dtype)
    dout, on = rows(dout), card(dout)
    (tokens, columns), blocks, parts, each = sum_tile(B, prefix + L, D, dout.element_size(), on)
    partial = dout.new_empty(parts, D, dtype=dtype)
    _restore_bwd[(triton.cdiv(D, columns), parts)](
        dout,
        ids_restore,
        dx,
        partial,
        L,
        D,
        prefix,
        kept,
        B * blocks,
        each,
        blocks,
        *dout.stride()[:2],
        *ids_restore.stride(),
        WIDE=TRITON_DTYPES[dtype],
        TOKENS=tokens,
        COLUMNS=columns,
        num_warps=SUM[on.arch][0].warps,
    )
    return dx, partial.sum(0)


def mask_tile(L: int) -> tuple[int, int]:
    """(tokens a program, programs a row)"""
    block = power_of_2(L) if L <= WHOLE_ROW else 256
    return block, triton.cdiv(L, block)


def restore_tile(B: int, tokens: int, D: int, size: int, on: Card) -> tuple[tuple[int, int], int, int, int]:
    """(the tile, tiles a sample, parts of the batch, samples a part)"""
    tile = move_tile(tokens, D, size, MOVE[on.arch].bytes)
    blocks = triton.cdiv(tokens, tile[0])
    return tile, blocks, *splits(blocks, B, 8 * on.multiprocessors)


def sum_tile(B: int, tokens: int, D: int, size: int, on: Card) -> tuple[tuple[int, int], int, int, int]:
    """(the tile, tiles a sample, parts, tiles a part) of the gradient of restore_tokens."""
    launch, programs = SUM[on.arch]
    tile = move_tile(tokens, D, size, launch.bytes)
    blocks = triton.cdiv(tokens, tile[0])
    return tile, blocks, *splits(triton.cdiv(D, tile[1]), B * blocks, programs * on.multiprocessors)
