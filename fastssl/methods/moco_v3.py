"""MoCo v3: contrast each query with the keys of the batch, symmetrically, with a prediction head; ViTs and ResNets.

Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers", 2021, arXiv:2104.02057. Names in the
state dict are those of the official code.
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, COEFFICIENT, NOT_NEGATIVE, POSITIVE, PROBABILITY, SHARE
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View
from fastssl.distributed import all_gather, rank, world_size
from fastssl.eval.protocols import Official, is_resnet
from fastssl.nn.backbones import build_backbone
from fastssl.nn.heads import mlp_head
from fastssl.nn.losses import l2_normalize
from fastssl.nn.momentum import MomentumEncoder
from fastssl.nn.norm import sync_batch_norms
from fastssl.nn.sharing import headless
from fastssl.nn.vit import MOCO_V3_SIZES, moco_v3_vit
from fastssl.ops import batch_info_nce
from fastssl.train.config import Training, check_images_at_once
from fastssl.train.schedule import cosine_schedule

OFFICIAL = "moco"  # layout of the reference checkpoint


@dataclass
class Config:
    """MoCo v3 as in its paper (section 4) and code: 300 epochs of a ViT, or `paper("resnet50")` for a ResNet."""

    backbone: str = "vit_small"
    """encoder: vit_mini, vit_small, vit_base, vit_conv_small, vit_conv_base, a ResNet (resnet_mini, resnet50, …),
    timm:NAME or torchvision:NAME"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the images in pixels, for a ViT divisible by the patch size"""
    dim: Annotated[int, AT_LEAST_1] = 256
    """dimension of queries and keys"""
    hidden: Annotated[int, AT_LEAST_1] = 4096
    """hidden width of projector and predictor"""
    tau: Annotated[float, POSITIVE] = 0.2
    """temperature τ of the contrastive loss"""
    ema_momentum: Annotated[float, COEFFICIENT] = 0.99
    """momentum coefficient m of the momentum encoder at the start of training"""
    ema_momentum_end: Annotated[float, COEFFICIENT] = 1.0
    """momentum coefficient m at the end of training, reached along a cosine"""
    freeze_patch_embed: bool = True
    """keep the patch embedding at its random initial weights, which stabilises the training of a ViT"""
    small_images: bool = False
    """ResNet stem without stride and pooling, for images of 32 pixels"""
    crop_min: Annotated[float, SHARE] = 0.08
    """smallest fraction of the image area that a crop covers"""
    jitter: Annotated[tuple[float, float, float, float], NOT_NEGATIVE] = (0.4, 0.4, 0.2, 0.1)
    """strengths of brightness, contrast, saturation and hue jitter"""
    blur_p: Annotated[tuple[float, float], PROBABILITY] = (1.0, 0.1)
    """probability of Gaussian blur, one for each view"""
    solarize_p: Annotated[tuple[float, float], PROBABILITY] = (0.0, 0.2)
    """probability of solarization, one for each view"""
    training: Training = field(
        default_factory=lambda: Training(
            epochs=300,
            batch_size=4096,
            optimizer="adamw",
            lr=1.5e-4,
            weight_decay=0.1,
            decay_all=True,
            warmup_epochs=40,
        )
    )

    @classmethod
    def paper(cls, backbone: str = "vit_small") -> "Config":
        """ViT: 300 epochs, AdamW. ResNet: 1000 epochs, LARS, from the code's README, where 100 epochs have learning
        rate 0.6, weight decay 1e-6 and momentum coefficient 0.99, and 300 epochs the same with learning rate 0.3."""
        if not is_resnet(backbone):
            return cls(backbone)
        training = Training(1000, 4096, "lars", lr=0.3, weight_decay=1.5e-6, warmup_epochs=10)
        return cls(backbone, tau=1.0, ema_momentum=0.996, crop_min=0.2, training=training)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(
            epochs=10, batch_size=32, optimizer="sgd", lr=1.2, weight_decay=5e-4, decay_all=True, warmup_epochs=0.5
        )
        return cls(
            "resnet_mini",
            (32, 32),
            128,
            512,
            ema_momentum=0.95,
            crop_min=0.25,
            jitter=(0.4, 0.4, 0.2, 0.5),
            blur_p=(0.0, 0.0),
            solarize_p=(0.0, 0.0),
            training=training,
        )

    @property
    def augmentation(self) -> Augmentation:
        views = [
            View(
                self.image_size,
                crop=(self.crop_min, 1.0),
                jitter=self.jitter,
                jitter_p=0.8,
                grayscale_p=0.2,
                blur_p=blur,
                solarize_p=solarize,
                flip_p=0.5,
            )
            for blur, solarize in zip(self.blur_p, self.solarize_p)
        ]
        return Augmentation(tuple(views))


