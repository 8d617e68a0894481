"""BEiT's own discrete autoencoder, "customized" in its code, with the names of its weights.

Its codes pick rows of a codebook, which the decoder gets; the loss is the mean squared error of the pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.ops import check

from .gumbel import relax

HALF = (0.5, 0.5, 0.5)


class ResBlock(nn.Module):
    """x plus three convolutions of it."""

    def __init__(self, width: int):
        super().__init__()
        inner = (nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.net = nn.Sequential(*inner, nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class BEiTVAE(nn.Module):
    """Images → logits → codes → rows of the codebook → pixels, and the tokenizer that takes the largest logits.

    Args:
        width: channels.
        vocabulary: number of codes.
        layers: number of convolutions that halve the image, so that the stride is 2^layers.
        codebook: width of a row of the codebook.
        mean, std: normalisation of the images that are given and made.

    Source: microsoft/unilm, beit/modeling_discrete_vae.py, whose tokenizers have width 256, 8,192 codes of 512 numbers
        and 3 layers.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        width: int = 256,
        vocabulary: int = 8192,
        layers: int = 3,
        codebook: int = 512,
        mean: tuple[float, float, float] = HALF,
        std: tuple[float, float, float] = HALF,
    ):
        super().__init__()
        self.vocabulary, self.stride, self.mean, self.std = vocabulary, 2**layers, mean, std
        self.num_features = width
        self.codebook = nn.Embedding(vocabulary, codebook)
        encoder, decoder = [], []
        for i in range(layers):
            down = nn.Conv2d(width if i else 3, width, 4, stride=2, padding=1)
            up = nn.ConvTranspose2d(width if i else codebook, width, 4, stride=2, padding=1)
            encoder += [nn.Sequential(down, nn.ReLU()), ResBlock(width)]
            decoder += [nn.Sequential(up, nn.ReLU()), ResBlock(width)]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(width, vocabulary, 1))
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(width, 3, 1))
        # the network's own images are normalised by one half
        ratio = [torch.tensor(x) / 0.5 for x in (std, [m - 0.5 for m in mean])]
        self.register_buffer("scale", ratio[0].view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", ratio[1].view(1, 3, 1, 1), persistent=False)

    @staticmethod
    def parts(prefix: str) -> tuple[str, ...]:
        """Beginnings of the names of weights behind a prefix."""
        return tuple(f"{prefix}{part}." for part in ("codebook", "encoder", "decoder"))

    @staticmethod
    def sizes(weights: dict[str, Tensor]) -> tuple[int, int, int, int]:
        """Width, vocabulary, layers and width of the codebook of weights."""
        layers = sum(name.endswith(".net.0.weight") for name in weights if name.startswith("encoder."))
        width = weights["decoder.1.net.0.weight"].shape[0] if "decoder.1.net.0.weight" in weights else 1
        vocabulary, codebook = weights["codebook.weight"].shape
        return width, vocabulary, layers, codebook

    @property
    def tokenizer(self) -> "BEiTVAE":
        """The module that makes codes: this one."""
        return self

    def hidden(self, images: Tensor) -> Tensor:
        """What the last convolution gets [B, width, h, w]."""
        check.tensor("BEiTVAE", "images", images, "B 3 H W", **{"3": 3})
        if images.shape[2] % self.stride or images.shape[3] % self.stride:
            got = f"{images.shape[2]}×{images.shape[3]}"
            raise ValueError(f"BEiTVAE: height and width of images must be divisible by {self.stride}, got {got}")
        return self.encoder[:-1](torch.addcmul(self.shift, images, self.scale))

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, V, h, w] of normalised images [B, 3, H, W]."""
        logits = self.encoder[-1](self.hidden(images))
        return logits if logits.dtype == torch.float64 else logits.float()

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """Codes [B, h, w] int64 of normalised images [B, 3, H, W]."""
        return self.logits(images).argmax(1)

    @torch.no_grad()
    def autoencode(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] as their codes show them, normalised alike."""
        return (self._decoded(self.codes(images)) - self.shift) / self.scale

    @torch.no_grad()
    def pixels(self, codes: Tensor) -> Tensor:
        """Images [B, 3, H, W] from 0 to 1 that the decoder makes of codes [B, h, w] int64."""
        return (self._decoded(codes) * 0.5 + 0.5).clamp(0, 1)

    def _decoded(self, codes: Tensor) -> Tensor:
        """Images of codes, normalised by one half."""
        return self.decoder(self.codebook(codes).permute(0, 3, 1, 2))

    def losses(self, images: Tensor, gumbel: Tensor, tau: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Mean squared error of the pixels, normalised by one half; mean divergence of the codes of a place from
        uniform ones; and the most likely codes [B, h, w]. Arguments as of `DiscreteVAE.losses`.

        The code adds its weight times the *sum* of the divergence over batch and places, since torch's "batchmean"
        divides by the first dimension of the uniform distribution there, which is 1. Its weight is 0 by default.
        """
        logits = self.logits(images)
        relaxed, divergence = relax(logits, gumbel.to(logits.dtype), tau)
        rows = torch.einsum("bvhw,vd->bdhw", relaxed, self.codebook.weight)
        error = F.mse_loss(self.decoder(rows).to(logits.dtype), torch.addcmul(self.shift, images, self.scale))
        return error, divergence.mean(), logits.detach().argmax(1)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, F]: the mean over the places of what the last convolution gets."""
        return self.hidden(images).mean((2, 3))
