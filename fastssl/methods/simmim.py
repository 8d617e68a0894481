"""SimMIM: predict the pixels of masked squares by one linear layer on a ViT that sees a mask token in their place.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", 2022, arXiv:2111.09886. Names in the state dict are
those of the official code.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, PROBABILITY, SHARE
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View
from fastssl.nn.beit import BEIT_SIZES, Beit, decay_groups, patch_size_for
from fastssl.nn.masking import seeded_noise
from fastssl.nn.sharing import save_child_as
from fastssl.nn.vit import without_mask_token
from fastssl.ops import keep_patches, keep_tokens, linear, random_masking
from fastssl.train.config import Training

OFFICIAL = "simmim"  # layout of the reference checkpoint


@dataclass
class Config:
    """SimMIM as in its paper (section 4.1) and its code's configuration of ViT-B: 800 epochs at 224 pixels."""

    backbone: str = "vit_base"
    """encoder: vit_mini, vit_tiny, vit_small, vit_base or vit_large"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the images in pixels, divisible by --mask-size"""
    mask_size: Annotated[int, AT_LEAST_1] = 32
    """side of the masked squares in pixels, a multiple of the patch size"""
    mask_ratio: Annotated[float, PROBABILITY] = 0.6
    """fraction of the squares that are masked, rounded up to whole squares"""
    layer_scale: Annotated[float, NOT_NEGATIVE] = 0.1
    """initial value of LayerScale's factors; 0 for no LayerScale"""
    drop_path: Annotated[float, BELOW_1] = 0.1
    """rate of stochastic depth in the last block"""
    crop_min: Annotated[float, SHARE] = 0.67
    """smallest fraction of the image area that a training crop covers"""
    flip_p: Annotated[float, PROBABILITY] = 0.5
    """probability of a horizontal flip"""
    training: Training = field(
        default_factory=lambda: Training(
            *(800, 2048, "adamw", 5e-5, 0.05),
            warmup_epochs=10,
            warmup_lr=2.5e-7,
            lr_drops=(700,),
            clip_parameter_norm=5.0,
        )
    )

    @classmethod
    def paper(cls, backbone: str = "vit_base") -> "Config":
        return cls(backbone)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(50, 32, "adamw", 6e-3, 0.05, warmup_epochs=4, clip_parameter_norm=5.0)
        options = {"layer_scale": 0.0, "drop_path": 0.0, "crop_min": 0.85, "flip_p": 0.0}
        return cls("vit_mini", (24, 24), 8, **options, training=training)

    @property
    def augmentation(self) -> Augmentation:
        crop = (self.crop_min, 1.0)
        return Augmentation((View(self.image_size, crop=crop, interpolation="bicubic", flip_p=self.flip_p),))


def parameter_groups(method: nn.Module) -> list[dict]:
    """Vectors, biases, class token and mask token have no weight decay; the gradient is clipped as a whole."""
    return decay_groups(method, ("cls_token", "mask_token"))


def build(config: Config) -> "SimMIM":
    patch = patch_size_for("simmim", config.backbone, config.image_size)
    if config.mask_size % patch or any(side % config.mask_size for side in config.image_size):
        height, width = config.image_size
        raise ValueError(
            f"simmim: --mask-size must be a multiple of the patch size {patch} that divides --image-size {height} "
            f"{width}, got {config.mask_size}"
        )
    squares = math.prod(config.image_size) // config.mask_size**2
    if not 0 < math.ceil(config.mask_ratio * squares) < squares:
        expected = f"mask at least one of {squares} squares and keep one"
        raise ValueError(f"simmim: --mask-ratio must {expected}, got {config.mask_ratio}")
    return SimMIM(config)


class SimMIM(nn.Module):
    """BEiT's ViT with shared relative positions, and a linear decoder (the paper's figure 1)."""

    norm_pix_loss = False  # `reconstruct` predicts pixels as they are

    def __init__(self, config: Config):
        super().__init__()
        dim, depth, heads, patch = BEIT_SIZES[config.backbone]
        options = {"init_values": config.layer_scale, "drop_path_rate": config.drop_path}
        size = config.image_size
        self.vit = Beit(size, patch, 3, dim, depth, heads, fc_norm=False, mask_token=True, **options)
        self.decoder = nn.Sequential(nn.Conv2d(dim, 3 * patch**2, 1))  # the official code has a pixel shuffle after it
        save_child_as(self, "vit", "encoder")
        self.patch_size, self.length = patch, self.vit.grid[0] * self.vit.grid[1]
        self.squares = size[0] // config.mask_size, size[1] // config.mask_size
        self.square = config.mask_size // patch  # side of a square in patches
        self.kept = self.squares[0] * self.squares[1] - math.ceil(config.mask_ratio * math.prod(self.squares))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        (images,) = batch.views
        return self.loss(images, self.mask(seeded_noise(math.prod(self.squares), batch.seeds()))), {}

    def before_step(self, progress: float) -> None:
        """SimMIM has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """SimMIM has no state beside its parameters."""

    def mask(self, noise: Tensor) -> Tensor:
        """Masks of patches [B, L] bool: the squares of smallest `noise` [B, squares] are kept."""
        squares = random_masking(noise, self.kept).mask.bool().unflatten(1, self.squares)
        return squares.repeat_interleave(self.square, 1).repeat_interleave(self.square, 2).flatten(1)

    def predict(self, tokens: Tensor) -> Tensor:
        """Patches [B, M, P] of tokens [B, M, D], in the order of `patchify`: channels last."""
        conv, patch = self.decoder[0], self.patch_size
        weight, bias = (x.view(3, patch, patch, -1).permute(1, 2, 0, 3) for x in (conv.weight, conv.bias))
        return linear(tokens, weight.flatten(0, 2).flatten(1), bias.flatten())

    def loss(self, images: Tensor, mask: Tensor) -> Tensor:
        """Mean absolute error of the pixels of masked patches, a scalar. All masks [B, L] remove as many patches."""
        tokens = self.vit.forward_features(images, mask)[:, 1:]
        with record_function("loss"):
            masked = self.length - self.kept * self.square**2
            ids = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :masked]
            target = keep_patches(images, ids, self.patch_size)
            error = (self.predict(keep_tokens(tokens, ids)).to(target.dtype) - target).abs().sum() / 3
            return error / (target.numel() / 3 + 1e-5)

    def reconstruct(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predictions of all patches [B, L, P] and the mask [B, L]: 0 kept, 1 removed."""
        noise = torch.rand(len(images), self.length, device=images.device) if noise is None else noise
        mask = self.mask(noise[:, : math.prod(self.squares)].contiguous())
        return self.predict(self.vit.forward_features(images, mask)[:, 1:]), mask.float()

    @property
    def encoder(self) -> Beit:
        """The ViT without its mask token, in timm's names; its features are the mean of the patches."""
        return without_mask_token(self.vit)

    def features(self, images: Tensor) -> Tensor:
        return self.vit.features(images)
