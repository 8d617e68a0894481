"""Images as patches: cutting, assembling, gathering only the kept ones, and MAE's loss on the masked ones.

Two kernels move pixels. `patchify_kernel` goes by patches: it reads each patch from its place in the image and writes
it as a row, (row, column, channel) with channel last. `unpatchify_kernel` is its inverse and goes by the patches of the
image: it searches ids_keep for each patch and writes it once, from its row or as zeros, with no memset, no scatter and
no atomics. Without ids they cut and assemble whole images. They move every dtype as an integer of the same size.

`masked_patch_mse_kernel` computes loss and gradient in one pass: it reads a patch's pixels in place and, while they are
in registers, subtracts their mean, then the mean of the rest (the rounding error of the first mean, which a bright
patch would show), and takes the variance of these differences, so nothing cancels. Its programs write partial sums of
squares, which torch adds in a fixed order: no atomics, the same bits every time.

    bytes        patchify, unpatchify  2·B·C·H·W·s
                 keep_patches          B·M·(2·P·s + 8); backward B·P·s·(M + L) + 8·B·M
                 masked_patch_mse      B·M·P·(s_pred + s_image + 4 for the gradient) + 8·B·M + 4 a program
                 The ids of a sample are searched by many programs and come from the L2 cache.
                 tests/support/kernel_model.py counts all this exactly.
    operations   masked_patch_mse about 10 a pixel: nothing beside the bytes
    limit        memory: B = 256, 147 of 196 patches of 16 × 16 × 3 in float32 take 0.35 GB

Tile sizes: a tile is [PATCHES, PIXELS, CHANNELS]. Along PIXELS neighbours in a row of the image are neighbours in
memory, so a patch of 16 pixels is read in words of 16 bytes; along PIXELS and CHANNELS together a row of patches is
dense. The compiler turns one order into the other in shared memory. CHANNELS is a power of 2, so with 3 channels a
quarter of the lanes is idle, which costs nothing in a kernel that waits for memory. 4 or 8 kB a tile on 4 warps, as in
masking.py; small patches share a tile, large ones are cut into several. `masked_patch_mse_kernel` needs all of a patch
at once and takes up to 64 × 64 pixels on 8 warps; larger ones it reads four times with norm_pix, the last three from
the L2 cache.

Ids are not checked here, as in masking.py: one outside its range makes a patch of zeros, or is ignored. An image has
fewer than 2³¹ patches; offsets have 64 bits.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import TRITON_DTYPES, Launch, acc_dtype, card, contiguous_rows, positions_in_row, power_of_2, search_block

MOVE = {  # {architecture: configuration} of patchify_kernel and unpatchify_kernel
    "sm_80": Launch(4, 4096),
    "sm_90": Launch(4, 8192),
    "sm_100": Launch(4, 8192),
    "sm_120": Launch(4, 4096),
    "gfx942": Launch(4, 8192),
}
LOSS = dict.fromkeys(MOVE, Launch(4, 4096))  # in float32: pixels, prediction and gradient are all held at once
LARGEST, PART = 65536, 16384  # bytes of the largest patch that the loss holds at once, and of the parts of a larger one

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _patch_numbers(ids_ptr, stride_ids_m, m, M, L):
    """(patch number, whether it exists) for positions m of a row of ids."""
    number = tl.load(ids_ptr + m.to(tl.int64) * stride_ids_m, mask=m < M, other=-1)
    exists = (number >= 0) & (number < L)
    return tl.where(exists, number, 0).to(tl.int32), exists


@triton.jit
def _image_offsets(number, columns, pixel, channel, stride_c, stride_h, stride_w, PATCH: tl.constexpr):
    """Offsets in an image of [patch, pixel of the patch, channel]."""
    y = (number // columns * PATCH)[:, None] + (pixel // PATCH)[None, :]
    x = (number % columns * PATCH)[:, None] + (pixel % PATCH)[None, :]
    offset = y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    return offset[:, :, None] + channel.to(tl.int64)[None, None, :] * stride_c


@triton.jit
def _patch_offsets(row, stride_row, pixel, channel, C: tl.constexpr):
    """Offsets in a tensor of patches, channel last, of [patch, pixel of the patch, channel]."""
    offset = pixel[:, None] * C + channel[None, :]
    return row.to(tl.int64)[:, None, None] * stride_row + offset[None, :, :]


@triton.jit
def _tile_mask(exists, pixel, channel, C: tl.constexpr, PATCH: tl.constexpr):
    """Mask of [patch, pixel of the patch, channel]."""
    in_patch = (pixel < PATCH * PATCH)[:, None] & (channel < C)[None, :]
    return exists[:, None, None] & in_patch[None, :, :]


@triton.jit
def patchify_kernel(
    images_ptr,  # [B, C, H, W]
    ids_ptr,  # [B, M] int64, or None for all patches
    out_ptr,  # [B, M, P], written
    M,
    L,
    columns,  # patches in a row of the image
    blocks,  # of a sample
    stride_images_b,
    stride_images_c,
    stride_images_h,
    stride_images_w,
    stride_ids_b,
    stride_ids_m,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    PATCHES: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """PATCHES patches of one sample, gathered."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    m = tl.program_id(0) % blocks * PATCHES + tl.arange(0, PATCHES)
    number, exists = m, m < M
    if ids_ptr is not None:
        number, exists = _patch_numbers(ids_ptr + sample * stride_ids_b, stride_ids_m, m, M, L)
    values: tl.constexpr = PATCH * PATCH * C
    image_ptr = images_ptr + sample * stride_images_b
    for pixel_start in range(0, PATCH * PATCH, PIXELS):
        pixel = pixel_start + tl.arange(0, PIXELS)
        for channel_start in range(0, C, CHANNELS):
            channel = channel_start + tl.arange(0, CHANNELS)
            source = _image_offsets(
                number, columns, pixel, channel, stride_images_c, stride_images_h, stride_images_w, PATCH
            )
            patches = tl.load(image_ptr + source, mask=_tile_mask(exists, pixel, channel, C, PATCH), other=0)
            target = _patch_offsets(m, values, pixel, channel, C)
            tl.store(out_ptr + sample * M * values + target, patches, mask=_tile_mask(m < M, pixel, channel, C, PATCH))


