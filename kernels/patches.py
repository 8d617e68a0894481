"""Images as patches: cutting, putting together, taking only the kept ones, and MAE's loss on the masked ones.

Two kernels move pixels. `_take` goes by patches: it reads each named one where it lies in the image and writes it as a
row, (row, column, channel) with channel last. `_put` is its inverse and goes by the patches of the image: each looks
itself up in ids_keep and is written once, as its row or as zeros, with no memset, no scatter and no atomics. Without
ids they cut whole images and put them together. What a pixel means does not matter to them, only how many bytes it has,
so every dtype is moved as an integer.

`_loss` makes loss and gradient in one pass: a patch's pixels are read in place, and while they are in registers their
mean is subtracted, then the mean of what is left (what the first one was off by: of a bright patch it would show), and
the variance is that of these differences, so nothing cancels. Its programs leave partial sums of squares, which torch
adds in a fixed order: no atomics, always the same bits.

    bytes        patchify, unpatchify  2·B·C·H·W·s
                 keep_patches          B·M·(2·P·s + 8); backward B·P·s·(M + L) + 8·B·M
                 masked_patch_mse      B·M·P·(s_pred + s_image + 4 for the gradient) + 8·B·M + 4 a program
                 The ids of a sample are searched by many programs and come from the L2 cache.
                 benchmarks/model.py counts all this exactly.
    operations   masked_patch_mse about 10 a pixel: nothing beside the bytes
    limit        memory: B = 256, 147 of 196 patches of 16 × 16 × 3 in float32 take 0.35 GB

Why the tiles are as they are: a tile is [PATCHES, PIXELS, CHANNELS]. Along PIXELS neighbours in a row of the image are
neighbours in memory, so a patch of 16 pixels is read in words of 16 bytes; along PIXELS and CHANNELS together a row of
patches is dense. The compiler turns one order into the other in shared memory. CHANNELS is a power of 2, so of 3
channels a quarter of the lanes is idle, which a kernel that waits for memory can afford. 4 or 8 kB a tile on 4 warps,
as in masking.py; small patches share a tile, large ones are cut into several. `_loss` needs all of a patch at once and
takes up to 64 × 64 pixels on 8 warps; larger ones it reads four times with norm_pix, the last three from the L2 cache.

Ids are not checked here, as in masking.py: one outside its range makes a patch of zeros, or is passed over. An image
has fewer than 2³¹ patches; offsets have 64 bits.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import TRITON_DTYPES, Launch, card, places, power_of_2, rows, search_block, wide

# {architecture: warps of a program, bytes of its tile}: _take and _put
MOVE = {
    "sm_80": Launch(4, 4096),
    "sm_90": Launch(4, 8192),
    "sm_100": Launch(4, 8192),
    "sm_120": Launch(4, 4096),
    "gfx942": Launch(4, 8192),
}
LOSS = dict.fromkeys(MOVE, Launch(4, 4096))  # in float32: pixels, prediction and gradient are all held at once
LARGEST, PART = 65536, 16384  # bytes of the largest patch that `_loss` holds, and of the parts of a larger one

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _named(ids_ptr, ids_m, place, M, L):
    """(number, exists) of the patches whose ids stand at these places of a row."""
    number = tl.load(ids_ptr + place.to(tl.int64) * ids_m, mask=place < M, other=-1)
    exists = (number >= 0) & (number < L)
    return tl.where(exists, number, 0).to(tl.int32), exists


@triton.jit
def _pixels(number, columns, pixel, channel, image_c, image_h, image_w, PATCH: tl.constexpr):
    """Where in an image the values [patch, pixel of the patch, channel] lie."""
    y = (number // columns * PATCH)[:, None] + (pixel // PATCH)[None, :]
    x = (number % columns * PATCH)[:, None] + (pixel % PATCH)[None, :]
    at = y.to(tl.int64) * image_h + x.to(tl.int64) * image_w
    return at[:, :, None] + channel.to(tl.int64)[None, None, :] * image_c


@triton.jit
def _values(row, row_stride, pixel, channel, C: tl.constexpr):
    """Where in a tensor of patches, channel last, the same values lie."""
    at = pixel[:, None] * C + channel[None, :]
    return row.to(tl.int64)[:, None, None] * row_stride + at[None, :, :]


@triton.jit
def _inside(exists, pixel, channel, C: tl.constexpr, PATCH: tl.constexpr):
    in_patch = (pixel < PATCH * PATCH)[:, None] & (channel < C)[None, :]
    return exists[:, None, None] & in_patch[None, :, :]


@triton.jit
def _take(
    images_ptr,
    ids_ptr,
    out_ptr,
    M,
    L,
    columns,
    blocks,
    image_b,
    image_c,
    image_h,
    image_w,
    ids_b,
    ids_m,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    PATCHES: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * PATCHES + tl.arange(0, PATCHES)
    number, exists = place, place < M
    if ids_ptr is not None:
        number, exists = _named(ids_ptr + sample * ids_b, ids_m, place, M, L)
    values: tl.constexpr = PATCH * PATCH * C
    for start in range(0, PATCH * PATCH, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        for begin in range(0, C, CHANNELS):
            channel = begin + tl.arange(0, CHANNELS)
            at = _pixels(number, columns, pixel, channel, image_c, image_h, image_w, PATCH)
            inside = _inside(exists, pixel, channel, C, PATCH)
            patches = tl.load(images_ptr + sample * image_b + at, mask=inside, other=0)
            at = _values(place, values, pixel, channel, C)
            tl.store(out_ptr + sample * M * values + at, patches, mask=_inside(place < M, pixel, channel, C, PATCH))


@triton.jit
def _put(
    patches_ptr,
    ids_ptr,
    out_ptr,
    M,
    L,
    columns,
    blocks,
    patches_b,
    patches_m,
    ids_b,
    ids_m,
    image_h,
    image_c,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    PATCHES: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    number = tl.program_id(0) % blocks * PATCHES + tl.arange(0, PATCHES)
    place = number
    if ids_ptr is not None:
        place = places(ids_ptr + sample * ids_b, ids_m, M, number, BLOCK_M)
    exists = number < L
    for start in range(0, PATCH * PATCH, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        for begin in range(0, C, CHANNELS):
            channel = begin + tl.arange(0, CHANNELS)
            at = _values(place, patches_m, pixel, channel, C)
            inside = _inside(exists & (place >= 0), pixel, channel, C, PATCH)
            patches = tl.load(patches_ptr + sample * patches_b + at, mask=inside, other=0)
            at = _pixels(number, columns, pixel, channel, image_c, image_h, 1, PATCH)
            tl.store(out_ptr + sample * C * image_c + at, patches, mask=_inside(exists, pixel, channel, C, PATCH))


@triton.jit
def _total(x):
    """The sum of each patch of a tile, [PATCHES, 1, 1]."""
    return tl.sum(tl.sum(x, 2), 1)[:, None, None]


@triton.jit
def _deviation(squares, VALUES: tl.constexpr):
    """√(variance + 1e-6) from the sum of the squared differences from the mean. One value has no variance: NaN."""
    variance = squares / (VALUES - 1) + 1e-6
    return tl.sqrt_rn(variance) if squares.dtype == tl.float32 else tl.sqrt(variance)


@triton.jit
def _loss(
    pred_ptr,
    images_ptr,
    ids_ptr,
    dpred_ptr,
    partial_ptr,
    scale_bits,
    M,
    L,
    columns,
    blocks,
    pred_b,
    pred_m,
    image_b,
    image_c,
    image_h,
    image_w,
    ids_b,
    ids_m,
    NORM: tl.constexpr,
    GRAD: tl.constexpr,
    WIDE: tl.constexpr,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    PATCHES: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The squared error of PATCHES predictions, divided by the number of all values; scale_bits are those of the
    float64 2 / that number, so that the gradient is rounded as torch's is (Triton passes numbers as float32)."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * PATCHES + tl.arange(0, PATCHES)
    number, exists = _named(ids_ptr + sample * ids_b, ids_m, place, M, L)
    scale = scale_bits.to(tl.float64, bitcast=True).to(WIDE)
    image = images_ptr + sample * image_b
    values: tl.constexpr = PATCH * PATCH * C
    held: tl.constexpr = PIXELS >= PATCH * PATCH and CHANNELS >= C
    squares = tl.zeros([PATCHES, PIXELS, CHANNELS], WIDE)
    mean, rest, deviation = tl.zeros([PATCHES, 1, 1], WIDE), tl.zeros([PATCHES, 1, 1], WIDE), 1.0
    if NORM and not held:  # read the patch once for each of the three
        for step in tl.static_range(3):
            total = tl.zeros([PATCHES, PIXELS, CHANNELS], WIDE)
            for start in range(0, PATCH * PATCH, PIXELS):
                pixel = start + tl.arange(0, PIXELS)
                for begin in range(0, C, CHANNELS):
                    channel = begin + tl.arange(0, CHANNELS)
                    at = _pixels(number, columns, pixel, channel, image_c, image_h, image_w, PATCH)
                    inside = _inside(exists, pixel, channel, C, PATCH)
                    target = tl.load(image + at, mask=inside, other=0).to(WIDE)
                    target = tl.where(inside, target - mean - rest, 0)
                    total += target if step < 2 else target * target
            if step == 0:
                mean = _total(total) / values
            elif step == 1:
                rest = _total(total) / values
            else:
                deviation = _deviation(_total(total), values)
    for start in range(0, PATCH * PATCH, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        for begin in range(0, C, CHANNELS):
            channel = begin + tl.arange(0, CHANNELS)
            at = _pixels(number, columns, pixel, channel, image_c, image_h, image_w, PATCH)
            inside = _inside(exists, pixel, channel, C, PATCH)
            target = tl.load(image + at, mask=inside, other=0).to(WIDE)
            if NORM and held:
                for _ in tl.static_range(2):
                    target = tl.where(inside, target - _total(target) / values, 0)
                target /= _deviation(_total(target * target), values)
            elif NORM:
                target = (target - mean - rest) / deviation
            in_m = _inside(place < M, pixel, channel, C, PATCH)
            pred = pred_ptr + sample * pred_b + _values(place, pred_m, pixel, channel, C)
            difference = tl.where(in_m, tl.load(pred, mask=in_m, other=0).to(WIDE) - target, 0)
            squares += difference * difference
            if GRAD:
                dpred = dpred_ptr + sample * M * values + _values(place, values, pixel, channel, C)
                tl.store(dpred, difference * scale, mask=in_m)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(tl.sum(squares, 2), 1), 0) * (scale * 0.5))


def patchify(images: Tensor, patch: int) -> Tensor:
    return _taken(images, None, patch)


def keep_patches_fwd(images: Tensor, ids_keep: Tensor, patch: int) -> Tensor:
    return _taken(images, ids_keep, patch)


def unpatchify(patches: Tensor, patch: int, height: int, width: int) -> Tensor:
    return _put_together(patches, None, patch, height, width)


def keep_patches_bwd(dkept: Tensor, ids_keep: Tensor, patch: int, height: int, width: int) -> Tensor:
    return _put_together(dkept, ids_keep, patch, height, width)


def masked_patch_mse_fwd(
    pred: Tensor, images: Tensor, ids: Tensor, patch: int, norm_pix: bool, with_grad: bool
) -> tuple[Tensor, Tensor]:
    (B, M, _), (C, H, W), dtype = pred.shape, images.shape[1:], wide(pred.dtype)
    dpred = pred.new_empty(pred.shape if with_grad else 0, dtype=dtype)
    if not pred.numel():
        return pred.new_full((), float("nan"), dtype=dtype), dpred
    pred, images = rows(pred), images.real if images.is_complex() else images
    images = images.view(torch.uint8) if images.dtype == torch.bool else images
    (patches, pixels, channels), warps = loss_tile(M, patch, C, dtype.itemsize, LOSS[card(pred).arch])
    blocks = triton.cdiv(M, patches)
    partial = pred.new_empty(B * blocks, dtype=dtype)
    (scale_bits,) = struct.unpack("q", struct.pack("d", 2 / pred.numel()))
    _loss[(B * blocks,)](
        pred,
        images,
        ids,
        dpred,
        partial,
        scale_bits,
        M,
        (H // patch) * (W // patch),
        W // patch,
        blocks,
        *pred.stride()[:2],
        *images.stride(),
        *ids.stride(),
        NORM=norm_pix,
        GRAD=with_grad,
        WIDE=TRITON_DTYPES[dtype],
        C=C,
        PATCH=patch,
        PATCHES=patches,
        PIXELS=pixels,
        CHANNELS=channels,
        num_warps=warps,
    )
    return partial.sum(), dpred


def _taken(images: Tensor, ids: Tensor | None, patch: int) -> Tensor:
    B, C, H, W = images.shape
    L = (H // patch) * (W // patch)
    M = L if ids is None else ids.shape[1]
    out = images.new_empty(B, M, patch * patch * C)
    if out.numel():
        launch = MOVE[card(images).arch]
        patches, pixels, channels = patch_tile(M, patch, C, launch.bytes // _integers(images).element_size())
        blocks = triton.cdiv(M, patches)
        _take[(B * blocks,)](
            _integers(images),
            ids,
            _integers(out),
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


def _put_together(patches: Tensor, ids: Tensor | None, patch: int, H: int, W: int) -> Tensor:
    B, M, P = patches.shape
    L, C = (H // patch) * (W // patch), P // patch**2
    out = patches.new_empty(B, C, H, W)
    if out.numel():
        patches, launch = rows(patches), MOVE[card(patches).arch]
        count, pixels, channels = patch_tile(L, patch, C, launch.bytes // _integers(patches).element_size())
        blocks = triton.cdiv(L, count)
        _put[(B * blocks,)](
            _integers(patches),
            ids,
            _integers(out),
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


def _integers(x: Tensor) -> Tensor:
    """The same memory as integers of the same size."""
    if x.element_size() not in INTEGERS:
        raise TypeError(f"fastssl: the Triton kernels move pixels of at most 8 bytes, got {x.dtype}")
    return x.view(INTEGERS[x.element_size()])


def patch_tile(count: int, patch: int, C: int, elements: int) -> tuple[int, int, int]:
    """(patches, pixels of each, channels) of a tile of about so many elements, of `count` patches in a sample."""
    channels = min(power_of_2(C, 1), 64)
    pixels = min(power_of_2(patch**2, 1), max(1, elements // channels))
    return min(max(1, elements // (pixels * channels)), power_of_2(count, 1)), pixels, channels


def loss_tile(count: int, patch: int, C: int, size: int, launch: Launch) -> tuple[tuple[int, int, int], int]:
    """(tile, warps): patches that share a tile, one that fills it, or a part of one."""
    whole = power_of_2(patch**2, 1) * power_of_2(C, 1) * size
    held = max(whole, launch.bytes) if whole <= LARGEST else PART
    tile = patch_tile(count, patch, C, held // size)
    return tile, launch.warps if held <= PART else 8
