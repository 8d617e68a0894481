"""CIE Lab, the colour space of CMC's two views of an image."""

import torch
from torch import Tensor

# sRGB to XYZ with the white point D65 (IEC 61966-2-1), and that white point for an observer of 2°.
_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)
# centres and half widths of the ranges of L, a and b that sRGB colours have, with which CMC's code normalises them
LAB_MEAN = (50.0, 6.025, -6.6895)
LAB_STD = (50.0, 92.208, 101.1675)


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """CIE L*a*b* of sRGB colours: L from 0 to 100, a and b around 0.

    Args:
        rgb: [B, 3, H, W] floating, from 0 to 1; computed in float32 or wider.

    Returns: [B, 3, H, W], as scikit-image's ``rgb2lab`` with its defaults (D65, 2°).

    Source: CIE 15:2004, section 8.2.1; IEC 61966-2-1.
    """
    rgb = rgb.to(torch.promote_types(rgb.dtype, torch.float32))
    linear = torch.where(rgb > 0.04045, ((rgb.clamp_min(0) + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    # Sums of products, not a matrix product, which autocast or tf32 would round.
    r, g, b = linear.unbind(1)
    xyz = [(row[0] * r + row[1] * g + row[2] * b) / white for row, white in zip(_XYZ, _WHITE)]
    x, y, z = (torch.where(t > 0.008856, t.clamp_min(0.008856) ** (1 / 3), 7.787 * t + 16 / 116) for t in xyz)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def lab_channels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(L [B, 1, H, W], ab [B, 2, H, W]) of normalised RGB images, each from about −1 to 1.

    Args:
        images: [B, 3, H, W], sRGB from which `mean` was subtracted and that was divided by `std`.
        mean, std: one number for each of red, green and blue.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))

    def per_channel(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None]

    lab = rgb_to_lab(images * per_channel(std) + per_channel(mean))
    lab = (lab - per_channel(LAB_MEAN)) / per_channel(LAB_STD)
    return lab[:, :1], lab[:, 1:]
