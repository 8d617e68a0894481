"""MoCo v2: MoCo with an MLP head, blur, and a cosine schedule.

Chen et al., "Improved Baselines with Momentum Contrastive Learning", 2020, arXiv:2003.04297.
"""

from dataclasses import dataclass, field
from typing import Annotated

from fastssl.bounds import NOT_NEGATIVE, POSITIVE, PROBABILITY
from fastssl.data.augmentation import Augmentation, View
from fastssl.train.config import Training

from . import moco_v1

OFFICIAL = moco_v1.OFFICIAL


@dataclass
class Config(moco_v1.Config):
    """MoCo v2 as in its paper (section 3) and code: 200 epochs and batch size 256 as in table 1."""

    tau: Annotated[float, POSITIVE] = 0.2
    """temperature τ of the contrastive loss"""
    jitter: Annotated[tuple[float, float, float, float], NOT_NEGATIVE] = (0.4, 0.4, 0.4, 0.1)
    """strengths of brightness, contrast, saturation and hue jitter"""
    blur_p: Annotated[float, PROBABILITY] = 0.5
    """probability of Gaussian blur"""
    training: Training = field(
        default_factory=lambda: Training(
            epochs=200, batch_size=256, optimizer="sgd", lr=0.03, weight_decay=1e-4, decay_all=True, lr_by_epoch=True
        )
    )

    @classmethod
    def small(cls) -> "Config":
        config = super().small()
        config.tau, config.blur_p, config.training.lr = 0.2, 0.0, 0.6
        return config

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


linear_probe = moco_v1.linear_probe


def build(config: Config) -> moco_v1.MoCo:
    return moco_v1.build(config, mlp=True)
