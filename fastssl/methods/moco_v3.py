"""MoCo v3: keys of the batch itself, symmetric, with a prediction head, for ViTs and ResNets.

Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers", 2021, arXiv:2104.02057. Names in the
state dict are those of the official code.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View
from fastssl.distributed import all_gather, rank, world_size
from fastssl.eval.protocols import Official
from fastssl.nn.heads import moco_v3_head
from fastssl.nn.losses import l2_normalize
from fastssl.nn.momentum import MomentumEncoder, cosine_momentum
from fastssl.nn.norm import sync_batch_norms
from fastssl.nn.resnet import build_resnet
from fastssl.nn.sharing import headless
from fastssl.nn.vit import MOCO_V3_SIZES, moco_v3_vit
from fastssl.ops import batch_info_nce
from fastssl.train.config import Training

OFFICIAL = "moco"  # layout of the reference checkpoint


@dataclass
class Config:
    """MoCo v3 as in its paper (section 4) and code: a ViT of 300 epochs; `paper` has the ResNet's numbers too."""

    backbone: str = "vit_small"
    """vit_mini, vit_small, vit_base, vit_conv_small, vit_conv_base, or a ResNet: resnet_mini, resnet50, …"""
    image_size: tuple[int, int] = (224, 224)
    """height and width in pixels, for a ViT divisible by the patch"""
    dim: int = 256
    """width of queries and keys"""
    hidden: int = 4096
    """width inside projector and predictor"""
    tau: float = 0.2
    """temperature"""
    ema_momentum: float = 0.99
    """of the momentum encoder at the start; rises to 1 along a cosine"""
    freeze_patch_embed: bool = True
    """leave the patch embedding at its random weights: stable training of a ViT"""
    small_images: bool = False
    """a ResNet's stem without stride and pooling, for images of 32 pixels"""
    crop_min: float = 0.08
    """smallest share of the image that a crop takes"""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """strengths of brightness, contrast, saturation and hue jitter"""
    blur_p: tuple[float, float] = (1.0, 0.1)
    """probability of Gaussian blur, for either view"""
    solarize_p: tuple[float, float] = (0.0, 0.2)
    """probability of solarization, for either view"""
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
        """ViT: 300 epochs, AdamW. ResNet: 1000 epochs, LARS (of the code's README; for 100 epochs it has lr 0.6, weight
        decay 1e-6 and momentum 0.99, for 300 lr 0.3 and those)."""
        if not backbone.startswith("resnet"):
            return cls(backbone)
        training = Training(1000, 4096, "lars", lr=0.3, weight_decay=1.5e-6, warmup_epochs=10)
        return cls(backbone, tau=1.0, ema_momentum=0.996, crop_min=0.2, training=training)

    @classmethod
    def small(cls) -> "Config":
        """For images of at most 64 pixels and minutes on a laptop: not of the paper."""
        training = Training(
            epochs=14, batch_size=32, optimizer="sgd", lr=1.2, weight_decay=5e-4, decay_all=True, warmup_epochs=0.5
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
    lr = 0.1 if backbone.startswith("resnet") else 3.0
    return Official(90, 1024, "sgd", lr, warmup_epochs=0, lr_by_epoch=True, standardise=False, interpolation="bilinear")


def build(config: Config) -> "MoCoV3":
    name, hidden, dim = config.backbone, config.hidden, config.dim
    if name.startswith("resnet"):
        encoder = build_resnet(name, dim, config.small_images, zero_init_residual=True)
        encoder.fc = moco_v3_head(2, encoder.fc.in_features, hidden, dim)
    elif name in MOCO_V3_SIZES:
        encoder = moco_v3_vit(name, config.image_size, config.freeze_patch_embed)
        encoder.head = moco_v3_head(3, encoder.norm.normalized_shape[0], hidden, dim)
    else:
        raise ValueError(f"moco_v3: unknown backbone {name!r}, there are {', '.join(MOCO_V3_SIZES)} and ResNets")
    predictor = moco_v3_head(2, dim, hidden, dim, last_bn=not name.startswith("resnet"))
    return sync_batch_norms(MoCoV3(encoder, predictor, config.tau, config.ema_momentum))


class MoCoV3(nn.Module):
    """Base encoder with projector, predictor, and momentum encoder (the paper's algorithm 1).

    Args:
        base_encoder: backbone whose last layer, `head` or `fc`, is the projector.
        predictor: on the side of the queries alone.
        tau: temperature.
        momentum: of the momentum encoder at the start.
    """

    def __init__(self, base_encoder: nn.Module, predictor: nn.Module, tau: float = 0.2, momentum: float = 0.99):
        super().__init__()
        if not tau > 0:
            raise ValueError(f"MoCoV3: tau must be > 0, got {tau}")
        self.tau, self.momentum = tau, momentum
        self.base_encoder = base_encoder
        self.momentum_encoder = MomentumEncoder(base_encoder, momentum)
        self.predictor = predictor
        self.projector_name = "head" if hasattr(base_encoder, "head") else "fc"

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        (loss1, rank1), (loss2, rank2) = self.directions(batch)
        return loss1 + loss2, {"top1": (torch.cat([rank1, rank2]) == 0).float().mean()}

    def directions(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """(loss, rank of each query's own key [B]) of either view's queries among the other's keys."""
        q1, q2 = (l2_normalize(self.predictor(self.base_encoder(view))) for view in batch.views)
        k1, k2 = (l2_normalize(self.momentum_encoder(view)) for view in batch.views)
        with record_function("loss"):
            return [self.contrast(q1, k2), self.contrast(q2, k1)]

    def ranks(self, batch: Batch) -> tuple[Tensor, int]:
        """(how many negatives score above each query's key [Q], negatives); for reports, changes nothing."""
        ranks = torch.cat([rank for _, rank in self.directions(batch)])
        return ranks, world_size() * len(batch.views[0]) - 1

    def contrast(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(2τ · mean InfoNCE of the queries among the keys of all ranks, rank of each query's own key)."""
        loss, place = batch_info_nce(q, all_gather(k), self.tau, label_offset=rank() * k.shape[0])
        return 2 * self.tau * loss.mean(), place

    def before_step(self, progress: float) -> None:
        """The momentum is a number of `after_step`'s; nothing in the forward pass follows a schedule."""

    def after_step(self, progress: float) -> None:
        """The reference does this at the start of the next step, with that step's momentum."""
        self.momentum_encoder.update(self.base_encoder, self.momentum_at(progress))

    def momentum_at(self, progress: float) -> float:
        """Of the momentum encoder, `progress` from 0 to 1 through the run."""
        return cosine_momentum(self.momentum, progress)

    @property
    def encoder(self) -> nn.Module:
        """The base encoder without its projector, in timm's or torchvision's names."""
        return headless(self.base_encoder, self.projector_name)

    def features(self, images: Tensor) -> Tensor:
        """Features of the base encoder [B, F], before its projector."""
        return self.encoder(images)
