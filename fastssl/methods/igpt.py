"""iGPT: predict an image's pixels one after another as codes of a palette, or those that are masked.

Chen et al., "Generative Pretraining from Pixels", 2020. The palette is found by k-means before the first step.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, NOT_NEGATIVE, PROBABILITY, SHARE
from fastssl.contract import Batch, TrainingImages
from fastssl.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, Augmentation, View
from fastssl.eval.protocols import Official
from fastssl.nn.igpt import SIZES, ImageGPT, PixelEncoder, draw_rest
from fastssl.nn.linear import Linear
from fastssl.nn.masking import seeded_noise
from fastssl.nn.palette import Palette
from fastssl.nn.sharing import shared_copy
from fastssl.ops import linear_cross_entropy
from fastssl.train.config import Training

OFFICIAL = "imagegpt"  # Hugging Face's layout
_MASK, _DRAW = 0x6D61736B, 0x64726177  # keep these draws independent of others from the same seeds


@dataclass
class Config:
    """iGPT as in its paper (section 3 and appendix), for ImageNet at 32 by 32 pixels."""

    backbone: str = "igpt_small"
    """encoder: igpt_mini, igpt_small, igpt_medium or igpt_large"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (32, 32)
    """height and width of the images in pixels; their product is the length of the sequence: 32 32, 48 48 or 64 64"""
    objective: Literal["autoregressive", "bert"] = "autoregressive"
    """what is predicted: each pixel from those before it (autoregressive), or masked pixels from the others (bert)"""
    mask_p: Annotated[float, SHARE] = 0.15
    """probability that a pixel is masked, each pixel by itself, with --objective bert"""
    colours: Annotated[int, AT_LEAST_1] = 512
    """number of colours of the palette"""
    palette: str | None = None
    """.npy file with the palette, floats [colours, 3] in -1 ... 1; by default k-means over pixels of the images"""
    probe_layer: Annotated[int | None, NOT_NEGATIVE] = None
    """block whose input, averaged over the sequence, is an image's features; by default the middle one"""
    crop_min: Annotated[float, SHARE] = 0.34
    """smallest fraction of the image area that a training crop covers: 224 pixels of a shorter side of 384"""
    flip_p: Annotated[float, PROBABILITY] = 0.5
    """probability of a horizontal flip"""
    training: Training = field(
        default_factory=lambda: Training(
            100, 128, "adamw", lr=6e-3, weight_decay=0.0, betas=(0.9, 0.95), warmup_epochs=1
        )
    )

    def __post_init__(self):
        if self.palette is not None:  # a run can be resumed from any folder
            self.palette = str(Path(self.palette).expanduser().absolute())

    @classmethod
    def paper(cls, backbone: str = "igpt_small") -> "Config":
        config = cls(backbone)
        config.training.lr = 2e-3 if backbone == "igpt_large" else 6e-3  # 1e-3 and 3e-3 for a batch of 128
        return config

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(6, 16, "adamw", lr=0.08, weight_decay=0.0, betas=(0.9, 0.95), warmup_epochs=0.5)
        return cls("igpt_mini", (16, 16), colours=32, crop_min=0.8, flip_p=0.0, training=training)

    @property
    def augmentation(self) -> Augmentation:
        crop = (self.crop_min, 1.0)
        return Augmentation((View(self.image_size, crop=crop, flip_p=self.flip_p),))


def linear_probe(backbone: str) -> Official:
    """SGD on standardised features; the paper does not state the numbers of its probe."""
    return Official(100, 256, "sgd", 0.1, warmup_epochs=0)


def build(config: Config) -> "IGPT":
    if config.backbone not in SIZES:
        raise ValueError(f"igpt: unknown backbone {config.backbone!r}, there are {', '.join(SIZES)}")
    dim, depth, heads = SIZES[config.backbone]
    layer = depth // 2 if config.probe_layer is None else config.probe_layer
    if layer > depth:
        raise ValueError(f"igpt: --probe-layer must be at most the {depth} blocks of {config.backbone}, got {layer}")
    palette = Palette(config.colours, IMAGENET_MEAN, IMAGENET_STD, config.palette)
    network = ImageGPT(config.colours, math.prod(config.image_size), dim, depth, heads)
    if config.objective == "bert":
        return MaskedIGPT(palette, network, layer, config.mask_p)
    return AutoregressiveIGPT(palette, network, layer, config.image_size)


class IGPT(PixelEncoder):
    """Palette, transformer, and the layer `lm_head` that predicts codes and starts at zero; a subclass has the loss."""

    def __init__(self, palette: Palette, transformer: ImageGPT, causal: bool, probe_layer: int):
        super().__init__(palette, transformer, causal, probe_layer)
        self.lm_head = Linear(transformer.wte.embedding_dim, transformer.colours, bias=False)
        nn.init.zeros_(self.lm_head.weight)

    def nats(self, codes: Tensor, masked: Tensor | None = None) -> Tensor:
        """−ln of the probability of each code [B, L]; with a mask 0 where it is False."""
        outputs = self.transformer(codes, masked, self.causal)
        target = codes if masked is None else codes.masked_fill(~masked, -100)
        with record_function("loss"):
            losses = linear_cross_entropy(outputs.flatten(0, 1), self.lm_head.weight, 1.0, target.flatten())
        return losses.view(codes.shape)

    def check_images(self, count: int, in_epoch: int) -> None:
        self.palette.check_file()

    def before_epoch(self, images: TrainingImages) -> None:
        """Find or read the palette before the first epoch."""
        if not self.palette.is_set:
            self.palette.prepare(((batch.views[0], batch.index) for batch in images.plain()), images.count)

    def before_step(self, progress: float) -> None:
        """iGPT has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """iGPT has no state that changes with a step, beside its parameters."""

    @property
    def encoder(self) -> PixelEncoder:
        """Palette and transformer, without the layer that predicts codes."""
        return shared_copy(self, PixelEncoder, without=("lm_head",))


class AutoregressiveIGPT(IGPT):
    """Each code is predicted from those before it."""

    def __init__(self, palette: Palette, transformer: ImageGPT, probe_layer: int, image_size: tuple[int, int]):
        super().__init__(palette, transformer, True, probe_layer)
        self.image_size = image_size

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.nats(self.palette.codes(batch.views[0])).mean()
        return loss, {"nats_per_pixel": loss.detach()}

    def complete(self, images: Tensor, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """Images [N, 3, H, W] whose upper half is that of `images` in the palette's colours, the rest drawn."""
        given = self.palette.codes(images)[:, : self.image_size[0] // 2 * self.image_size[1]]
        numbers = torch.arange(len(images), device=images.device)
        noise = seeded_noise(self.transformer.length, _DRAW, seed, numbers)
        codes = draw_rest(self.transformer, self.lm_head, given, noise, temperature)
        return self.palette.images(codes, self.image_size)


class MaskedIGPT(IGPT):
    """Masked codes are predicted from the others."""

    def __init__(self, palette: Palette, transformer: ImageGPT, probe_layer: int, mask_p: float):
        super().__init__(palette, transformer, False, probe_layer)
        self.mask_p = mask_p

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        codes = self.palette.codes(batch.views[0])
        masked = seeded_noise(codes.shape[1], _MASK, batch.seeds()) <= self.mask_p
        loss = self.masked_loss(codes, masked)
        return loss, {"nats_per_pixel": loss.detach()}

    def masked_loss(self, codes: Tensor, masked: Tensor) -> Tensor:
        """Mean over an image's masked codes, then over the images; an image without any counts as 0."""
        return (self.nats(codes, masked).sum(1) / masked.sum(1).clamp(min=1)).mean()
