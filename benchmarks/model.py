"""How many bytes the GPU kernels move and how much they multiply: formulas, which the interpreter's counts confirm.

One function a launcher, by shapes and bytes of an element. Where the count depends on how a kernel is cut into
programs, it asks the kernel's own file for the cut that a card gets.
"""

import math
from typing import NamedTuple

from fastssl.kernels import attention, contrastive, masking, norm, patches, queue, tile
from fastssl.kernels.tile import CARDS


class Moved(NamedTuple):
    """Bytes."""

    requested: int  # that the programs load and store
    moved: int  # the same, but what many programs read (positions, mask token, ids that are searched) once: it stays
    # in the L2 cache; and with what torch reads and writes to add up partial sums
    least: int  # that any implementation must read and write
    operations: int = 0  # of products, in the tiles as they are computed


def random_masking(B: int, L: int, noise_bytes: int) -> Moved:
    """Noise in; int64 ids (kept and masked together) and ids_restore and a float32 mask out."""
    _, blocks = masking.mask_tile(L)
    passes = 1 if L <= masking.WHOLE_ROW else 1 + blocks
    least = B * L * (noise_bytes + 20)
    return Moved(least + (passes - 1) * B * L * noise_bytes, least, least)


def keep_tokens_fwd(B: int, L: int, M: int, D: int, x_bytes: int, pos_bytes: int = 0) -> Moved:
    """Kept rows in, with ids and positions; out in the wider of the two dtypes."""
    rows = B * M * (D * (x_bytes + max(x_bytes, pos_bytes)) + 8)
    least = rows + min(B * M, L) * D * pos_bytes
    return Moved(rows + B * M * D * pos_bytes, least, least)


def keep_tokens_bwd(B: int, L: int, M: int, D: int, size: int, arch: str = "sm_90") -> Moved:
    """Kept rows in, all rows out; each block of tokens searches all ids of its sample."""
    tokens, _ = tile.move_tile(L, D, size, masking.MOVE[arch].bytes)
    rows, ids = B * (M + L) * D * size, 8 * B * M
    return Moved(rows + ids * math.ceil(L / tokens), rows + ids, rows + ids)


def restore_tokens_fwd(
    B: int, L: int, M: int, D: int, prefix: int, x_bytes: int, token_bytes: int, pos_bytes: int = 0, arch: str = "sm_90"
) -> Moved:
    """Prefix and kept rows in, with ids, mask token and positions; prefix + L rows out in the widest dtype."""
    (_, columns), blocks, parts, _ = masking.restore_tile(B, prefix + L, D, x_bytes, CARDS[arch])
    rows = B * D * ((prefix + M) * x_bytes + (prefix + L) * max(x_bytes, token_bytes, pos_bytes))
    ids, token, pos = 8 * B * L, D * token_bytes, (prefix + L) * D * pos_bytes
    requested = rows + ids * math.ceil(D / columns) + parts * (blocks * token + pos)
    return Moved(requested, *[rows + ids + token + pos] * 2)


def restore_tokens_bwd(B: int, L: int, M: int, D: int, prefix: int, size: int, arch: str = "sm_90") -> Moved:
    """All rows in, prefix and kept rows out, and the sum of the others: one partial sum a program."""
    (_, columns), _, parts, _ = masking.sum_tile(B, prefix + L, D, size, CARDS[arch])
    rows, ids, result = B * (2 * prefix + L + M) * D * size, 8 * B * L, D * max(4, size)
    requested = rows + ids * math.ceil(D / columns) + parts * result
    return Moved(requested, rows + ids + (2 * parts + 1) * result, rows + ids + result)


def patchify(B: int, L: int, P: int, size: int) -> Moved:
    """Every pixel in and out: `unpatchify` too."""
    return Moved(*[2 * B * L * P * size] * 3)


def keep_patches_fwd(B: int, M: int, P: int, size: int) -> Moved:
    """Kept pixels in and out, and their ids."""
    return Moved(*[B * M * (2 * P * size + 8)] * 3)


