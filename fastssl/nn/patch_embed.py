"""Patch embeddings of a vision transformer."""

import itertools

from torch import Tensor, nn

from fastssl.ops import linear


class PatchEmbed(nn.Module):
    """Linear embedding of patches. Its weight has the shape of the convolution it equals: [D, C, p, p]."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Patches [B, M, P] of `patchify` or `keep_patches` → tokens [B, M, D]."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # [D, p·p·C], channel last like the patches
        return linear(patches, weight, self.proj.bias)


class ConvStem(nn.Module):
    """Four 3×3 convolutions of stride 2 and a 1×1 convolution, in place of an embedding of patches of 16 pixels.

    Source: Xiao et al., "Early Convolutions Help Transformers See Better", 2021; MoCo v3's `vit_conv_*`.
    """

    def __init__(self, in_chans: int, embed_dim: int):
        super().__init__()
        widths = [in_chans, *(embed_dim // 8 * 2**i for i in range(4))]
        layers: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 3, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] → [B, L, D]."""
        return self.proj(images).flatten(2).transpose(1, 2)
