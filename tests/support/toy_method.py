"""A method from outside the package: a linear autoencoder of small thumbnails, with scheduled values and state."""

from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.bounds import AT_LEAST_1
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View
from fastssl.distributed import all_mean
from fastssl.train.config import Training
from fastssl.train.schedule import cosine_schedule

SIDE = 8  # pixels of a thumbnail


@dataclass
class Config:
    """Linear autoencoder of thumbnails of 8 × 8 pixels."""

    backbone: str = "linear"
    """encoder: linear"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (32, 32)
    """height and width of the images in pixels"""
    dim: Annotated[int, AT_LEAST_1] = 32
    """dimension of the features"""
    training: Training = field(
        default_factory=lambda: Training(
            epochs=2, batch_size=32, optimizer="adamw", lr=1e-2, weight_decay=0.01, weight_decay_end=0.1
        )
    )

    @classmethod
    def paper(cls, backbone: str = "linear") -> "Config":
        return cls(backbone)

    @classmethod
    def small(cls) -> "Config":
        """For images of at most 64 pixels."""
        return cls()

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation((View(self.image_size, crop=(0.5, 1.0), flip_p=0.5),))


def build(config: Config) -> "Autoencoder":
    if config.backbone != "linear":
        raise ValueError(f"toy_method: unknown backbone {config.backbone!r}, there is linear")
    return Autoencoder(config.dim)


def parameter_groups(method: "Autoencoder") -> list[dict]:
    """The decoder learns at half the learning rate, and its bias has no weight decay."""
    return [
        {"params": method.encoder.parameters()},
        {"params": [method.decoder.weight], "lr_scale": 0.5},
        {"params": [method.decoder.bias], "lr_scale": 0.5, "weight_decay_scale": 0.0},
    ]


class Autoencoder(nn.Module):
    """The loss is the squared error of centred thumbnails, times a factor that rises from 0.1 to 1."""

    def __init__(self, dim: int):
        super().__init__()
        pixels = 3 * SIDE**2
        self.backbone = nn.Sequential(nn.AdaptiveAvgPool2d(SIDE), nn.Flatten(), nn.Linear(pixels, dim))
        self.decoder = nn.Linear(dim, pixels)
        self.register_buffer("loss_scale", torch.ones(()))
        self.register_buffer("centre", torch.zeros(pixels))
        self.pending: list[Tensor] = []  # mean thumbnail of each micro-batch of the current step

    @property
    def encoder(self) -> nn.Module:
        return self.backbone

    def before_step(self, progress: float) -> None:
        self.loss_scale.fill_(cosine_schedule(0.1, 1.0, progress))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        (images,) = batch.views
        thumbnails = F.adaptive_avg_pool2d(images, SIDE).flatten(1)
        if self.training:
            self.pending.append(thumbnails.mean(0).detach())
        error = (self.decoder(self.backbone(images)) - (thumbnails - self.centre)).square().mean()
        return self.loss_scale * error, {"error": error.detach()}

    def after_step(self, progress: float) -> None:
        self.centre.lerp_(all_mean(torch.stack(self.pending).mean(0)), 0.1)
        self.pending = []

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(images)
