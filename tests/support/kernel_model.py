"""Bytes moved and operations of the GPU kernels, as formulas that tests compare with counts of Triton's interpreter.

One function for each launcher, by shapes and bytes of an element. Where a count depends on how a kernel is cut into
programs, the plan comes from the kernel's file. `acc` is the bytes of a number in which a kernel sums.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fastssl.kernels import (
    attention,
    attention_bias,
    bank,
    batchnorm,
    contrastive,
    crops,
    gelu,
    masking,
    norm,
    pairwise,
    patches,
    prototypes,
    queue,
    tile,
)
from fastssl.kernels.tile import CARDS


class Moved(NamedTuple):
    """Bytes and operations of an op."""

    requested: int  # bytes that all programs load and store
    # Bytes between memory and the GPU, including torch's sum of partial results. Tensors that many programs read
    # (positions, mask token, ids that are searched) count once, since they stay in the L2 cache.
    moved: int
    least: int  # bytes that any implementation must read and write
    operations: int = 0  # of matrix products, in whole tiles


def random_masking(B: int, L: int, noise_bytes: int) -> Moved:
    """Reads the noise; writes int64 ids (kept and masked together), ids_restore and a float32 mask."""
    _, blocks = masking.mask_tile(L)
    passes = 1 if L <= masking.WHOLE_ROW else 1 + blocks
    least = B * L * (noise_bytes + 20)
    return Moved(least + (passes - 1) * B * L * noise_bytes, least, least)


def keep_tokens_fwd(B: int, L: int, M: int, D: int, x_bytes: int, pos_bytes: int = 0) -> Moved:
    """Reads kept rows, ids and positions; writes kept rows in the wider of the two dtypes."""
    rows = B * M * (D * (x_bytes + max(x_bytes, pos_bytes)) + 8)
    least = rows + min(B * M, L) * D * pos_bytes
    return Moved(rows + B * M * D * pos_bytes, least, least)


def keep_tokens_bwd(B: int, L: int, M: int, D: int, size: int, arch: str = "sm_90") -> Moved:
    """Reads kept rows, writes all rows; each block of tokens searches all ids of its sample."""
    tokens, _ = tile.move_tile(L, D, size, masking.MOVE[arch].bytes)
    rows, ids = B * (M + L) * D * size, 8 * B * M
    return Moved(rows + ids * math.ceil(L / tokens), rows + ids, rows + ids)


def restore_tokens_fwd(
    B: int, L: int, M: int, D: int, prefix: int, x_bytes: int, token_bytes: int, pos_bytes: int = 0, arch: str = "sm_90"
) -> Moved:
    """Reads prefix and kept rows, ids, mask token and positions; writes prefix + L rows in the widest dtype."""
    (_, columns), blocks, parts, _ = masking.restore_tile(B, prefix + L, D, x_bytes, CARDS[arch])
    rows = B * D * ((prefix + M) * x_bytes + (prefix + L) * max(x_bytes, token_bytes, pos_bytes))
    ids, token, pos = 8 * B * L, D * token_bytes, (prefix + L) * D * pos_bytes
    requested = rows + ids * math.ceil(D / columns) + parts * (blocks * token + pos)
    return Moved(requested, *[rows + ids + token + pos] * 2)


def restore_tokens_bwd(B: int, L: int, M: int, D: int, prefix: int, size: int, arch: str = "sm_90") -> Moved:
    """Reads all rows; writes prefix and kept rows, and the sum of the masked rows: one partial sum per program."""
    (_, columns), _, parts, _ = masking.sum_tile(B, prefix + L, D, size, CARDS[arch])
    rows, ids, result = B * (2 * prefix + L + M) * D * size, 8 * B * L, D * max(4, size)
    requested = rows + ids * math.ceil(D / columns) + parts * result
    return Moved(requested, rows + ids + (2 * parts + 1) * result, rows + ids + result)


def patchify(B: int, L: int, P: int, size: int) -> Moved:
    """Reads and writes every pixel; `unpatchify` too."""
    return Moved(*[2 * B * L * P * size] * 3)


def keep_patches_fwd(B: int, M: int, P: int, size: int) -> Moved:
    """Reads and writes the kept pixels, and reads their ids."""
    return Moved(*[B * M * (2 * P * size + 8)] * 3)


def keep_patches_bwd(B: int, L: int, M: int, P: int, size: int, patch: int, arch: str = "sm_90") -> Moved:
    """Reads the kept pixels, writes all pixels; each block of patches searches all ids of its sample."""
    shared, _, _ = patches.patch_tile(L, patch, P // patch**2, patches.MOVE[arch].bytes // size)
    pixels, ids = B * (M + L) * P * size, 8 * B * M
    return Moved(pixels + ids * math.ceil(L / shared), pixels + ids, pixels + ids)


def masked_patch_mse_fwd(
    B: int, M: int, P: int, pred_bytes: int, image_bytes: int, patch: int, norm_pix: bool, arch: str = "sm_90"
) -> Moved:
    """Reads predictions and pixels; writes the gradient, and a partial sum per program.

    A patch that is larger than a tile is read four times for norm_pix: once from memory, then from the L2 cache.
    """
    acc, C = max(4, pred_bytes), P // patch**2
    (shared, pixels, channels), _ = patches.loss_tile(M, patch, C, acc, patches.LOSS[arch])
    repeated_reads = 3 if norm_pix and (pixels < patch**2 or channels < C) else 0
    partial = B * math.ceil(M / shared) * acc
    least = B * M * (P * (pred_bytes + image_bytes + acc) + 8)
    return Moved(least + repeated_reads * B * M * P * image_bytes + partial, least + 2 * partial + acc, least + acc)


def enqueue_(K: int, D: int, N: int, queue_bytes: int, key_bytes: int, arch: str = "sm_90") -> Moved:
    """Reads keys and writes as many rows; every program reads the pointer, which is then moved."""
    kept = min(N, K)
    count, _ = tile.move_tile(kept, D, key_bytes, queue.ENQUEUE[arch].bytes)
    rows = kept * D * (queue_bytes + key_bytes)
    return Moved(rows + 8 * math.ceil(kept / count) + 16, rows + 24, rows + 16)


def block_mask(B: int, L: int) -> Moved:
    """Reads a seed and a count for each sample, writes a byte for each patch."""
    return Moved(*[B * (16 + L)] * 3)


def ema_update_(parameters: int, source_bytes: int, shadow_bytes: int = 0) -> Moved:
    """Reads and writes a float32 target, reads a source, writes a shadow."""
    return Moved(*[parameters * (8 + source_bytes + shadow_bytes)] * 3)


def residual_norm_fwd(
    N: int, D: int, x_bytes: int, delta_bytes: int, normed_bytes: int, weight_bytes: int = 4
) -> Moved:
    """Reads x and delta; writes their sum, the normalised rows and two moments per row. Without a delta no sum."""
    rows, _, _ = norm.norm_tile(D, norm.NORM["sm_90"])
    values = N * D * (x_bytes + (x_bytes + delta_bytes if delta_bytes else 0) + normed_bytes)
    least, affine = values + 2 * N * max(4, x_bytes) + 2 * D * weight_bytes, 2 * D * weight_bytes
    return Moved(least + (math.ceil(N / rows) - 1) * affine, least, least)


def residual_norm_bwd(
    N: int,
    D: int,
    x_bytes: int,
    delta_bytes: int,
    normed_bytes: int,
    weight_bytes: int = 4,
    arch: str = "sm_90",
    multiprocessors: int | None = None,
) -> Moved:
    """Reads the gradients of both results and the sum; writes the gradients of x and, if its dtype differs, of delta,
    and partial sums of those of weight and bias. Without a delta there is no gradient of the sum or of delta."""
    rows, _, _ = norm.norm_tile(D, norm.NORM[arch])
    programs = norm.norm_programs(N, rows, multiprocessors or CARDS[arch].multiprocessors)
    acc = max(4, x_bytes)
    values = N * D * (normed_bytes + 2 * x_bytes + (x_bytes + delta_bytes if delta_bytes else 0))
    least, partial = values + 2 * N * acc + D * (weight_bytes + 2 * acc), programs * 2 * D * acc
    requested = values + 2 * N * acc + programs * D * weight_bytes + partial
    return Moved(requested, least + 2 * partial, least)


def augment_(values: int, blurred: int) -> Moved:
    """Reads bytes for means and for the steps and writes them, with the copy in place; `blurred` values are float32
    between the passes along rows and columns. `values` counts all channels of all images."""
    moved = 3 * values + (values - blurred) + blurred * (4 + 8 + 5)
    return Moved(moved, moved, 2 * values)


def resized_crops_(windows: Sequence[tuple[int, int]], size: tuple[int, int], kernel: int) -> Moved:
    """Reads RGB windows (height, width), writes and reads the scratch memory between the passes, and writes crops.

    Each value is loaded once for each weight that reaches it, from the caches.
    """
    height, width = size
    source = sum(3 * rows * columns for rows, columns in windows)
    between, result = sum(3 * rows * width for rows, _ in windows), 3 * len(windows) * height * width
    requested = between + result
    for rows, columns in windows:
        across, down = (crops.taps(length, out, kernel) for length, out in ((columns, width), (rows, height)))
        requested += 3 * (rows * width * across + height * width * down)
    return Moved(requested, source + 2 * between + result, source + result)


def normalise(values: int, size: int) -> Moved:
    """Reads bytes, writes floats."""
    return Moved(*[values * (1 + size)] * 3)


def bias_gelu_fwd(M: int, K: int, size: int, bias_bytes: int = 4, arch: str = "sm_90") -> Moved:
    """Reads x and the bias, writes the result."""
    rows, _ = gelu.gelu_tile(K, size, gelu.GELU[arch])
    values, bias = 2 * M * K * size, K * bias_bytes
    return Moved(values + math.ceil(M / rows) * bias, values + bias, values + bias)


def bias_gelu_bwd(
    M: int, K: int, size: int, bias_bytes: int = 4, arch: str = "sm_90", multiprocessors: int | None = None
) -> Moved:
    """Reads the gradient of the result, x and the bias; writes the gradient of x and partial sums of the bias's."""
    tile, acc = gelu.gelu_tile(K, size, gelu.GELU[arch]), max(4, size)
    programs = gelu.gelu_programs(M, K, tile, multiprocessors or CARDS[arch].multiprocessors)
    values, bias, partial = 3 * M * K * size, K * bias_bytes, programs * K * acc
    least = values + bias + K * acc
    return Moved(values + programs * bias + partial, least + 2 * partial, least)


