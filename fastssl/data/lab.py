"""CIE Lab, the colour space of CMC's views."""

import torch
from torch import Tensor

# sRGB with the white point D65, at an observer's angle of 2°
_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)
# mean and half range of L, a, b, with which CMC's code normalises them
LAB_MEAN = (50.0, 6.025, -6.6895)
LAB_STD = (50.0, 92.208, 101.1675)


def rgb_to_lab(images: Tensor) -> Tensor:
    """L in [0, 100], a and b of sRGB images.

    Equals skimage's ``rgb2lab``, which CMC's code calls.

    Args:
        images: [B, 3, H, W] floating, in [0, 1].

    Source: CIE 15:2004; IEC 61966-2-1:1999 (sRGB).
    """
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)
    matrix = images.new_tensor(_TO_XYZ) / images.new_tensor(_WHITE).view(3, 1)
    xyz = torch.einsum("dc,bchw->bdhw", matrix, linear)
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
