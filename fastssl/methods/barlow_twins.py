"""Barlow Twins: the cross-correlation of two views' embeddings becomes the identity matrix; ResNets.

Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", 2021, arXiv:2103.03230. Names in the
state dict are those of the official code.
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, NOT_NEGATIVE, PROBABILITY, SHARE
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View, asymmetric_views
from fastssl.eval.protocols import Official
from fastssl.nn import BarlowTwinsLoss
from fastssl.nn.backbones import build_backbone
from fastssl.nn.heads import mlp_head
from fastssl.nn.noncontrastive import redundancy
from fastssl.nn.norm import sync_batch_norms
from fastssl.train.config import Training

OFFICIAL = "barlow_twins"  # layout of the reference checkpoint


@dataclass
class Config:
    """Barlow Twins as in its paper (section 2.2) and code: 1000 epochs of batch 2048 with LARS."""

    backbone: str = "resnet50"
    """encoder: resnet_mini, resnet18, resnet34, resnet50, resnet101, resnet152, timm:NAME or torchvision:NAME"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the images in pixels"""
    dim: Annotated[int, AT_LEAST_1] = 8192
    """dimension of the embeddings and hidden width of the projector"""
    redundancy_weight: Annotated[float, NOT_NEGATIVE] = 0.0051
    """weight λ of the elements off the diagonal"""
    gradient_ranks: Annotated[int, AT_LEAST_1] = 16
    """number that the gradient is divided by: the code does so by its number of GPUs, 16 in the paper; else 1"""
    vector_lr: Annotated[float, NOT_NEGATIVE] = 0.024
    """learning rate of biases and norms, as a factor of that of weights: 0.0048 of 0.2"""
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
        default_factory=lambda: Training(1000, 2048, "lars", lr=0.2, weight_decay=1e-6, warmup_epochs=10, lr_end=0.0002)
    )

    @classmethod
    def paper(cls, backbone: str = "resnet50") -> "Config":
        return cls(backbone)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(12, 32, "adamw", lr=0.02, weight_decay=5e-4, warmup_epochs=0.5)
        views = {"crop_min": 0.25, "jitter": (0.4, 0.4, 0.2, 0.5), "blur_p": (0.0, 0.0), "solarize_p": (0.0, 0.0)}
        return cls("resnet_mini", (32, 32), 128, gradient_ranks=1, vector_lr=1.0, **views, training=training)

    @property
    def augmentation(self) -> Augmentation:
        view = View(
            self.image_size,
            crop=(self.crop_min, 1.0),
            interpolation="bicubic",
            jitter=self.jitter,
            jitter_p=0.8,
            grayscale_p=0.2,
            flip_p=0.5,
        )
        return asymmetric_views(view, self.blur_p, self.solarize_p)


def linear_probe(backbone: str) -> Official:
    """SGD. Source: Zbontar et al., 2021 (Barlow Twins), section 3.1, and its code."""
    views = {"standardise": False, "interpolation": "bilinear"}
    return Official(100, 256, "sgd", 0.3, weight_decay=1e-6, warmup_epochs=0, lr_by_epoch=True, **views)


def build(config: Config) -> "BarlowTwins":
    backbone = build_backbone(
        config.backbone, config.dim, config.small_images, zero_init_residual=True, image_size=config.image_size
    )
    width, backbone.fc = backbone.fc.in_features, nn.Identity()
    projector = mlp_head(width, config.dim, config.dim, config.dim)
    criterion = BarlowTwinsLoss(config.redundancy_weight, gather=True, gradient_ranks=config.gradient_ranks)
    return sync_batch_norms(BarlowTwins(backbone, projector, criterion, config.vector_lr))


def parameter_groups(method: "BarlowTwins") -> list[dict]:
    """Weights, and apart with their own learning rate and neither weight decay nor trust ratio biases and norms."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    vectors = [p for p in parameters if p.ndim == 1]
    return [
        {"params": [p for p in parameters if p.ndim != 1], "adapt": True},
        {"params": vectors, "adapt": False, "weight_decay_scale": 0.0, "lr_scale": method.vector_lr},
    ]


class BarlowTwins(nn.Module):
    """Encoder, projector, and a batch norm that standardises embeddings (the paper's algorithm 1).

    Args:
        backbone: images → features [B, F].
        projector: features → embeddings [B, D], whose last layer is a linear one.
        criterion: loss of standardised embeddings.
        vector_lr: for `parameter_groups`.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Sequential, criterion: BarlowTwinsLoss, vector_lr: float = 1):
        super().__init__()
        self.backbone, self.projector, self.criterion, self.vector_lr = backbone, projector, criterion, vector_lr
        self.bn = nn.BatchNorm1d(projector[-1].out_features, affine=False)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        z1, z2 = (self.projector(self.backbone(view)) for view in batch.views)  # one view at a time: batch norms
        a, b = self.bn(z1), self.bn(z2)
        with record_function("loss"):
            loss = self.criterion.of_standardised(a, b)
        similarity = F.cosine_similarity(a.detach().float(), b.detach().float()).mean()
        return loss, {"similarity": similarity, "redundancy": redundancy(z1, z2)}

    def before_step(self, progress: float) -> None:
        """Barlow Twins has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """Barlow Twins keeps no state of its own."""

    @property
    def encoder(self) -> nn.Module:
        """The backbone, without the projector; names of timm or torchvision."""
        return self.backbone

    def features(self, images: Tensor) -> Tensor:
        """Features of the backbone [B, F], before the projector."""
        return self.backbone(images)