def linear_probe(backbone: str) -> Official:
    """SGD. Source: Chen et al., 2021 (MoCo v3), section 5 and its code's README: 0.1 for ResNets and 3 for ViTs."""
    lr = 0.1 if is_resnet(backbone) else 3.0
    return Official(90, 1024, "sgd", lr, warmup_epochs=0, lr_by_epoch=True, standardise=False, interpolation="bilinear")


def build(config: Config) -> "MoCoV3":
    check_images_at_once(config.training, 2, "moco_v3", "an image is contrasted with the others of its batch")
    name, hidden, dim = config.backbone, config.hidden, config.dim
    widths = (hidden, dim) if is_resnet(name) else (hidden, hidden, dim)
    if name in MOCO_V3_SIZES:
        encoder = moco_v3_vit(name, config.image_size, config.freeze_patch_embed)
        encoder.head = mlp_head(encoder.norm.normalized_shape[0], *widths, last_norm="plain")
    elif is_resnet(name) or ":" in name:
        encoder = build_backbone(name, dim, config.small_images, zero_init_residual=True, image_size=config.image_size)
        encoder.fc = mlp_head(encoder.fc.in_features, *widths, last_norm="plain")
    else:
        raise ValueError(
            f"moco_v3: unknown backbone {name!r}, there are {', '.join(MOCO_V3_SIZES)}, ResNets, timm:NAME and "
            "torchvision:NAME"
        )
    predictor = mlp_head(dim, hidden, dim, last_norm="none" if is_resnet(name) else "plain")
    return sync_batch_norms(MoCoV3(encoder, predictor, config.tau, config.ema_momentum, config.ema_momentum_end))


class MoCoV3(nn.Module):
    """Base encoder with projector, predictor, and momentum encoder (the paper's algorithm 1).

    Args:
        base_encoder: backbone whose last layer, `head` or `fc`, is the projector.
        predictor: prediction head, applied to the queries only.
        tau: temperature τ.
        momentum: momentum coefficient m at the start of training.
        momentum_end: momentum coefficient m at the end of training.
    """

    def __init__(
        self,
        base_encoder: nn.Module,
        predictor: nn.Module,
        tau: float = 0.2,
        momentum: float = 0.99,
        momentum_end: float = 1.0,
    ):
        super().__init__()
        if not tau > 0:
            raise ValueError(f"MoCoV3: tau must be > 0, got {tau}")
        self.tau, self.momentum, self.momentum_end = tau, momentum, momentum_end
        self.base_encoder = base_encoder
        self.momentum_encoder = MomentumEncoder(base_encoder, momentum)
        self.predictor = predictor
        self.projector_name = "head" if hasattr(base_encoder, "head") else "fc"

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        (loss1, rank1), (loss2, rank2) = self.directions(batch)
        return loss1 + loss2, {"top1": (torch.cat([rank1, rank2]) == 0).float().mean()}

    def directions(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Loss and rank of each query's positive key [B]: queries of either view among the keys of the other view."""
        q1, q2 = (l2_normalize(self.predictor(self.base_encoder(view))) for view in batch.views)
        k1, k2 = (l2_normalize(self.momentum_encoder(view)) for view in batch.views)
        with record_function("loss"):
            return [self.contrast(q1, k2), self.contrast(q2, k1)]

    def ranks(self, batch: Batch) -> tuple[Tensor, int]:
        """Number of negative keys that score above each query's positive key [Q], and the number of negative keys."""
        ranks = torch.cat([rank for _, rank in self.directions(batch)])
        return ranks, world_size() * len(batch.views[0]) - 1

    def contrast(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """2τ · mean InfoNCE of the queries among the keys of all ranks, and the rank of each query's positive key."""
        loss, key_rank = batch_info_nce(q, all_gather(k), self.tau, label_offset=rank() * k.shape[0])
        return 2 * self.tau * loss.mean(), key_rank

    def before_step(self, progress: float) -> None:
        """The forward pass of MoCo v3 has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """Update the momentum encoder. The reference does so at the start of the next step, with the momentum
        coefficient of that step."""
        self.momentum_encoder.update(self.base_encoder, self.momentum_at(progress))

    def momentum_at(self, progress: float) -> float:
        """Momentum coefficient of the momentum encoder's update at `progress`."""
        return cosine_schedule(self.momentum, self.momentum_end, progress)

    @property
    def encoder(self) -> nn.Module:
        """The base encoder without its projector; names of timm or torchvision."""
        return headless(self.base_encoder, self.projector_name)

    def features(self, images: Tensor) -> Tensor:
        """Features of the base encoder [B, F], before its projector."""
        return self.encoder(images)
