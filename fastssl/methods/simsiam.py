"""SimSiam: two views predict each other's projection, without negatives, momentum encoder or large batches; ResNets.

Chen and He, "Exploring Simple Siamese Representation Learning", 2021, arXiv:2011.10566. Names in the state dict are
those of the official code.
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, NOT_NEGATIVE, PROBABILITY, SHARE
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View
from fastssl.eval.protocols import Official
from fastssl.nn import NegativeCosineSimilarity
from fastssl.nn.backbones import build_backbone
from fastssl.nn.heads import mlp_head
from fastssl.nn.norm import sync_batch_norms
from fastssl.nn.sharing import headless, save_child_as
from fastssl.train.config import Training

OFFICIAL = "simsiam"  # layout of the reference checkpoint


@dataclass
class Config:
    """SimSiam as in its paper (section 3, baseline settings) and the command of its code: 100 epochs, batch 512."""

    backbone: str = "resnet50"
    """encoder: resnet_mini, resnet18, resnet34, resnet50, resnet101, resnet152, timm:NAME or torchvision:NAME"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the images in pixels"""
    dim: Annotated[int, AT_LEAST_1] = 2048
    """dimension of projections and predictions"""
    hidden: Annotated[int, AT_LEAST_1] = 512
    """hidden width of the predictor"""
    fix_predictor_lr: bool = True
    """keep the predictor's learning rate at its peak, without schedule"""
    small_images: bool = False
    """ResNet stem without stride and pooling, for images of 32 pixels"""
    crop_min: Annotated[float, SHARE] = 0.2
    """smallest fraction of the image area that a crop covers"""
    jitter: Annotated[tuple[float, float, float, float], NOT_NEGATIVE] = (0.4, 0.4, 0.4, 0.1)
    """strengths of brightness, contrast, saturation and hue jitter"""
    blur_p: Annotated[float, PROBABILITY] = 0.5
    """probability of Gaussian blur"""
    training: Training = field(
        default_factory=lambda: Training(
            epochs=100, batch_size=512, optimizer="sgd", lr=0.05, weight_decay=1e-4, decay_all=True, lr_by_epoch=True
        )
    )

    @classmethod
    def paper(cls, backbone: str = "resnet50") -> "Config":
        return cls(backbone)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(10, 32, "sgd", lr=1.6, weight_decay=5e-4, decay_all=True)
        views = {"crop_min": 0.6, "jitter": (0.4, 0.4, 0.2, 0.5), "blur_p": 0.0}
        return cls("resnet_mini", (32, 32), 256, 64, **views, training=training)

    @property
    def augmentation(self) -> Augmentation:
        view = View(
            self.image_size,
            crop=(self.crop_min, 1.0),
            jitter=self.jitter,
            jitter_p=0.8,
            grayscale_p=0.2,
            blur_p=self.blur_p,
            flip_p=0.5,
        )
        return Augmentation((view, view))


def linear_probe(backbone: str) -> Official:
    """LARC, batch 4096. Source: Chen and He, 2021 (SimSiam), appendix A, and its code's README."""
    views = {"standardise": False, "interpolation": "bilinear"}
    return Official(90, 4096, "larc", 0.1, warmup_epochs=0, lr_by_epoch=True, **views)


def build(config: Config) -> "SimSiam":
    backbone = build_backbone(
        config.backbone, config.dim, config.small_images, zero_init_residual=True, image_size=config.image_size
    )
    width = backbone.fc.in_features
    backbone.fc = mlp_head(width, width, width, config.dim, last_bias=True, last_norm="plain")
    predictor = mlp_head(config.dim, config.hidden, config.dim, last_bias=True)
    return sync_batch_norms(SimSiam(backbone, predictor, config.fix_predictor_lr))


def parameter_groups(method: "SimSiam") -> list[dict]:
    """All with weight decay; the predictor with a constant learning rate, if its config says so."""
    trained = [p for p in method.backbone.parameters() if p.requires_grad]
    return [
        {"params": trained},
        {"params": list(method.predictor.parameters()), "constant_lr": method.fix_predictor_lr},
    ]


class SimSiam(nn.Module):
    """Encoder with projector, and predictor (the paper's algorithm 1).

    Args:
        backbone: encoder whose `fc` is the projector; a bias before the projector's last norm stays at its initial
            value, as in the official code.
        predictor: from projections [B, D] to predictions [B, D].
        fix_predictor_lr: for `parameter_groups`.
    """

    def __init__(self, backbone: nn.Module, predictor: nn.Module, fix_predictor_lr: bool = True):
        super().__init__()
        self.backbone, self.predictor, self.fix_predictor_lr = backbone, predictor, fix_predictor_lr
        self.criterion = NegativeCosineSimilarity()
        backbone.fc[-2].bias.requires_grad_(False)
        save_child_as(self, "backbone", "encoder")

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        z1, z2 = (self.backbone(view) for view in batch.views)  # one view at a time, for the batch norms
        p1, p2 = self.predictor(z1), self.predictor(z2)
        z1, z2 = z1.detach(), z2.detach()
        with record_function("loss"):
            loss = (self.criterion(p1, z2) + self.criterion(p2, z1)) / 2
        return loss, {"std": F.normalize(z1.float(), dim=1).std(0).mean()}  # near 0: all images have one projection

    def before_step(self, progress: float) -> None:
        """SimSiam has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """SimSiam keeps no state of its own."""

    @property
    def encoder(self) -> nn.Module:
        """The backbone without its projector; names of timm or torchvision."""
        return headless(self.backbone, "fc")

    def features(self, images: Tensor) -> Tensor:
        """Features of the backbone [B, F], before its projector."""
        return self.encoder(images)
