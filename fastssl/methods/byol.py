"""BYOL: predict a momentum encoder's projection of the other view; no negatives; ResNets.

Grill et al., "Bootstrap Your Own Latent", 2020, arXiv:2006.07733. Equals the official JAX code, but for the padding of
its strided convolutions: features, weights and names of the encoder are torchvision's.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, COEFFICIENT, NOT_NEGATIVE, PROBABILITY, SHARE
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View, asymmetric_views
from fastssl.eval.protocols import Official
from fastssl.nn import MomentumEncoder, NegativeCosineSimilarity
from fastssl.nn.backbones import build_backbone
from fastssl.nn.heads import mlp_head
from fastssl.nn.norm import sync_batch_norms
from fastssl.nn.sharing import headless
from fastssl.train.config import Training
from fastssl.train.schedule import cosine_schedule


@dataclass
class Config:
    """BYOL as in its paper (section 3.3) and code: 1000 epochs of batch 4096 with LARS."""

    backbone: str = "resnet50"
    """encoder: resnet_mini, resnet18, resnet34, resnet50, resnet101, resnet152, timm:NAME or torchvision:NAME"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the images in pixels"""
    dim: Annotated[int, AT_LEAST_1] = 256
    """dimension of projections and predictions"""
    hidden: Annotated[int, AT_LEAST_1] = 4096
    """hidden width of projector and predictor"""
    ema_momentum: Annotated[float, COEFFICIENT] = 0.996
    """momentum coefficient τ of the target network at the start of training; 0.99 for 100 or 300 epochs in the code"""
    ema_momentum_end: Annotated[float, COEFFICIENT] = 1.0
    """momentum coefficient τ at the end of training, reached along a cosine"""
    same_initial_weights: bool = False
    """start the target network as a copy of the online network; the code draws both at random"""
    small_images: bool = False
    """ResNet stem without stride and pooling, for images of 32 pixels"""
    crop_min: Annotated[float, SHARE] = 0.08
    """smallest fraction of the image area that a crop covers"""
    jitter: Annotated[tuple[float, float, float, float], NOT_NEGATIVE] = (0.4, 0.4, 0.2, 0.1)
    """strengths of brightness, contrast, saturation and hue jitter"""
    colour_law: Literal["byol", "torchvision"] = "byol"
    """formulas of jitter, grayscale and blur: those of the official code, or torchvision's"""
    blur_p: Annotated[tuple[float, float], PROBABILITY] = (1.0, 0.1)
    """probability of Gaussian blur, one for each view"""
    solarize_p: Annotated[tuple[float, float], PROBABILITY] = (0.0, 0.2)
    """probability of solarization, one for each view"""
    training: Training = field(
        default_factory=lambda: Training(1000, 4096, "lars", lr=0.2, weight_decay=1.5e-6, warmup_epochs=10)
    )

    @classmethod
    def paper(cls, backbone: str = "resnet50") -> "Config":
        return cls(backbone)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(10, 32, "sgd", lr=0.8, weight_decay=5e-4, decay_all=True, warmup_epochs=0.5)
        views = {"crop_min": 0.25, "jitter": (0.4, 0.4, 0.2, 0.5), "blur_p": (0.0, 0.0), "solarize_p": (0.0, 0.0)}
        views |= {"colour_law": "torchvision"}
        return cls("resnet_mini", (32, 32), 128, 512, ema_momentum=0.95, **views, training=training)

    @property
    def augmentation(self) -> Augmentation:
        view = View(
            self.image_size,
            crop=(self.crop_min, 1.0),
            interpolation="bicubic",
            jitter=self.jitter,
            jitter_p=0.8,
            grayscale_p=0.2,
            colour_law=self.colour_law,
            flip_p=0.5,
        )
        return asymmetric_views(view, self.blur_p, self.solarize_p)


def linear_probe(backbone: str) -> Official:
    """SGD without weight decay. Source: Grill et al., 2020 (BYOL), appendix C.1, and its code."""
    return Official(80, 1024, "sgd", 0.2, warmup_epochs=0, standardise=False)


def build(config: Config) -> "BYOL":
    def network() -> nn.Module:
        encoder = build_backbone(
            config.backbone, config.dim, config.small_images, zero_init_residual=True, image_size=config.image_size
        )
        encoder.fc = mlp_head(encoder.fc.in_features, config.hidden, config.dim, bias=True)
        return encoder

    online = network()
    target = online if config.same_initial_weights else network()
    predictor = mlp_head(config.dim, config.hidden, config.dim, bias=True)
    return sync_batch_norms(BYOL(online, target, predictor, config.ema_momentum, config.ema_momentum_end))


class BYOL(nn.Module):
    """Online network, target network, and predictor (the paper's section 3.1).

    Args:
        online: encoder whose `fc` is the projector.
        target: network of the same kind, whose copy becomes the target network.
        predictor: from projections [B, D] to predictions [B, D].
        momentum: momentum coefficient τ at the start of training.
        end: momentum coefficient τ at the end of training.
    """

    def __init__(
        self, online: nn.Module, target: nn.Module, predictor: nn.Module, momentum: float = 0.996, end: float = 1.0
    ):
        super().__init__()
        self.momentum, self.momentum_end = momentum, end
        self.online, self.target, self.predictor = online, MomentumEncoder(target, momentum), predictor
        self.criterion = NegativeCosineSimilarity()
        self.momentum_of_step = momentum

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """2 − 2 cos of each direction, added: from 0 to 8."""
        p1, p2 = (self.predictor(self.online(view)) for view in batch.views)
        z1, z2 = (self.target(view) for view in batch.views)
        with record_function("loss"):
            loss = 4 + 2 * (self.criterion(p1, z2) + self.criterion(p2, z1))
        return loss, {"std": F.normalize(z1.float(), dim=1).std(0).mean()}  # near 0: all images have one projection

    def before_step(self, progress: float) -> None:
        """Note the momentum coefficient of this step, with which the official code updates the target network."""
        self.momentum_of_step = self.momentum_at(progress)

    def after_step(self, progress: float) -> None:
        self.target.update(self.online, self.momentum_of_step)

    def momentum_at(self, progress: float) -> float:
        """Momentum coefficient of the target network's update at `progress`."""
        return cosine_schedule(self.momentum, self.momentum_end, progress)

    @property
    def encoder(self) -> nn.Module:
        """The online network without its projector; names of timm or torchvision."""
        return headless(self.online, "fc")

    def features(self, images: Tensor) -> Tensor:
        """Features of the online network [B, F], before its projector."""
        return self.encoder(images)
