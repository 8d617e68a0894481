"""Bytes of images as normalised floats."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import check
from .dispatch import fake, op, register_triton


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import pixels

    return pixels


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32_MAX = torch.finfo(torch.float32).max


def normalise(
    pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values of pixels from 0 to 1, minus a mean, by a standard deviation, in one pass.

    Equals (x / 255 − mean) / std for each channel, computed in float32 as (x − 255·mean) / (255·std), and rounded
    once to the dtype.

    Args:
        pixels: [B, 3, H, W] uint8.
        mean, std: three numbers each, of red, green and blue; std above 0.
        dtype: float32, bfloat16 or float16.

    Returns: [B, 3, H, W], contiguous.

    Raises:
        ValueError: a shape does not fit, a number is not finite, or a std is not above 0.
        TypeError: a dtype does not fit, or mean or std are not numbers.

    Memory: the result. No gradient. Layout: any strides; contiguous images are fastest.
    """
    check.tensor("normalise", "pixels", pixels, "B 3 H W", **{"3": 3})
    if pixels.dtype != torch.uint8:
        check.fail("normalise", f"pixels must be uint8, got {check.dtype_name(pixels.dtype)}", TypeError)
    if dtype not in DTYPES:
        got = check.dtype_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        check.fail("normalise", f"dtype must be float32, bfloat16 or float16, got {got}", TypeError)
    offset, scale = _times_255("mean", mean), _times_255("std", std)
    if min(scale) <= 0:
        check.fail("normalise", f"std must be above 0, got {list(std)}")
    return _normalise(pixels, offset, scale, dtype)


def _times_255(name: str, values: Sequence[float]) -> list[float]:
    """255 times each of three numbers in float32, to be rounded to it."""
    if not isinstance(values, (list, tuple)) or any(isinstance(v, (bool, Tensor)) for v in values):
        check.fail("normalise", f"{name} must be three numbers, got {values!r:.80}", TypeError)
    check.number("normalise", **{f"{name}[{i}]": value for i, value in enumerate(values)})
    if len(values) != 3:
        check.fail("normalise", f"{name} must be three numbers, got {len(values)}")
    products = [255 * _to_24_bits(value) for value in values]
    if not all(abs(product) < FLOAT32_MAX for product in products):
        check.fail("normalise", f"{name} must be finite, and 255 times it in float32, got {list(values)}")
    return products


def _to_24_bits(x: float) -> float:
    """x as float32 rounds it, by Dekker's splitting, which torch.compile traces."""
    product = x * (2**29 + 1)
    return product - (product - x)


@op("normalise")
def _normalise(pixels: Tensor, offset: Sequence[float], scale: Sequence[float], dtype: torch.dtype) -> Tensor:
    offset_C, scale_C = (
        torch.tensor(values, dtype=torch.float32, device=pixels.device).view(1, 3, 1, 1) for values in (offset, scale)
    )
    values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return values.sub_(offset_C).div_(scale_C).to(dtype)


@fake(_normalise)
def _(pixels, offset, scale, dtype):
    return pixels.new_empty(pixels.shape, dtype=dtype)


register_triton(_normalise, lambda: _kernels().normalise)
