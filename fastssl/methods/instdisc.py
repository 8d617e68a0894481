"""InstDisc: every image is a class of its own; noise-contrastive estimation against a memory bank.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018, arXiv:1805.01978. Numbers
are those of the official code.
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, COEFFICIENT, NOT_NEGATIVE, POSITIVE, SHARE
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View
from fastssl.distributed import world_size
from fastssl.nn.backbones import build_backbone
from fastssl.nn.bank import BankNCE, MemoryBank, bank_cross_entropy, draw_rows
from fastssl.nn.losses import l2_normalize
from fastssl.nn.norm import sync_batch_norms
from fastssl.nn.sharing import headless
from fastssl.ops import sampled_info_nce
from fastssl.train.config import Training, check_images_at_once

from . import moco_v1


@dataclass
class Config:
    """InstDisc as in its code: 200 epochs of batch 256, 4096 negatives."""

    backbone: str = "resnet50"
    """encoder: resnet_mini, resnet18, resnet34, resnet50, resnet101, resnet152, timm:NAME or torchvision:NAME"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the images in pixels"""
    dim: Annotated[int, AT_LEAST_1] = 128
    """dimension of the features in the bank"""
    images: Annotated[int | None, AT_LEAST_1] = None
    """rows of the memory bank: number of training images, by default that of the data"""
    nce_k: Annotated[int, NOT_NEGATIVE] = 4096
    """number of negatives drawn for each image; 0 for cross entropy over the whole bank"""
    softmax: bool = False
    """cross entropy over the drawn rows instead of noise-contrastive estimation"""
    tau: Annotated[float, POSITIVE] = 0.07
    """temperature τ of the contrastive loss"""
    bank_momentum: Annotated[float, COEFFICIENT] = 0.5
    """share of the old feature in the bank's update"""
    small_images: bool = False
    """ResNet stem without stride and pooling, for images of 32 pixels"""
    crop_min: Annotated[float, SHARE] = 0.2
    """smallest fraction of the image area that a crop covers"""
    jitter: Annotated[tuple[float, float, float, float], NOT_NEGATIVE] = (0.4, 0.4, 0.4, 0.4)
    """strengths of brightness, contrast, saturation and hue jitter"""
    training: Training = field(
        default_factory=lambda: Training(
            200, 256, "sgd", lr=0.03, weight_decay=1e-4, decay_all=True, lr_by_epoch=True, lr_drops=(120, 160)
        )
    )

    @classmethod
    def paper(cls, backbone: str = "resnet50") -> "Config":
        return cls(backbone)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(30, 32, "sgd", lr=0.3, weight_decay=5e-4, decay_all=True, warmup_epochs=1)
        views = {"crop_min": 0.25, "jitter": (0.4, 0.4, 0.2, 0.5)}
        # NCE diverges where the negatives of an image are a large share of the bank's rows. Each epoch renews a row
        # once, so that many short epochs teach more than few long ones.
        return cls("resnet_mini", (32, 32), nce_k=512, softmax=True, tau=0.2, **views, training=training)

    @property
    def augmentation(self) -> Augmentation:
        view = View(
            self.image_size,
            crop=(self.crop_min, 1.0),
            jitter=self.jitter,
            grayscale_p=0.2,
            grayscale_first=True,
            flip_p=0.5,
        )
        return Augmentation((view,))


# MoCo's protocol, by which its paper (section 4.1) compares memory banks; the paper of InstDisc has SVMs
linear_probe = moco_v1.linear_probe


def build(config: Config) -> "InstDisc":
    check_images_at_once(config.training, 2 * world_size(), "instdisc", "batch norms need two images on each rank")
    if config.images is None:
        raise ValueError("instdisc: --images must be the number of training images, got None: set config.images")
    backbone = build_backbone(config.backbone, config.dim, config.small_images, image_size=config.image_size)
    bank = MemoryBank(config.images, config.dim, config.bank_momentum)
    return sync_batch_norms(InstDisc(backbone, bank, config.nce_k, config.tau, config.softmax))


class InstDisc(nn.Module):
    """Encoder and memory bank (the paper's figure 2).

    Args:
        backbone: encoder whose `fc` gives the features [B, D] of the bank.
        bank: features of all training images.
        nce_k: number of negatives drawn for each image; 0 for cross entropy over the whole bank.
        tau: temperature τ.
        softmax: cross entropy over the drawn rows instead of noise-contrastive estimation.
    """

    def __init__(
        self, backbone: nn.Module, bank: MemoryBank, nce_k: int = 4096, tau: float = 0.07, softmax: bool = False
    ):
        super().__init__()
        self.backbone, self.bank, self.nce_k, self.tau, self.softmax = backbone, bank, nce_k, tau, softmax
        self.criterion = BankNCE(tau)
        self.pending: list[tuple[Tensor, Tensor, Tensor]] = []  # index, features and Z of each micro-batch

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        features, loss, rank, z = self.contrast(batch)
        if torch.is_grad_enabled():
            self.pending.append((batch.index, features.detach(), z))
        return loss.mean(), {"top1": (rank == 0).float().mean()}

    def contrast(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features [B, D], loss and rank of each image, and Z. Changes no state."""
        features, memory = l2_normalize(self.backbone(batch.views[0])), self.bank.memory
        with record_function("loss"):
            if self.nce_k == 0:
                return features, *bank_cross_entropy(features, memory, batch.index, self.tau), self.criterion.z
            indices = self.draw(batch)
            if self.softmax:
                return features, *sampled_info_nce(features, memory, indices, self.tau), self.criterion.z
            (loss, rank, _), z = self.criterion(features, memory, indices)
            return features, loss, rank, z

    def draw(self, batch: Batch) -> Tensor:
        """Rows of the bank for each image [B, 1+m]: its own, and random ones, a function of the batch's seeds."""
        return draw_rows(batch.index, batch.seed, self.nce_k, self.bank.memory.shape[0])

    def ranks(self, batch: Batch) -> tuple[Tensor, int]:
        """Number of drawn rows that score above each image's own [B], and the number of drawn rows."""
        return self.contrast(batch)[2], self.nce_k or self.bank.memory.shape[0] - 1

    def before_step(self, progress: float) -> None:
        """InstDisc has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """Move the bank's rows of the step's images towards their features; the code does it in the backward pass."""
        if not self.softmax and self.nce_k:
            self.criterion.keep_z([z for _, _, z in self.pending])
        for index, features, _ in self.pending:
            self.bank.update(index, features)
        self.pending = []

    @property
    def encoder(self) -> nn.Module:
        """The backbone without its head; names of torchvision."""
        return headless(self.backbone, "fc")

    def features(self, images: Tensor) -> Tensor:
        """Pooled features of the backbone [B, F]."""
        return self.encoder(images)
