"""Masked autoencoder: encode a quarter of the patches, predict the pixels of the rest.

He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021, arXiv:2111.06377. Only kept patches are embedded,
and only masked patches are predicted in training. Names in the state dict are those of the official code.
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Generator, Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, PROBABILITY, SHARE
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View
from fastssl.eval.protocols import Official
from fastssl.nn.linear import Linear
from fastssl.nn.masking import num_kept_tokens, seeded_noise
from fastssl.nn.norm import ResidualNorm
from fastssl.nn.sharing import shared_copy
from fastssl.nn.vit import SIZES, Block, ViT, sincos_positions, xavier_
from fastssl.ops import Masking, check, keep_patches, masked_patch_mse, random_masking, restore_tokens
from fastssl.train.config import Training

OFFICIAL = "mae"  # layout of the reference checkpoint


@dataclass
class Config:
    """MAE as in the paper (sections 3 and 4, appendix A.1, table 8), with its effective batch size and epochs."""

    backbone: str = "vit_base"
    """encoder: vit_mini, vit_tiny, vit_small, vit_base, vit_large or vit_huge"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the images in pixels, divisible by the patch size"""
    mask_ratio: Annotated[float, PROBABILITY] = 0.75
    """fraction of patches that are masked"""
    norm_pix: bool = True
    """predict pixels standardised by the mean and variance of their patch"""
    decoder_dim: Annotated[int, AT_LEAST_1] = 512
    """width of the decoder"""
    decoder_depth: Annotated[int, AT_LEAST_1] = 8
    """number of transformer blocks of the decoder"""
    decoder_heads: Annotated[int, AT_LEAST_1] = 16
    """number of attention heads of the decoder"""
    crop_min: Annotated[float, SHARE] = 0.2
    """smallest fraction of the image area that a training crop covers"""
    flip_p: Annotated[float, PROBABILITY] = 0.5
    """probability of a horizontal flip"""
    training: Training = field(
        default_factory=lambda: Training(
            epochs=800,
            batch_size=4096,
            optimizer="adamw",
            lr=1.5e-4,
            weight_decay=0.05,
            betas=(0.9, 0.95),
            warmup_epochs=40,
        )
    )

    @classmethod
    def paper(cls, backbone: str = "vit_base") -> "Config":
        return cls(backbone)  # the same numbers for all sizes

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(
            epochs=40, batch_size=64, optimizer="adamw", lr=6e-3, weight_decay=0.05, betas=(0.9, 0.95), warmup_epochs=4
        )
        return cls(
            "vit_mini",
            (32, 32),
            decoder_dim=64,
            decoder_depth=2,
            decoder_heads=4,
            crop_min=0.5,
            flip_p=0.0,
            training=training,
        )

    @property
    def augmentation(self) -> Augmentation:
        crop = (self.crop_min, 1.0)
        return Augmentation((View(self.image_size, crop=crop, interpolation="bicubic", flip_p=self.flip_p),))


def linear_probe(backbone: str) -> Official:
    """LARS on standardised features. Source: He et al., 2021 (MAE), appendix A.1, table 10."""
    return Official()


def build(config: Config) -> "MAE":
    if config.backbone not in SIZES:
        raise ValueError(f"mae: unknown backbone {config.backbone!r}, there are {', '.join(SIZES)}")
    dim, depth, heads, patch = SIZES[config.backbone]
    return MAE(
        config.image_size,
        patch,
        3,
        dim,
        depth,
        heads,
        config.decoder_dim,
        config.decoder_depth,
        config.decoder_heads,
        norm_pix_loss=config.norm_pix,
        mask_ratio=config.mask_ratio,
    )


class MAE(ViT):
    """Masked autoencoder: a ViT as the encoder, and a decoder that is discarded after pretraining.

    Arguments are those of the official code without `norm_layer`; `img_size` may be (height, width), and `mask_ratio`
    is an argument.
    """

    tables = ("pos_embed", "decoder_pos_embed")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
        mask_ratio: float = 0.75,
    ):
        super().__init__(img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio)
        self.norm_pix_loss, self.mask_ratio = norm_pix_loss, mask_ratio
        self.length = self.grid[0] * self.grid[1]
        self.keep = num_kept_tokens("MAE", self.length, mask_ratio, min_masked=1)
        self.decoder_embed = Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_embed_dim, self.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = ResidualNorm(decoder_embed_dim)
        self.decoder_pred = Linear(decoder_embed_dim, patch_size**2 * in_chans)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(xavier_)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        (images,) = batch.views
        noise = None if batch.seed is None else seeded_noise(self.length, batch.seed)
        return self.loss(images, noise), {}

    def before_step(self, progress: float) -> None:
        """MAE has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """MAE has no state beside its parameters."""

    def loss(self, images: Tensor, noise: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """Mean squared error of the masked patches, a scalar. The mask follows from `noise` [B, L], which is drawn with
        `generator` if None."""
        masking = self.masking(images, noise, generator)
        tokens = self.decode(self.encode_kept(images, masking), masking, ids=1 + masking.ids_masked)
        pred = self.decoder_pred(tokens)
        with record_function("loss"):
            return masked_patch_mse(pred, images, masking.ids_masked, self.patch_size, self.norm_pix_loss)

    def reconstruct(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predictions of all patches [B, L, P] and the mask [B, L]: 0 kept, 1 removed."""
        masking = self.masking(images, noise)
        tokens = self.decode(self.encode_kept(images, masking), masking)[:, 1:]
        return self.decoder_pred(tokens), masking.mask

    def masking(self, images: Tensor, noise: Tensor | None = None, generator: Generator | None = None) -> Masking:
        """Masking of images [B, C, H, W]: the patches of smallest `noise` [B, L] are kept; uniform noise if None."""
        self.check_images(images)
        if noise is None:
            noise = torch.rand(images.shape[0], self.length, device=images.device, generator=generator)
        check.tensor("MAE", "noise", noise, "B L", B=images.shape[0], L=self.length)
        return random_masking(noise, self.keep)

    def encode_kept(self, images: Tensor, masking: Masking) -> Tensor:
        """Encoded tokens [B, 1 + keep, D]: the class token, then the kept patches in the order of their noise."""
        tokens = self.patch_embed(keep_patches(images, masking.ids_keep, self.patch_size))
        return self.encode(tokens + self.pos_embed[0, 1:][masking.ids_keep])

    def decode(self, latent: Tensor, masking: Masking, ids: Tensor | None = None) -> Tensor:
        """Encoded tokens [B, 1 + keep, D] → normalised decoder tokens in image order [B, 1 + L, D_decoder], or with
        `ids` [B, M] those tokens alone [B, M, D_decoder]."""
        x = restore_tokens(self.decoder_embed(latent), self.mask_token, masking.ids_restore, self.decoder_pos_embed)
        delta, (*blocks, last) = None, self.decoder_blocks
        for block in blocks:
            x, delta = block(x, delta)
        return self.decoder_norm(*last(x, delta, ids))[1]

    @property
    def encoder(self) -> ViT:
        """The ViT without the decoder, in timm's names."""
        return shared_copy(self, ViT, without=("decoder_*", "mask_token"))
