"""Windows of uint8 images of any sizes, resampled into one batch: the crops of an augmentation."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import check
from .dispatch import fake, op, register_triton


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import crops

    return crops


MODES = ("bilinear", "bicubic", "lanczos")  # kernels by their numbers; each reaches one pixel further than the last
TOUCH = 2**-20  # least part of a pixel that counts: less may be an error of rounding
MOST_BITS = 22  # of a weight's fraction, where all weights are small
# YCbCr → RGB as in JPEG (BT.601, full range), in units of 2^-16
RED_OF_V, GREEN_OF_U, GREEN_OF_V, BLUE_OF_U = 91_881, -22_554, -46_802, 116_130


def resized_crops_(out: Tensor, images: Sequence[Tensor], windows: Tensor, interpolation: str = "bilinear") -> Tensor:
    """Resamples a window of each image to the size of the batch, antialiased, in place; returns `out`.

    Equals, for an RGB image and its window,
    ``F.interpolate(image.permute(2, 0, 1)[None, :, top : top + height, left : left + width], (h, w),
    mode=interpolation, antialias=True)[0]`` of uint8 on a CPU, to the bit (torch without vector instructions is wrong
    for results one pixel wide): along rows, then along columns, each with integer weights and rounded to bytes. Pixels
    outside the window have no influence. A window may begin and end inside of pixels, as it does in an image that was
    reduced when it was decoded. Lanczos, which torch lacks, is Pillow's along rows and then along columns (one call of
    Pillow 13 begins with the cheaper axis), within 2 of 255 for weights of fewer bits; 98 of 100 bytes are equal.

    Planes of YCbCr are resampled one by one, those of colour in the window of half the numbers, which may begin and end
    in the middle of a pixel; the results are converted to RGB by the integers of libjpeg, rounded once more.

    Args:
        out: [B, 3, h, w] uint8, changed in place; each image of it is contiguous.
        images: B tensors uint8, of any sizes, on the device of `out`: RGB [H, W, 3], or the planes Y, U and V of YCbCr
            4:2:0 in one block [3·H/2, W]: Y is [H, W], then U and V, each [H/2, W/2]; full range, as in JPEG. H and W
            are even there. One image may be in the list several times.
        windows: [B, 4] int64 or float64, on the CPU: top, left, height, width in pixels of the image (of Y).
        interpolation: "bilinear", "bicubic" (a = −1/2) or "lanczos" (three lobes).

    Raises:
        ValueError: a shape or device does not fit, the interpolation is unknown, or `out` shares memory with an image.
        TypeError: a dtype does not fit.
        RuntimeError: a window has no pixels, or is not inside its image.

    Memory: a few rows of an image. No gradient. Layout: rows of an RGB image may be apart (a window of a larger image);
        images whose pixels are not contiguous are copied first.

    Source: torchvision's ``resized_crop``; ITU-T T.871 (JFIF), section 7.
    """
    check.tensor("resized_crops_", "out", out, "B 3 h w", **{"3": 3})
    _check_bytes("out", out)
    if not isinstance(images, Iterable) or isinstance(images, Tensor):
        check.fail("resized_crops_", f"images must be a list of tensors, got {type(images).__name__}", TypeError)
    images = list(images)
    if len(images) != len(out):
        check.fail("resized_crops_", f"images must hold {len(out)} tensors like out, got {len(images)}")
    check.tensor("resized_crops_", "windows", windows, "B 4", **{"B": len(out), "4": 4})
    if windows.dtype not in (torch.int64, torch.float64):
        got = check.dtype_name(windows.dtype)
        check.fail("resized_crops_", f"windows must be int64 or float64, got {got}", TypeError)
    if not windows.is_cpu and not (windows.is_meta and out.is_meta):
        check.fail("resized_crops_", f"windows must be on the cpu, whatever the device of out, got {windows.device}")
    if interpolation not in MODES:
        check.fail("resized_crops_", f"interpolation must be bilinear, bicubic or lanczos, got {interpolation!r}")
    if not (out.is_contiguous() or _is_dense(out)):
        strides = f"shape {list(out.shape)} and strides {list(out.stride())}"
        check.fail("resized_crops_", f"out must have contiguous images that share no memory, got {strides}")
    for i, image in enumerate(images):
        images[i] = _readable(i, image, out)
    _resized_crops_(out, images, windows, MODES.index(interpolation))
    return out


def _check_bytes(name: str, value: Tensor) -> None:
    if value.dtype != torch.uint8:
        check.fail("resized_crops_", f"{name} must be uint8, got {check.dtype_name(value.dtype)}", TypeError)


def _is_dense(out: Tensor) -> bool:
    """True where each image of a batch is contiguous, and no two share memory."""
    size = math.prod(out.shape[1:])
    return not out.numel() or (out[0].is_contiguous() and (len(out) == 1 or out.stride(0) >= size))


def _readable(i: int, image: Tensor, out: Tensor) -> Tensor:
    """Image i of a list, checked, with contiguous pixels in each row; planes in one block."""
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.device != out.device:
        check.is_tensor("resized_crops_", f"images[{i}]", image)
        _check_bytes(f"images[{i}]", image)
        check.same_device("resized_crops_", **{"out": out, f"images[{i}]": image})
    shape, strides = image.shape, image.stride()
    is_rgb = len(shape) == 3 and shape[2] == 3
    if not is_rgb and not (len(shape) == 2 and shape[0] % 3 == 0 == shape[1] % 2):
        expected = "RGB [H, W, 3], or planes [3·H/2, W] of 4:2:0 with even H and W"
        check.fail("resized_crops_", f"images[{i}] must be {expected}, got {list(shape)}")
    if not torch.compiler.is_compiling() and torch._C._is_alias_of(image, out):  # type: ignore[attr-defined]
        check.separate("resized_crops_", {"out": out}, {f"images[{i}]": image})
    return image if (is_rgb and strides[1:] == (3, 1)) or image.is_contiguous() else image.contiguous()


@op("resized_crops_", mutates_args=("out",))
def _resized_crops_(out: Tensor, images: Sequence[Tensor], windows: Tensor, kernel: int) -> None:
    numbers = windows.tolist()
    for i, (image, (top, left, height, width)) in enumerate(zip(images, numbers)):
        rows, columns = image.shape[0] if image.ndim == 3 else image.shape[0] // 3 * 2, image.shape[1]
        fits = top >= 0 and left >= 0 and top + height <= rows and left + width <= columns
        if not (fits and height >= 1 and width >= 1):
            inside = f"inside its image of {rows}×{columns} pixels and have at least one"
            window = [top, left, height, width]
            check.fail("resized_crops_", f"windows[{i}] must be {inside}, got {window}", RuntimeError)
    if out.numel() == 0:
        return
    for result, image, window in zip(out, images, numbers):
        if image.ndim == 3:
            result.copy_(resample_plane(image.permute(2, 0, 1), window, result.shape[1:], kernel))
        else:
            luma, *chroma = planes_of(image)
            halves = [number / 2 for number in window]
            resampled = [resample_plane(luma, window, result.shape[1:], kernel)]
            resampled += [resample_plane(plane, halves, result.shape[1:], kernel) for plane in chroma]
            result.copy_(rgb_of_ycbcr(*resampled))


@fake(_resized_crops_)
def _(out, images, windows, kernel):
    pass


register_triton(_resized_crops_, lambda: _kernels().resized_crops_)


def planes_of(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Y [H, W], U and V [H/2, W/2] of an image [3·H/2, W] in one block."""
    height, width = image.shape[0] // 3 * 2, image.shape[1]
    memory = image.reshape(-1)
    chroma = memory[height * width :].view(2, height // 2, width // 2)
    return memory[: height * width].view(height, width), chroma[0], chroma[1]


def resample_plane(plane: Tensor, window: Sequence[float], size: Sequence[int], kernel: int) -> Tensor:
    """A window of a plane, or of several [..., H, W] uint8, in another size: [..., h, w] float64, values of a byte.

    Args:
        plane: the pixels.
        window: top, left, height, width.
        size: (h, w).
        kernel: its number in `MODES`.
    """
    top, left, height, width = window
    first_row, first_column = math.floor(top), math.floor(left)
    rows, row_bits = axis_weights(top - first_row, height, size[0], kernel)
    columns, column_bits = axis_weights(left - first_column, width, size[1], kernel)
    pixels = plane[..., first_row : first_row + rows.shape[1], first_column : first_column + columns.shape[1]].double()
    narrow = _rounded(pixels @ columns.to(plane.device).T, column_bits)
    return _rounded(rows.to(plane.device) @ narrow, row_bits)


def _rounded(sums: Tensor, bits: int) -> Tensor:
    """Sums of products with integer weights of this many bits after the point, as whole numbers of a byte."""
    return ((sums + 2 ** (bits - 1)) / 2**bits).floor().clamp(0, 255)


def axis_weights(offset: float, length: float, size: int, kernel: int) -> tuple[Tensor, int]:
    """Weights of the pixels of a window for each pixel of the result, along one axis, and the bits after their point.

    The kernel is as wide as a pixel of the result, if that is larger than a pixel of the image, and is cut at the ends
    of the window. Its values, in float64, are divided by their sum, and rounded to the most bits with which the largest
    of the axis fits 16 bits.

    Args:
        offset: where the window begins in its first pixel, from 0 to 1: 1/2 for odd numbers in planes of half the size.
        length: of the window, in pixels.
        size: pixels of the result.
        kernel: its number in `MODES`.

    Returns: weights [size, n] float64 of integer value, of the n pixels that the window touches; bits.
    """
    count = math.ceil(offset + length - TOUCH)
    scale = length / size
    support = (kernel + 1) * max(scale, 1)
    centres = offset + scale * (torch.arange(size, dtype=torch.float64)[:, None] + 0.5)
    pixels = torch.arange(count, dtype=torch.float64)
    begin = (centres - support + 0.5).trunc().clamp(min=0)
    # Rounding may add a pixel to the widest kernel; its weight is next to nothing, and torch leaves it out.
    widest = 2 * math.ceil(torch.tensor(support, dtype=torch.float32).item()) + 1
    end = torch.minimum((centres + support + 0.5).trunc().clamp(max=count), begin + widest)
    distances = (pixels - centres + 0.5) * (1 / scale if scale >= 1 else 1)
    values = torch.where((pixels >= begin) & (pixels < end), _kernel(distances.abs(), kernel), 0)
    totals = values.cumsum(1)[:, -1:]  # in order, so that other implementations can round alike
    weights = values / torch.where(totals == 0, 1, totals)
    bits = _bits_of_weights(weights.max().item())
    scaled = weights * 2**bits
    return torch.where(scaled < 0, scaled - 0.5, scaled + 0.5).trunc(), bits


def _kernel(x: Tensor, kernel: int) -> Tensor:
    """The triangle, the cubic with a = −1/2, or Lanczos' kernel of three lobes, at distances x ≥ 0."""
    if kernel == 0:
        return torch.where(x < 1, 1 - x, 0)
    if kernel == 2:
        angle = math.pi * x
        square = torch.sin(angle / 3) ** 2  # sin πx by the triple angle: the other implementations take one sine, too
        lobes = square * (9 - 12 * square) / (angle * angle)
        return torch.where(x == 0, 1, torch.where(x < 3, lobes, 0))
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _bits_of_weights(largest: float) -> int:
    """The most bits after the point, up to MOST_BITS, with which the largest weight is below 2^15."""
    bits = 0
    while bits < MOST_BITS and int(0.5 + largest * 2 ** (bits + 1)) < 2**15:
        bits += 1
    return bits


def rgb_of_ycbcr(y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Planes [h, w] of whole numbers of a byte, as RGB [3, h, w] uint8."""
    y, u, v = y.int(), u.int() - 128, v.int() - 128
    half = 1 << 15
    red = y + ((RED_OF_V * v + half) >> 16)
    green = y + ((GREEN_OF_U * u + GREEN_OF_V * v + half) >> 16)
    blue = y + ((BLUE_OF_U * u + half) >> 16)
    return torch.stack([red, green, blue]).clamp_(0, 255).to(torch.uint8)
