"""Codes of image patches by a tokenizer (`nn.dvae`), and a layer that predicts them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.ops import linear_cross_entropy

from .linear import Linear

ROWS = 1024  # logits of so many features are computed at once for their largest


class CodeHead(Linear):
    """Linear layer from features to one logit for each code; state dict and initial weights are those of `Linear`.

    Args:
        dim: width of the features.
        codes: number of codes; None for DALL-E's 8,192, until a state dict is loaded, which may have any number.
    """

    def __init__(self, dim: int, codes: int | None = None):
        super().__init__(dim, 8192 if codes is None else codes)
        if codes is None:
            self.register_load_state_dict_pre_hook(_resize)

    def cross_entropy(self, x: Tensor, codes: Tensor) -> Tensor:
        """Cross entropy [M] of the codes' softmax, in float32 or wider.

        Equals ``F.cross_entropy(self(x), codes, reduction="none")`` without its logits [M, K].

        Args:
            x: [M, D] features. Gradient.
            codes: [M] int64, −100 for a row that is ignored.
        """
        # The op has no bias: here it is one more column of the weight. Eight columns keep rows aligned in 16 bits.
        ones = F.pad(x.new_ones(x.shape[0], 1), (0, 7))
        bias = F.pad(self.bias[:, None], (0, 7))
        return linear_cross_entropy(torch.cat([x, ones], 1), torch.cat([self.weight, bias], 1), 1.0, codes)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The most likely code of each feature, [M, D] → [M] int64."""
        return torch.cat([self(rows).argmax(1) for rows in x.split(ROWS)])


def _resize(head: CodeHead, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Hook before `load_state_dict`: gives the head as many codes as the state dict has."""
    weight = state.get(f"{prefix}weight")
    if weight is not None and len(weight) != head.out_features:
        head.out_features = len(weight)
        head.weight = nn.Parameter(head.weight.new_empty(len(weight), head.in_features))
        head.bias = nn.Parameter(head.bias.new_empty(len(weight)))


@torch.no_grad()
def codes_of_pixels(tokenizer: Any, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Codes [B, rows, columns] int64 of images [B, 3, H, W] from 0 to 1, resized to the tokenizer's stride a code."""
    size = [tokenizer.stride * side for side in grid]
    pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (tokenizer.mean, tokenizer.std))
    with torch.autocast(pixels.device.type, enabled=False):
        return tokenizer.codes((pixels - mean) / std)


@torch.no_grad()
def pixels_of_codes(tokenizer: Any, codes: Tensor, size: tuple[int, int]) -> Tensor:
    """Images [B, 3, *size] from 0 to 1 that the tokenizer's decoder makes of codes [B, rows, columns]."""
    with torch.autocast(codes.device.type, enabled=False):
        return F.interpolate(tokenizer.pixels(codes), size, mode="bicubic", antialias=True).clamp(0, 1)