@triton.jit
def unpatchify_kernel(
    patches_ptr,  # [B, M, P], rows contiguous
    ids_ptr,  # [B, M] int64, or None for all patches
    out_ptr,  # [B, C, H, W], written
    M,
    L,
    columns,  # patches in a row of the image
    blocks,  # of a sample
    stride_patches_b,
    stride_patches_m,
    stride_ids_b,
    stride_ids_m,
    stride_out_h,
    stride_out_c,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    PATCHES: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """PATCHES patches of one image, each from its row or zeros."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    number = tl.program_id(0) % blocks * PATCHES + tl.arange(0, PATCHES)
    m = number
    if ids_ptr is not None:
        m = positions_in_row(ids_ptr + sample * stride_ids_b, stride_ids_m, M, number, BLOCK_M)
    exists = number < L
    for pixel_start in range(0, PATCH * PATCH, PIXELS):
        pixel = pixel_start + tl.arange(0, PIXELS)
        for channel_start in range(0, C, CHANNELS):
            channel = channel_start + tl.arange(0, CHANNELS)
            source = _patch_offsets(m, stride_patches_m, pixel, channel, C)
            mask = _tile_mask(exists & (m >= 0), pixel, channel, C, PATCH)
            patches = tl.load(patches_ptr + sample * stride_patches_b + source, mask=mask, other=0)
            target = _image_offsets(number, columns, pixel, channel, stride_out_c, stride_out_h, 1, PATCH)
            mask = _tile_mask(exists, pixel, channel, C, PATCH)
            tl.store(out_ptr + sample * C * stride_out_c + target, patches, mask=mask)


@triton.jit
def _sum_of_patch(x):
    """The sum of each patch of a tile, [PATCHES, 1, 1]."""
    return tl.sum(tl.sum(x, 2), 1)[:, None, None]


@triton.jit
def _deviation(squares, VALUES: tl.constexpr):
    """√(variance + 1e-6) from the sum of the squared differences from the mean. One value has no variance: NaN."""
    variance = squares / (VALUES - 1) + 1e-6
    return tl.sqrt_rn(variance) if squares.dtype == tl.float32 else tl.sqrt(variance)


@triton.jit
def masked_patch_mse_kernel(
    pred_ptr,  # [B, M, P], rows contiguous
    images_ptr,  # [B, C, H, W]
    ids_ptr,  # [B, M] int64
    dpred_ptr,  # [B, M, P], written with WITH_GRAD
    partial_ptr,  # [programs], written: partial sums of the loss
    scale_bits,  # float64 2 / number of values as int64: Triton would pass a float as float32, and torch rounds once
    M,
    L,
    columns,  # patches in a row of the image
    blocks,  # of a sample
    stride_pred_b,
    stride_pred_m,
    stride_images_b,
    stride_images_c,
    stride_images_h,
    stride_images_w,
    stride_ids_b,
    stride_ids_m,
    NORM: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    PATCHES: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Loss and gradient of PATCHES predictions of one sample."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    m = tl.program_id(0) % blocks * PATCHES + tl.arange(0, PATCHES)
    number, exists = _patch_numbers(ids_ptr + sample * stride_ids_b, stride_ids_m, m, M, L)
    scale = scale_bits.to(tl.float64, bitcast=True).to(ACC_DTYPE)
    image_ptr = images_ptr + sample * stride_images_b
    values: tl.constexpr = PATCH * PATCH * C
    one_tile: tl.constexpr = PIXELS >= PATCH * PATCH and CHANNELS >= C  # a tile holds whole patches
    squares = tl.zeros([PATCHES, PIXELS, CHANNELS], ACC_DTYPE)
    mean, mean_rest = tl.zeros([PATCHES, 1, 1], ACC_DTYPE), tl.zeros([PATCHES, 1, 1], ACC_DTYPE)
    deviation = 1.0
    if NORM and not one_tile:  # three passes over the patch: mean, rounding error of the mean, deviation
        for step in tl.static_range(3):
            total = tl.zeros([PATCHES, PIXELS, CHANNELS], ACC_DTYPE)
            for pixel_start in range(0, PATCH * PATCH, PIXELS):
                pixel = pixel_start + tl.arange(0, PIXELS)
                for channel_start in range(0, C, CHANNELS):
                    channel = channel_start + tl.arange(0, CHANNELS)
                    source = _image_offsets(
                        number, columns, pixel, channel, stride_images_c, stride_images_h, stride_images_w, PATCH
                    )
                    mask = _tile_mask(exists, pixel, channel, C, PATCH)
                    target = tl.load(image_ptr + source, mask=mask, other=0).to(ACC_DTYPE)
                    target = tl.where(mask, target - mean - mean_rest, 0)
                    total += target if step < 2 else target * target
            if step == 0:
                mean = _sum_of_patch(total) / values
            elif step == 1:
                mean_rest = _sum_of_patch(total) / values
            else:
                deviation = _deviation(_sum_of_patch(total), values)
    for pixel_start in range(0, PATCH * PATCH, PIXELS):
        pixel = pixel_start + tl.arange(0, PIXELS)
        for channel_start in range(0, C, CHANNELS):
            channel = channel_start + tl.arange(0, CHANNELS)
            source = _image_offsets(
                number, columns, pixel, channel, stride_images_c, stride_images_h, stride_images_w, PATCH
            )
            mask = _tile_mask(exists, pixel, channel, C, PATCH)
            target = tl.load(image_ptr + source, mask=mask, other=0).to(ACC_DTYPE)
            if NORM and one_tile:
                for _ in tl.static_range(2):
                    target = tl.where(mask, target - _sum_of_patch(target) / values, 0)
                target /= _deviation(_sum_of_patch(target * target), values)
            elif NORM:
                target = (target - mean - mean_rest) / deviation
            in_m = _tile_mask(m < M, pixel, channel, C, PATCH)
            pred = pred_ptr + sample * stride_pred_b + _patch_offsets(m, stride_pred_m, pixel, channel, C)
            difference = tl.where(in_m, tl.load(pred, mask=in_m, other=0).to(ACC_DTYPE) - target, 0)
            squares += difference * difference
            if WITH_GRAD:
                dpred = dpred_ptr + sample * M * values + _patch_offsets(m, values, pixel, channel, C)
                tl.store(dpred, difference * scale, mask=in_m)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(tl.sum(squares, 2), 1), 0) * (scale * 0.5))


def patchify(images: Tensor, patch: int) -> Tensor:
    return launch_patchify(images, None, patch)


def keep_patches_fwd(images: Tensor, ids_keep: Tensor, patch: int) -> Tensor:
    return launch_patchify(images, ids_keep, patch)


def unpatchify(patches: Tensor, patch: int, height: int, width: int) -> Tensor:
    return launch_unpatchify(patches, None, patch, height, width)


def keep_patches_bwd(dkept: Tensor, ids_keep: Tensor, patch: int, height: int, width: int) -> Tensor:
    return launch_unpatchify(dkept, ids_keep, patch, height, width)


def masked_patch_mse_fwd(
    pred: Tensor, images: Tensor, ids: Tensor, patch: int, norm_pix: bool, with_grad: bool
) -> tuple[Tensor, Tensor]:
    (B, M, _), (C, H, W), sum_dtype = pred.shape, images.shape[1:], acc_dtype(pred.dtype)
    dpred = pred.new_empty(pred.shape if with_grad else 0, dtype=sum_dtype)
    if not pred.numel():
        return pred.new_full((), float("nan"), dtype=sum_dtype), dpred
    pred, images = contiguous_rows(pred), images.real if images.is_complex() else images
    images = images.view(torch.uint8) if images.dtype == torch.bool else images
    (patches, pixels, channels), warps = loss_tile(M, patch, C, sum_dtype.itemsize, LOSS[card(pred).arch])
    blocks = triton.cdiv(M, patches)
    partial_sums = pred.new_empty(B * blocks, dtype=sum_dtype)
    (scale_bits,) = struct.unpack("q", struct.pack("d", 2 / pred.numel()))
    masked_patch_mse_kernel[(B * blocks,)](
        pred,
        images,
        ids,
        dpred,
        partial_sums,
        scale_bits,
        M,
        (H // patch) * (W // patch),
        W // patch,
        blocks,
        *pred.stride()[:2],
        *images.stride(),
        *ids.stride(),
        NORM=norm_pix,
        WITH_GRAD=with_grad,
        ACC_DTYPE=TRITON_DTYPES[sum_dtype],
        C=C,
        PATCH=patch,
        PATCHES=patches,
        PIXELS=pixels,
        CHANNELS=channels,
        num_warps=warps,
    )
    return partial_sums.sum(), dpred


def launch_patchify(images: Tensor, ids: Tensor | None, patch: int) -> Tensor:
    """The patches numbered `ids`, or all patches if `ids` is None, as rows [B, M, P]."""
    B, C, H, W = images.shape
    L = (H // patch) * (W // patch)
    M = L if ids is None else ids.shape[1]
    out = images.new_empty(B, M, patch * patch * C)
    if out.numel():
        launch = MOVE[card(images).arch]
        patches, pixels, channels = patch_tile(M, patch, C, launch.bytes // _as_integers(images).element_size())
        blocks = triton.cdiv(M, patches)
        patchify_kernel[(B * blocks,)](
            _as_integers(images),
            ids,
            _as_integers(out),
            M,
            L,
            W // patch,
            blocks,
            *images.stride(),
            *_strides(ids),
            C=C,
            PATCH=patch,
            PATCHES=patches,
            PIXELS=pixels,
            CHANNELS=channels,
            num_warps=launch.warps,
        )
    return out


def launch_unpatchify(patches: Tensor, ids: Tensor | None, patch: int, H: int, W: int) -> Tensor:
    """Images [B, C, H, W] from the patches numbered `ids`, or all patches if `ids` is None; zeros elsewhere."""
    B, M, P = patches.shape
    L, C = (H // patch) * (W // patch), P // patch**2
    out = patches.new_empty(B, C, H, W)
    if out.numel():
        patches, launch = contiguous_rows(patches), MOVE[card(patches).arch]
        count, pixels, channels = patch_tile(L, patch, C, launch.bytes // _as_integers(patches).element_size())
        blocks = triton.cdiv(L, count)
        unpatchify_kernel[(B * blocks,)](
            _as_integers(patches),
            ids,
            _as_integers(out),
            M,
            L,
            W // patch,
            blocks,
            *patches.stride()[:2],
            *_strides(ids),
            W,
            H * W,
            C=C,
            PATCH=patch,
            PATCHES=count,
            PIXELS=pixels,
            CHANNELS=channels,
            BLOCK_M=search_block(M),
            num_warps=launch.warps,
        )
    return out


def _strides(ids: Tensor | None) -> tuple[int, int]:
    return (0, 0) if ids is None else ids.stride()


def _as_integers(x: Tensor) -> Tensor:
    """x as integers of the same size, in the same memory."""
    if x.element_size() not in INTEGERS:
        raise TypeError(
            f"fastssl: images and patches on a GPU must have elements of at most 8 bytes, got {x.dtype}; run the op in "
            "plain torch: `with fastssl.ops.dispatch.reference(): …`"
        )
    return x.view(INTEGERS[x.element_size()])


def patch_tile(count: int, patch: int, C: int, elements: int) -> tuple[int, int, int]:
    """(patches, pixels of each, channels) of a tile of about `elements`, where a sample has `count` patches."""
    channels = min(power_of_2(C, 1), 64)
    pixels = min(power_of_2(patch**2, 1), max(1, elements // channels))
    return min(max(1, elements // (pixels * channels)), power_of_2(count, 1)), pixels, channels


def loss_tile(count: int, patch: int, C: int, size: int, launch: Launch) -> tuple[tuple[int, int, int], int]:
    """(tile, warps) of the loss; a tile is several patches, one patch, or a part of one."""
    patch_bytes = power_of_2(patch**2, 1) * power_of_2(C, 1) * size
    tile_bytes = max(patch_bytes, launch.bytes) if patch_bytes <= LARGEST else PART
    tile = patch_tile(count, patch, C, tile_bytes // size)
    return tile, launch.warps if tile_bytes <= PART else 8
