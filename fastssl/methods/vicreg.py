"""VICReg: views agree, each dimension varies, and dimensions are uncorrelated; ResNets.

Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", 2022,
arXiv:2105.04906. Names in the state dict are those of the official code.
"""

from dataclasses import dataclass, field
from typing import Annotated

from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, NOT_NEGATIVE, PROBABILITY, SHARE
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View, asymmetric_views
from fastssl.eval.protocols import Official
from fastssl.nn import VICRegLoss
from fastssl.nn.backbones import build_backbone
from fastssl.nn.heads import mlp_head
from fastssl.nn.noncontrastive import redundancy
from fastssl.nn.norm import sync_batch_norms
from fastssl.train.config import Training

OFFICIAL = "vicreg"  # layout of the reference checkpoint


@dataclass
class Config:
    """VICReg as in its paper (section 4.2) and code: 1000 epochs of batch 2048 with LARS."""

    backbone: str = "resnet50"
    """encoder: resnet_mini, resnet18, resnet34, resnet50, resnet101, resnet152, timm:NAME or torchvision:NAME"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the images in pixels"""
    dim: Annotated[int, AT_LEAST_1] = 8192
    """dimension of the embeddings and hidden width of the expander"""
    sim_weight: Annotated[float, NOT_NEGATIVE] = 25.0
    """weight λ of the invariance term"""
    std_weight: Annotated[float, NOT_NEGATIVE] = 25.0
    """weight μ of the variance term"""
    cov_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """weight ν of the covariance term"""
    halve_std: bool = True
    """take half of the variance term of each view, as the code does; the paper adds both"""
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
        """The README of the code: with 100 epochs batch 512 and learning rate 0.3."""
        return cls(backbone)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(10, 64, "sgd", lr=0.4, weight_decay=5e-4, warmup_epochs=0.5)
        views = {"crop_min": 0.25, "jitter": (0.4, 0.4, 0.2, 0.5), "blur_p": (0.0, 0.0), "solarize_p": (0.0, 0.0)}
        return cls("resnet_mini", (32, 32), 128, **views, training=training)

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
    """SGD. Source: Bardes et al., 2022 (VICReg), section 5.1, and its code's README."""
    views = {"standardise": False, "interpolation": "bilinear"}
    return Official(100, 256, "sgd", 0.02, weight_decay=1e-6, warmup_epochs=0, lr_by_epoch=True, **views)


def build(config: Config) -> "VICReg":
    backbone = build_backbone(
        config.backbone, config.dim, config.small_images, zero_init_residual=True, image_size=config.image_size
    )
    width, backbone.fc = backbone.fc.in_features, nn.Identity()
    projector = mlp_head(width, config.dim, config.dim, config.dim, bias=True)
    weights = config.sim_weight, config.std_weight, config.cov_weight
    return sync_batch_norms(VICReg(backbone, projector, VICRegLoss(*weights, config.halve_std, gather=True)))


class VICReg(nn.Module):
    """Encoder and expander (the paper's algorithm 1).

    Args:
        backbone: images → features [B, F].
        projector: features → embeddings [B, D]; the paper's expander.
        criterion: loss of the two views' embeddings.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, criterion: VICRegLoss):
        super().__init__()
        self.backbone, self.projector, self.criterion = backbone, projector, criterion

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        z1, z2 = (self.projector(self.backbone(view)) for view in batch.views)  # one view at a time: batch norms
        with record_function("loss"):
            sim, std, cov = self.criterion.terms(z1, z2)
            loss = self.criterion.weighted(sim, std, cov)
        terms = {"invariance": sim.detach(), "variance": std.detach(), "covariance": cov.detach()}
        return loss, terms | {"redundancy": redundancy(z1, z2)}

    def before_step(self, progress: float) -> None:
        """VICReg has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """VICReg keeps no state of its own."""

    @property
    def encoder(self) -> nn.Module:
        """The backbone, without the expander; names of timm or torchvision."""
        return self.backbone

    def features(self, images: Tensor) -> Tensor:
        """Features of the backbone [B, F], before the expander."""
        return self.backbone(images)