def keep_patches_bwd(B: int, L: int, M: int, P: int, size: int, patch: int, arch: str = "sm_90") -> Moved:
    """Kept pixels in, all pixels out; each block of patches searches all ids of its sample."""
    shared, _, _ = patches.patch_tile(L, patch, P // patch**2, patches.MOVE[arch].bytes // size)
    pixels, ids = B * (M + L) * P * size, 8 * B * M
    return Moved(pixels + ids * math.ceil(L / shared), pixels + ids, pixels + ids)


def masked_patch_mse_fwd(
    B: int, M: int, P: int, pred_bytes: int, image_bytes: int, patch: int, norm_pix: bool, arch: str = "sm_90"
) -> Moved:
    """Predictions and pixels in, the gradient and a partial sum a program out.

    A patch that is too large to be held is read four times for norm_pix: once from memory, then from the L2 cache.
    """
    wide, C = max(4, pred_bytes), P // patch**2
    (shared, pixels, channels), _ = patches.loss_tile(M, patch, C, wide, patches.LOSS[arch])
    again = 3 if norm_pix and (pixels < patch**2 or channels < C) else 0
    partial = B * math.ceil(M / shared) * wide
    least = B * M * (P * (pred_bytes + image_bytes + wide) + 8)
    return Moved(least + again * B * M * P * image_bytes + partial, least + 2 * partial + wide, least + wide)


def enqueue_(K: int, D: int, N: int, queue_bytes: int, key_bytes: int, arch: str = "sm_90") -> Moved:
    """Keys in, as many rows out; the pointer is read by every program, then moved."""
    kept = min(N, K)
    count, _ = tile.move_tile(kept, D, key_bytes, queue.ENQUEUE[arch].bytes)
    rows = kept * D * (queue_bytes + key_bytes)
    return Moved(rows + 8 * math.ceil(kept / count) + 16, rows + 24, rows + 16)


def ema_update_(parameters: int, source_bytes: int, shadow_bytes: int = 0) -> Moved:
    """A float32 target in and out, a source in, a shadow out."""
    return Moved(*[parameters * (8 + source_bytes + shadow_bytes)] * 3)


def residual_norm_fwd(
    N: int, D: int, x_bytes: int, delta_bytes: int, normed_bytes: int, weight_bytes: int = 4
) -> Moved:
    """x and delta in, their sum and the normalised rows out, with two moments a row; without a delta no sum."""
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
    """Both gradients and the sum in, that of x out and, in a dtype of its own, that of delta; without a delta neither
    the sum's gradient nor delta's. Partial sums of the weight's and the bias's."""
    rows, _, _ = norm.norm_tile(D, norm.NORM[arch])
    programs = norm.norm_programs(N, rows, multiprocessors or CARDS[arch].multiprocessors)
    wide = max(4, x_bytes)
    values = N * D * (normed_bytes + 2 * x_bytes + (x_bytes + delta_bytes if delta_bytes else 0))
    least, partial = values + 2 * N * wide + D * (weight_bytes + 2 * wide), programs * 2 * D * wide
    requested = values + 2 * N * wide + programs * D * weight_bytes + partial
    return Moved(requested, least + 2 * partial, least)


def info_nce_fwd(B: int, K: int, D: int, size: int, grad: bool = True, arch: str = "sm_90") -> Moved:
    """Queries, keys, queue in; loss, rank, gradient out; a partial result of each query for each part of the queue."""
    wide, cut = max(4, size), contrastive.plan(B, K, D, size, CARDS[arch])
    (blocks, parts, columns), tiles = cut.grid, math.ceil(K / cut.block_k)
    programs, depth = blocks * parts * columns, math.ceil(D / (cut.chunk or cut.block_d)) * (cut.chunk or cut.block_d)
    stream = programs * wide + parts * columns * B * 2 * D * size  # temperature, and the positive's logit
    stream += tiles * columns * B * D * size if cut.chunk else parts * B * D * size  # the queries
    stream += blocks * K * D * size * ((columns + grad) if cut.chunk else 1)  # the queue
    partial = parts * B * (2 * wide + 4 + grad * D * wide)
    merge = B * (wide + 2 * D * size + parts * (3 * wide + 4) + 2 * wide + 8)
    merge += grad * B * (math.ceil(D / min(128, cut.block_d)) * parts * wide + parts * D * wide + D * (size + wide))
    least = K * D * size + 2 * B * D * size + B * (2 * wide + 8 + grad * D * wide)
    operations = 2 * tiles * columns * blocks * cut.block_b * cut.block_k * (depth + grad * cut.block_d)
    return Moved(stream + partial + merge, least + 2 * partial, least, operations)


def batch_info_nce_fwd(B: int, M: int, D: int, size: int, grad: bool = True, arch: str = "sm_90") -> Moved:
    """As above, with the positives among the keys."""
    requested, moved, least, operations = info_nce_fwd(B, M, D, size, grad, arch)
    return Moved(requested, moved - B * D * size, least - B * D * size, operations)


def nt_xent_fwd(rows: int, D: int, size: int, arch: str = "sm_90") -> Moved:
    """As above, with queries, keys and positives in one tensor."""
    requested, moved, least, operations = info_nce_fwd(rows, rows, D, size, False, arch)
    return Moved(requested, moved - 2 * rows * D * size, least - 2 * rows * D * size, operations)


def batch_info_nce_dkeys(B: int, M: int, D: int, size: int, arch: str = "sm_90") -> Moved:
    """Queries and keys in, with each query's softmax sum and the loss's gradient; the gradient of the keys out."""
    return _gather(M, B, D, size, False, arch)


def nt_xent_bwd(rows: int, D: int, size: int, arch: str = "sm_90") -> Moved:
    """As above, with every row in both roles."""
    return _gather(rows, rows, D, size, True, arch)


def _gather(R: int, C: int, D: int, size: int, both: bool, arch: str) -> Moved:
    wide, cut = max(4, size), contrastive.plan(R, C, D, size, CARDS[arch])
    (blocks, parts, columns), tiles = cut.grid, math.ceil(C / cut.block_k)
    depth = math.ceil(D / (cut.chunk or cut.block_d)) * (cut.chunk or cut.block_d)
    requested = blocks * columns * (parts + C) * 2 * wide  # numbers, and each row's sum and gradient
    requested += both * parts * columns * R * 2 * wide
    requested += tiles * columns * R * D * size if cut.chunk else parts * R * D * size
    requested += blocks * C * D * size * ((columns + 1) if cut.chunk else 1)
    least = (R + C * (not both)) * D * size + 2 * C * wide + R * D * wide
    operations = 2 * tiles * columns * blocks * cut.block_b * cut.block_k * (depth + cut.block_d)
    partial = parts * R * D * wide
    return Moved(requested + partial, least + (2 * partial if parts > 1 else 0), least, operations)


def attention_fwd(B: int, L: int, H: int, E: int, size: int, arch: str = "sm_90") -> Moved:
    """q, k and v in; the result and the logarithm of each row's sum out."""
    cut = attention.forward_plan(L, E, size, arch)
    width, blocks, wide = cut.block_e, math.ceil(L / cut.block_l), max(4, size)
    least = B * H * (4 * L * E * size + L * wide)
    again = B * H * (blocks - 1) * 2 * L * E * size
    operations = 4 * B * H * blocks * cut.block_l * math.ceil(L / cut.block_m) * cut.block_m * width
    return Moved(least + again, least, least, operations)


def attention_bwd(B: int, L: int, H: int, E: int, size: int, arch: str = "sm_90") -> Moved:
    """q, k, v, the result, its gradient and the logarithms in; three gradients out."""
    per_head, block_l, block_m, width, _, _ = attention.backward_plan(L, L, E, size, arch)
    wide, tensor = max(4, size), L * E * size
    least = B * H * (8 * tensor + L * wide)
    if per_head:
        return Moved(least, least, least, 10 * B * H * block_l * math.ceil(L / block_m) * block_m * width)
    blocks = math.ceil(L / block_l)
    requested = B * H * (blocks * (3 * tensor + L * wide) + 3 * tensor + L * wide + blocks * 2 * tensor + 5 * tensor)
    return Moved(requested, least, least, 14 * B * H * (blocks * block_l) ** 2 * width)
