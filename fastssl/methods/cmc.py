"""CMC: contrast the lightness L of an image with its colours ab, each against a memory bank of the other.

Tian et al., "Contrastive Multiview Coding", 2020, arXiv:1906.05849. Numbers are those of the official code, whose names
the encoders have in the state dict.
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, COEFFICIENT, POSITIVE, SHARE
from fastssl.contract import Batch
from fastssl.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, Augmentation, View
from fastssl.data.lab import lab_channels
from fastssl.distributed import world_size
from fastssl.nn.bank import BankNCE, MemoryBank, draw_rows
from fastssl.nn.losses import l2_normalize
from fastssl.nn.norm import sync_batch_norms
from fastssl.nn.resnet import HalfResNet
from fastssl.nn.sharing import headless, save_child_as
from fastssl.ops import sampled_info_nce
from fastssl.train.config import Training, check_images_at_once

from . import moco_v1


@dataclass
class Config:
    """CMC as in its code, for ResNets: 240 epochs of batch 128, 16384 negatives."""

    backbone: str = "resnet50"
    """both encoders, at half width: resnet_mini, resnet18, resnet34, resnet50, resnet101 or resnet152"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the images in pixels"""
    dim: Annotated[int, AT_LEAST_1] = 128
    """dimension of the features in the banks"""
    images: Annotated[int | None, AT_LEAST_1] = None
    """rows of each memory bank: number of training images, by default that of the data"""
    nce_k: Annotated[int, AT_LEAST_1] = 16384
    """number of negatives drawn for each image; 4096 in the code's README"""
    softmax: bool = False
    """cross entropy over the drawn rows instead of noise-contrastive estimation"""
    tau: Annotated[float, POSITIVE] = 0.07
    """temperature τ of the contrastive loss"""
    bank_momentum: Annotated[float, COEFFICIENT] = 0.5
    """share of the old feature in the update of the banks"""
    small_images: bool = False
    """ResNet stem without stride and pooling, for images of 32 pixels"""
    crop_min: Annotated[float, SHARE] = 0.08
    """smallest fraction of the image area that a crop covers"""
    infomin_views: bool = False
    """add InfoMin's jitter, blur and grayscale before the image is divided into L and ab"""
    training: Training = field(
        default_factory=lambda: Training(
            240, 128, "sgd", lr=0.06, weight_decay=1e-4, decay_all=True, lr_by_epoch=True, lr_drops=(120, 160, 200)
        )
    )

    @classmethod
    def paper(cls, backbone: str = "resnet50") -> "Config":
        """The README's command for ResNets; its learning rate of 0.03 does not depend on the batch."""
        return cls(backbone)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(60, 32, "sgd", lr=0.3, weight_decay=5e-4, decay_all=True, warmup_epochs=1)
        # NCE diverges where the negatives of an image are a large share of the bank's rows.
        return cls("resnet_mini", (32, 32), nce_k=512, softmax=True, tau=0.2, crop_min=0.25, training=training)

    @property
    def augmentation(self) -> Augmentation:
        infomin = {"jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 0.8, "grayscale_p": 0.2, "blur_p": 0.5}
        extra = infomin if self.infomin_views else {}
        return Augmentation((View(self.image_size, crop=(self.crop_min, 1.0), flip_p=0.5, **extra),))


# MoCo's protocol; the README of CMC's code has the learning rate of 30, too, and decays it otherwise
linear_probe = moco_v1.linear_probe


def build(config: Config) -> "CMC":
    check_images_at_once(config.training, 2 * world_size(), "cmc", "batch norms need two images on each rank")
    if config.images is None:
        raise ValueError("cmc: --images must be the number of training images, got None: set config.images")
    networks = LabEncoders(
        *(HalfResNet(config.backbone, channels, config.dim, config.small_images) for channels in (1, 2))
    )
    banks = [MemoryBank(config.images, config.dim, config.bank_momentum) for _ in range(2)]
    return sync_batch_norms(CMC(networks, *banks, config.nce_k, config.tau, config.softmax))


class LabEncoders(nn.Module):
    """Encoders of the two parts of an image.

    Args:
        l_to_ab: encoder of L [B, 1, H, W].
        ab_to_l: encoder of ab [B, 2, H, W].
    """

    def __init__(self, l_to_ab: nn.Module, ab_to_l: nn.Module):
        super().__init__()
        self.l_to_ab, self.ab_to_l = l_to_ab, ab_to_l

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs for L and for ab of normalised RGB images [B, 3, H, W]."""
        lightness, colours = lab_channels(images, IMAGENET_MEAN, IMAGENET_STD)
        return self.l_to_ab(lightness), self.ab_to_l(colours)

    def forward(self, images: Tensor) -> Tensor:
        """Both outputs side by side."""
        return torch.cat(self.both(images), 1)


class CMC(nn.Module):
    """Two encoders and two memory banks (the paper's section 3.2).

    Args:
        networks: encoders whose `fc` give the features [B, D] of the banks.
        bank_l: features of L of all training images, the negatives of ab.
        bank_ab: features of ab, the negatives of L.
        nce_k: number of negatives drawn for each image, the same images for both.
        tau: temperature τ.
        softmax: cross entropy over the drawn rows instead of noise-contrastive estimation.
    """

    def __init__(
        self,
        networks: LabEncoders,
        bank_l: MemoryBank,
        bank_ab: MemoryBank,
        nce_k: int = 16384,
        tau: float = 0.07,
        softmax: bool = False,
    ):
        super().__init__()
        self.networks, self.bank_l, self.bank_ab = networks, bank_l, bank_ab
        self.nce_k, self.tau, self.softmax = nce_k, tau, softmax
        self.criterion_l, self.criterion_ab = BankNCE(tau), BankNCE(tau)
        save_child_as(self, "networks", "encoder")
        self.pending: list[tuple[Tensor, ...]] = []  # index, two features and two Z of each micro-batch

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        features, losses, ranks, constants = self.contrast(batch)
        if torch.is_grad_enabled():
            self.pending.append((batch.index, *(x.detach() for x in features), *constants))
        metrics = {f"loss_{name}": loss.detach().mean() for name, loss in zip(("l", "ab"), losses)}
        return sum(losses).mean(), metrics | {"top1": (torch.cat(ranks) == 0).float().mean()}

    def contrast(self, batch: Batch) -> tuple[tuple, ...]:
        """Features [B, D], losses, ranks and Z of L and of ab. Changes no state."""
        features = tuple(l2_normalize(x) for x in self.networks.both(batch.views[0]))
        indices = self.draw(batch)
        results = []
        with record_function("loss"):
            for x, bank, criterion in zip(features, (self.bank_ab, self.bank_l), (self.criterion_l, self.criterion_ab)):
                if self.softmax:
                    results.append((*sampled_info_nce(x, bank.memory, indices, self.tau), criterion.z))
                else:
                    (loss, rank, _), z = criterion(x, bank.memory, indices)
                    results.append((loss, rank, z))
        return features, *zip(*results)

    def draw(self, batch: Batch) -> Tensor:
        """Rows of the banks for each image [B, 1+m]: its own, and random ones, a function of the batch's seeds."""
        return draw_rows(batch.index, batch.seed, self.nce_k, self.bank_l.memory.shape[0])

    def ranks(self, batch: Batch) -> tuple[Tensor, int]:
        """Number of drawn rows that score above each feature's own [2B], and the number of drawn rows."""
        return torch.cat(self.contrast(batch)[2]), self.nce_k

    def before_step(self, progress: float) -> None:
        """CMC has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """Move both banks' rows of the step's images towards their features; the code does it in the forward pass."""
        if not self.softmax:
            self.criterion_l.keep_z([entry[3] for entry in self.pending])
            self.criterion_ab.keep_z([entry[4] for entry in self.pending])
        for index, of_l, of_ab, *_ in self.pending:
            self.bank_l.update(index, of_l)
            self.bank_ab.update(index, of_ab)
        self.pending = []

    @property
    def encoder(self) -> nn.Module:
        """Both encoders without their heads, for RGB images; names of the official code."""
        return LabEncoders(headless(self.networks.l_to_ab, "fc"), headless(self.networks.ab_to_l, "fc"))

    def features(self, images: Tensor) -> Tensor:
        """Pooled features of both encoders, side by side [B, 2F]."""
        return self.encoder(images)
