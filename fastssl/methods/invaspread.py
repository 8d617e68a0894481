"""InvaSpread: views of an image attract, other images of the batch spread; no bank and no momentum encoder.

Ye et al., "Unsupervised Embedding Learning via Invariant and Spreading Instance Feature", 2019, arXiv:1904.03436.
Numbers are those of the official code, for CIFAR.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, SHARE
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View
from fastssl.distributed import all_gather, rank, world_size
from fastssl.nn.backbones import build_backbone
from fastssl.nn.losses import l2_normalize
from fastssl.nn.norm import sync_batch_norms
from fastssl.nn.sharing import headless
from fastssl.train.config import Training, check_images_at_once

from . import moco_v1


@dataclass
class Config:
    """InvaSpread as in its code for CIFAR-10: ResNet-18 for small images, 301 epochs of batch 128."""

    backbone: str = "resnet18"
    """encoder: resnet_mini, resnet18, resnet34, resnet50, resnet101, resnet152, timm:NAME or torchvision:NAME"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (32, 32)
    """height and width of the images in pixels"""
    dim: Annotated[int, AT_LEAST_1] = 128
    """dimension of the embeddings"""
    tau: Annotated[float, POSITIVE] = 0.1
    """temperature τ of the contrastive loss"""
    negative_weight: Annotated[float, AT_LEAST_1] = 1.0
    """factor m of the negatives, in the softmax's denominator and of their term (negM in the code)"""
    small_images: bool = True
    """ResNet stem without stride and pooling, for images of 32 pixels"""
    crop_min: Annotated[float, SHARE] = 0.2
    """smallest fraction of the image area that a crop covers"""
    jitter: Annotated[tuple[float, float, float, float], NOT_NEGATIVE] = (0.4, 0.4, 0.4, 0.4)
    """strengths of brightness, contrast, saturation and hue jitter"""
    training: Training = field(
        default_factory=lambda: Training(
            301, 128, "sgd", lr=0.06, weight_decay=5e-4, decay_all=True, lr_by_epoch=True, lr_drops=(120, 200)
        )
    )

    @classmethod
    def paper(cls, backbone: str = "resnet18") -> "Config":
        """The code's numbers; between epochs 160 and 200 its learning rate is half of this one."""
        return cls(backbone, small_images=":" not in backbone)  # networks of other libraries have their own stems

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(10, 32, "sgd", lr=0.3, weight_decay=5e-4, decay_all=True)
        views = {"crop_min": 0.25, "jitter": (0.4, 0.4, 0.2, 0.5)}
        return cls("resnet_mini", small_images=False, **views, training=training)

    @property
    def augmentation(self) -> Augmentation:
        view = View(self.image_size, crop=(self.crop_min, 1.0), jitter=self.jitter, grayscale_p=0.2, flip_p=0.5)
        return Augmentation((view, view))


# MoCo's protocol, by which later papers compare; the paper has kNN alone, which every run evaluates
linear_probe = moco_v1.linear_probe


def build(config: Config) -> "InvaSpread":
    check_images_at_once(config.training, 2 * world_size(), "invaspread", "batch norms need two images on each rank")
    backbone = build_backbone(config.backbone, config.dim, config.small_images, image_size=config.image_size)
    return sync_batch_norms(InvaSpread(backbone, config.tau, config.negative_weight))


def invariant_spreading_loss(z: Tensor, tau: float = 0.1, negative_weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """The loss of this rank's embeddings against those of all ranks, and ranks of the positives.

    With e(k|i) = exp(z_i·z_k / τ) and i' the other view of i's image, p(k|i) = e(k|i) / (e(i'|i) + m Σ e(j|i)), where j
    runs over all embeddings but i and i'. The loss is the mean over i of −log p(i'|i) − m Σ log(1 − p(j|i)). As in the
    code the second factor of every product z_i·z_k is a constant to the gradient.

    Args:
        z: [2B, D] of unit length: B first views, then B second views. Gradient.
        tau: temperature τ.
        negative_weight: factor m of the negatives, at least 1: with less p may exceed 1.

    Returns: the loss, a scalar, and the number of embeddings that are closer to each than its partner [2B].

    Source: Ye et al., 2019, equations 3 to 6, and its code, `BatchCriterion`.
    """
    batch = z.shape[0] // 2
    keys = all_gather(z)  # of each rank its first views, then its second views
    own = rank() * z.shape[0] + torch.arange(z.shape[0], device=z.device)
    partner = rank() * z.shape[0] + (torch.arange(z.shape[0], device=z.device) + batch) % z.shape[0]
    logits = z @ keys.T / tau
    positive = logits.gather(1, partner[:, None])
    negatives = logits.scatter(1, torch.stack([own, partner], 1), float("-inf"))
    scale = math.log(negative_weight)
    log_sum = torch.logaddexp(positive, negatives.logsumexp(1, keepdim=True) + scale)
    # log(1 − p) of each negative, 0 for the embedding itself and its partner. The largest p may be 1 but for rounding:
    # its 1 − p is the sum of what else the denominator holds.
    largest = negatives.argmax(1, keepdim=True)
    rest = torch.logaddexp(positive, negatives.scatter(1, largest, float("-inf")).logsumexp(1, keepdim=True) + scale)
    if negative_weight > 1:
        rest = torch.logaddexp(rest, negatives.gather(1, largest) + math.log(negative_weight - 1))
    log_p = negatives.scatter(1, largest, float("-inf")) - log_sum
    spread = torch.log1p(-log_p.exp()).sum(1) + (rest - log_sum)[:, 0]
    return -((positive - log_sum)[:, 0] + negative_weight * spread).mean(), (negatives > positive).sum(1)


class InvaSpread(nn.Module):
    """Encoder, whose `fc` gives the embeddings (the paper's figure 2).

    Args:
        backbone: images → embeddings [B, D].
        tau: temperature τ.
        negative_weight: factor m of the negatives.
    """

    def __init__(self, backbone: nn.Module, tau: float = 0.1, negative_weight: float = 1.0):
        super().__init__()
        self.backbone, self.tau, self.negative_weight = backbone, tau, negative_weight

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, ranks = self.contrast(batch)
        return loss, {"top1": (ranks == 0).float().mean()}

    def contrast(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, and ranks of the positives; batch norms see both views together, as in the official code."""
        z = l2_normalize(self.backbone(torch.cat(batch.views)))
        with record_function("loss"):
            return invariant_spreading_loss(z, self.tau, self.negative_weight)

    def ranks(self, batch: Batch) -> tuple[Tensor, int]:
        """Number of negatives that are closer to each embedding than its partner [2B], and the number of negatives."""
        return self.contrast(batch)[1], 2 * (world_size() * len(batch.views[0]) - 1)

    def before_step(self, progress: float) -> None:
        """InvaSpread has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """InvaSpread keeps no state of its own."""

    @property
    def encoder(self) -> nn.Module:
        """The backbone without its head; names of torchvision."""
        return headless(self.backbone, "fc")

    def features(self, images: Tensor) -> Tensor:
        """Features of the backbone [B, F], before its head."""
        return self.encoder(images)