def _batch_norm(R: int, C: int, size: int, splits: int, arch: str, multiprocessors: int | None):
    """(bytes of the values, of a vector for each program of a first pass, of a vector for each block of rows)"""
    acc = max(4, size)
    tile = batchnorm.batch_norm_tile(C, acc, batchnorm.BATCH_NORM[arch])
    programs = batchnorm.batch_norm_programs(
        R // splits, C, splits, tile, multiprocessors or CARDS[arch].multiprocessors
    )
    return R * C * size, splits * programs * C * acc, splits * math.ceil(R / splits / tile[0]) * C * acc


def batch_norm_fwd(
    R: int,
    C: int,
    size: int,
    splits: int = 1,
    residual: bool = False,
    arch: str = "sm_90",
    multiprocessors: int | None = None,
) -> Moved:
    """Reads x twice and the residual, writes the result, and partial moments, which are read again and merged."""
    values, partial, per_block = _batch_norm(R, C, size, splits, arch, multiprocessors)
    moments, affine = 3 * splits * C * max(4, size), 2 * C * max(4, size)
    whole = (3 + residual) * values
    first = (partial // max(4, size) + splits * C) * size  # rows from which differences are taken
    return Moved(
        whole + first + 4 * partial + moments + 4 * per_block,
        whole + 4 * partial + moments + affine,
        (2 + residual) * values + moments + affine,
    )


def batch_norm_bwd(
    R: int,
    C: int,
    size: int,
    splits: int = 1,
    residual: bool = False,
    arch: str = "sm_90",
    multiprocessors: int | None = None,
) -> Moved:
    """Reads the gradient and x twice, with a residual also the result; writes the gradients and partial sums."""
    values, partial, per_block = _batch_norm(R, C, size, splits, arch, multiprocessors)
    vectors = 4 * splits * C * max(4, size)
    whole = (5 + 3 * residual) * values
    return Moved(
        whole + (2 + 4) * partial + 6 * per_block, whole + 4 * partial + vectors, (3 + 2 * residual) * values + vectors
    )


def info_nce_fwd(B: int, K: int, D: int, size: int, grad: bool = True, arch: str = "sm_90") -> Moved:
    """Reads queries, keys and queue; writes loss, rank, gradient, and partial results for each part of the queue."""
    acc, plan = max(4, size), contrastive.plan(B, K, D, size, CARDS[arch])
    (blocks, parts, columns), tiles = plan.grid, math.ceil(K / plan.block_k)
    programs, chunk = blocks * parts * columns, plan.chunk or plan.block_d
    depth = math.ceil(D / chunk) * chunk
    stream = programs * acc + parts * columns * B * 2 * D * size  # temperature, and the positive's logit
    stream += tiles * columns * B * D * size if plan.chunk else parts * B * D * size  # the queries
    stream += blocks * K * D * size * ((columns + grad) if plan.chunk else 1)  # the queue
    partial = parts * B * (2 * acc + 4 + grad * D * acc)
    merge = B * (acc + 2 * D * size + parts * (3 * acc + 4) + 2 * acc + 8)
    merge += grad * B * (math.ceil(D / min(128, plan.block_d)) * parts * acc + parts * D * acc + D * (size + acc))
    least = K * D * size + 2 * B * D * size + B * (2 * acc + 8 + grad * D * acc)
    operations = 2 * tiles * columns * blocks * plan.block_b * plan.block_k * (depth + grad * plan.block_d)
    return Moved(stream + partial + merge, least + 2 * partial, least, operations)


def batch_info_nce_fwd(B: int, M: int, D: int, size: int, grad: bool = True, arch: str = "sm_90") -> Moved:
    """`info_nce_fwd` with the positives among the keys."""
    requested, moved, least, operations = info_nce_fwd(B, M, D, size, grad, arch)
    return Moved(requested, moved - B * D * size, least - B * D * size, operations)


def nt_xent_fwd(rows: int, D: int, size: int, arch: str = "sm_90") -> Moved:
    """`info_nce_fwd` with queries, keys and positives in one tensor."""
    requested, moved, least, operations = info_nce_fwd(rows, rows, D, size, False, arch)
    return Moved(requested, moved - 2 * rows * D * size, least - 2 * rows * D * size, operations)


def batch_info_nce_dkeys(B: int, M: int, D: int, size: int, arch: str = "sm_90") -> Moved:
    """Reads queries and keys, with log-sum-exp and gradient of each query's loss; writes the gradient of the keys."""
    return _info_nce_bwd(M, B, D, size, False, arch)


def nt_xent_bwd(rows: int, D: int, size: int, arch: str = "sm_90") -> Moved:
    """`batch_info_nce_dkeys` with every row both a query and a key."""
    return _info_nce_bwd(rows, rows, D, size, True, arch)


def _info_nce_bwd(R: int, C: int, D: int, size: int, both: bool, arch: str) -> Moved:
    acc, plan = max(4, size), contrastive.plan(R, C, D, size, CARDS[arch])
    (blocks, parts, columns), tiles = plan.grid, math.ceil(C / plan.block_k)
    depth = math.ceil(D / (plan.chunk or plan.block_d)) * (plan.chunk or plan.block_d)
    requested = blocks * columns * (parts + C) * 2 * acc  # numbers, and each row's sum and gradient
    requested += both * parts * columns * R * 2 * acc
    requested += tiles * columns * R * D * size if plan.chunk else parts * R * D * size
    requested += blocks * C * D * size * ((columns + 1) if plan.chunk else 1)
    least = (R + C * (not both)) * D * size + 2 * C * acc + R * D * acc
    operations = 2 * tiles * columns * blocks * plan.block_b * plan.block_k * (depth + plan.block_d)
    partial = parts * R * D * acc
    return Moved(requested + partial, least + (2 * partial if parts > 1 else 0), least, operations)


def pairwise_sigmoid_fwd(B: int, M: int, D: int, size: int, grad: bool = True, arch: str = "sm_90") -> Moved:
    """Reads queries and keys; writes the loss, and with `grad` both gradients, by one launch for each side. torch then
    scales the sums of a side, and multiplies those of the queries with these for the gradient of the scale."""
    acc = max(4, size)
    sides = ((B, M, True), (M, B, False)) if grad else ((B, M, True),)
    requested = operations = 0
    least = (B + M) * D * size + grad * (B + M) * D * acc
    moved = least + grad * B * D * (size + (3 if size == acc else 5) * acc)
    for R, C, with_loss in sides:
        plan = contrastive.plan(R, C, D, size, CARDS[arch], pairwise.PAIR_TILES)
        (blocks, parts, columns), tiles = plan.grid, math.ceil(C / plan.block_k)
        depth = math.ceil(D / (plan.chunk or plan.block_d)) * (plan.chunk or plan.block_d)
        requested += blocks * parts * columns * 2 * acc  # scale and bias
        requested += (tiles * columns if plan.chunk else parts) * R * D * size
        requested += blocks * C * D * size * ((columns + grad) if plan.chunk else 1)
        losses, sums = with_loss * parts * R * 2 * acc, grad * R * D * acc
        requested += losses + parts * sums
        moved += 2 * losses + 2 * sums + (2 * parts * sums if parts > 1 else 0)
        operations += 2 * tiles * columns * blocks * plan.block_b * plan.block_k * (depth + grad * plan.block_d)
    return Moved(requested, moved, least, operations)


def attention_fwd(B: int, L: int, H: int, E: int, size: int, arch: str = "sm_90", bias: bool = False) -> Moved:
    """Reads q, k and v; writes the result and the log-sum-exp of each row."""
    plan = attention.forward_plan(L, E, size, arch, bias)
    width, blocks, acc = plan.block_e, math.ceil(L / plan.block_l), max(4, size)
    least = B * H * (4 * L * E * size + L * acc)
    repeated_reads = B * H * (blocks - 1) * 2 * L * E * size
    operations = 4 * B * H * blocks * plan.block_l * math.ceil(L / plan.block_m) * plan.block_m * width
    return Moved(least + repeated_reads, least, least, operations)


def attention_bwd(B: int, L: int, H: int, E: int, size: int, arch: str = "sm_90", bias: bool = False) -> Moved:
    """Reads q, k, v, the result, its gradient and the log-sum-exp; writes three gradients."""
    per_head, block_l, block_m, width, _, _ = attention.backward_plan(L, L, E, size, arch, bias)
    acc, tensor = max(4, size), L * E * size
    least = B * H * (8 * tensor + L * acc)
    if per_head:
        return Moved(least, least, least, 10 * B * H * block_l * math.ceil(L / block_m) * block_m * width)
    blocks = math.ceil(L / block_l)
    requested = B * H * (blocks * (3 * tensor + L * acc) + 3 * tensor + L * acc + blocks * 2 * tensor + 5 * tensor)
    return Moved(requested, least, least, 14 * B * H * (blocks * block_l) ** 2 * width)


def attention_bias_fwd(B: int, L: int, H: int, E: int, size: int, bias_size: int, arch: str = "sm_90") -> Moved:
    """The same, and a bias [H, L, L] of elements of `bias_size` bytes, read again for each sample."""
    plain, bias = attention_fwd(B, L, H, E, size, arch, True), H * L * L * bias_size
    return Moved(plain.requested + B * bias, plain.moved + bias, plain.least + bias, plain.operations)


def attention_bias_bwd(B: int, L: int, H: int, E: int, size: int, bias_size: int, arch: str = "sm_90") -> Moved:
    """The same with the bias, and a second pass over all tensors for its gradient, by tiles and parts of the batch."""
    plain, bias = attention_bwd(B, L, H, E, size, arch, True), H * L * L * bias_size
    per_head = attention.backward_plan(L, L, E, size, arch).per_head
    plan = attention_bias.bias_gradient_plan(B, L, L, H, E, size, True)
    tiles, parts, acc, tensors = (
        math.ceil(L / plan.block),
        math.ceil(B / plan.samples),
        max(4, size),
        B * H * L * E * size,
    )
    written = bias if parts == 1 else parts * H * L * L * acc
    requested = plain.requested + (2 if per_head else 3) * B * bias + tiles * (5 * tensors + B * H * L * acc) + written
    moved = plain.moved + bias + 5 * tensors + B * H * L * acc + (written if parts == 1 else 2 * written + bias)
    operations = plain.operations + 4 * B * H * (tiles * plan.block) ** 2 * plan.block_e
    return Moved(requested, moved, plain.least + 2 * bias, operations)


def prototype_lse(N: int, P: int, D: int, size: int, offset: bool, arch: str = "sm_90") -> Moved:
    """Reads features and prototypes; writes the largest logit and a sum for each row and part of the prototypes."""
    return _prototypes_fwd(N, P, D, 0, size, False, offset, arch)


def linear_cross_entropy_fwd(N: int, P: int, D: int, size: int, arch: str = "sm_90") -> Moved:
    """`prototype_lse` with a target for each row, and two more numbers."""
    return _prototypes_fwd(N, P, D, 0, size, True, False, arch)


def soft_cross_entropy_fwd(
    N: int, P: int, D: int, E: int, size: int, teachers: int = 1, M: int | None = None, arch: str = "sm_90"
) -> Moved:
    """The same for each pair of a student and one of its teachers, whose row and prototypes are read too."""
    pairs, M = N * teachers, M or N
    acc, blocks, parts, _, tiles, plan = _prototypes_plan(pairs, P, max(D, E), D, size, prototypes.forward_plan, arch)
    student = _prototypes_fwd(pairs, P, D, E, size, True, True, arch)
    per_row, per_key = (tiles if plan.chunk else parts) * pairs, blocks * P
    requested = student.requested + (per_row + per_key) * E * size + parts * pairs * acc + blocks * parts * acc
    depth = _depth(E, plan)
    operations = student.operations + 2 * tiles * blocks * plan.block_b * plan.block_k * depth
    least = ((N + P) * D + (M + P) * E) * size + (M + P) * acc + 8 * pairs + 4 * N * acc
    return Moved(requested, least + 2 * parts * pairs * 4 * acc, least, operations)


def soft_cross_entropy_bwd(
    N: int, P: int, D: int, E: int, size: int, of_weight: bool, teachers: int = 1, M: int | None = None,
    arch: str = "sm_90",
) -> Moved:  # fmt: skip
    """Reads all matrices, and numbers of each pair; writes one gradient, as partial sums where the loop is cut."""
    return _prototypes_bwd(N * teachers, N, P, (D, E), size, of_weight, M or N, arch)


def linear_cross_entropy_bwd(N: int, P: int, D: int, size: int, of_weight: bool, arch: str = "sm_90") -> Moved:
    """The same with a target for each row."""
    return _prototypes_bwd(N, N, P, (D, 0), size, of_weight, 0, arch)


def _prototypes_plan(rows, others, width, D, size, planned, arch):
    acc, plan = max(4, size), planned(rows, others, width, size, CARDS[arch])
    columns = math.ceil(D / plan.block_d)
    return acc, plan.grid[0], plan.grid[1], columns, math.ceil(others / plan.block_k), plan


def _depth(width: int, plan) -> int:
    chunk = plan.chunk or plan.block_d
    return math.ceil(width / chunk) * chunk


def _prototypes_fwd(pairs: int, P: int, D: int, E: int, size: int, targets: bool, offset: bool, arch: str) -> Moved:
    acc, blocks, parts, _, tiles, plan = _prototypes_plan(pairs, P, max(D, E), D, size, prototypes.forward_plan, arch)
    requested = ((tiles if plan.chunk else parts) * pairs + blocks * P) * D * size + blocks * parts * acc
    requested += blocks * P * acc * offset + parts * pairs * ((4 * acc + 8) if targets else 2 * acc)
    least = (pairs + P) * D * size + P * acc * offset + pairs * (acc + targets * (8 + acc))
    operations = 2 * tiles * blocks * plan.block_b * plan.block_k * _depth(D, plan)
    return Moved(requested, least + 2 * parts * pairs * (4 if targets else 2) * acc, least, operations)


def _prototypes_bwd(
    pairs: int, N: int, P: int, widths: tuple[int, int], size: int, of_weight: bool, M: int, arch: str
) -> Moved:
    (D, E), soft = widths, M > 0
    rows, others = (P, pairs) if of_weight else (pairs, P)
    acc, blocks, parts, columns, tiles, plan = _prototypes_plan(
        rows, others, max(D, E), D, size, prototypes.backward_plan, arch
    )
    passes = {"row": parts * columns, "key": blocks * columns}  # how often the numbers of a row are read
    pair, key = ("key", "row") if of_weight else ("row", "key")
    requested = blocks * parts * columns * (2 + soft) * acc
    requested += passes[pair] * pairs * (8 + (4 + soft) * acc) + passes[key] * P * acc * soft
    per_row, per_key = (tiles * columns, blocks * columns) if plan.chunk else (parts, blocks)
    requested += (per_row * rows + per_key * others) * (D + E) * size + bool(plan.chunk) * blocks * others * D * size
    partial = parts * rows * D * acc
    least = ((N + P) * D + (M + P) * E) * size + (M + P) * acc * soft + pairs * (8 + 2 * acc) + 2 * N * acc
    least += (P if of_weight else N) * D * acc
    depth = _depth(D, plan) + _depth(E, plan) * soft + plan.block_d
    operations = 2 * tiles * columns * blocks * plan.block_b * plan.block_k * depth
    return Moved(requested + partial, least + (2 * partial if parts > 1 else 0), least, operations)


def sampled_fwd(
    B: int, m: int, D: int, q_size: int, size: int, grad: bool = True, nce: bool = False, arch: str = "sm_90"
) -> Moved:
    """Reads queries, sampled rows and their indices; writes loss, rank and gradient. The partial results of each
    query's parts are written and read once. Rows are counted as if each was drawn once."""
    acc, parts = max(4, q_size), bank.plan(B, 1 + m, D, size, CARDS[arch])[0]
    numbers = 2 * acc + 4 + nce * acc  # maximum, sum, rank, and the sum of logarithms
    partial = parts * B * (numbers + grad * D * acc)
    scalars = (1 + nce) * acc  # tau and shift
    least = B * ((1 + m) * (D * size + 8) + D * q_size + (1 + nce) * acc + 8 + grad * D * acc)
    # Every program reads the query and the positive, and the combination reads them again; maxima are read twice, and
    # for the softmax's gradient three times.
    again = parts * B * (D * (q_size + size) + 8)
    maxima = parts * B * acc * (1 + (grad and not nce))
    requested = least + 2 * partial + maxima + again + (parts + 1) * B * scalars
    return Moved(requested, least + 2 * partial, least, 0)


def update_bank_(B: int, D: int, bank_size: int, features_size: int) -> Moved:
    """Reads and writes B rows of the bank, and reads their features. Every program compares all indices."""
    least = B * (D * (2 * bank_size + features_size) + 8)
    return Moved(least + 8 * B * B, least, least)
