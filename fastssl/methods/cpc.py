"""CPC: overlapping patches of an image are encoded one by one, and rows of patches predict the features of rows below.

Version 2 is Hénaff et al., "Data-Efficient Image Recognition with Contrastive Predictive Coding", 2020,
arXiv:1905.09272, with all places of the batch as candidates; version 1 is van den Oord et al., 2018, arXiv:1807.03748,
with drawn negatives, as in the code of Greedy InfoMax.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, PROBABILITY, SHARE
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View
from fastssl.distributed import world_size
from fastssl.eval.protocols import Official
from fastssl.nn.predictive import CPCLoss, DrawnCPCLoss, Patches, PixelCNN
from fastssl.nn.resnet import ResNet, build_resnet
from fastssl.nn.sharing import save_child_as, shared_copy
from fastssl.ops import InfoNCE
from fastssl.train.config import Training


@dataclass
class Config:
    """CPC v2 as in its paper (section 3 and appendix), on the 7×7 patches of 64 pixels of version 1."""

    backbone: str = "resnet50"
    """encoder: resnet_mini, resnet18, resnet34, resnet50, resnet101 or resnet152, with layer norms"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (256, 256)
    """height and width of the images in pixels"""
    patch: Annotated[int, AT_LEAST_1] = 64
    """height and width of a patch in pixels"""
    stride: Annotated[int, AT_LEAST_1] = 32
    """pixels from one patch to the next"""
    candidates: Literal["all", "drawn"] = "all"
    """features among which a prediction must be told: all places of the batch (v2), or a few drawn ones (v1)"""
    offsets: Annotated[tuple[int, ...], AT_LEAST_1] = (3, 4, 5)
    """rows from a context to what it predicts; 2 3 4 5 6 in version 1"""
    directions: Literal[1, 2, 4] = 4
    """1: downwards, as in version 1; 2: also upwards; 4: also both ways sideways; each with a context of its own"""
    target_dim: Annotated[int, AT_LEAST_1] = 64
    """dimension in which predictions and all candidates are compared"""
    scale: Annotated[float, POSITIVE] = 0.1
    """factor of the predictions with all candidates"""
    negatives: Annotated[int, AT_LEAST_1] = 16
    """negatives of each prediction with drawn candidates"""
    hidden: Annotated[int, AT_LEAST_1] = 256
    """channels inside a block of the context network"""
    blocks: Annotated[int, AT_LEAST_1] = 5
    """blocks of the context network"""
    small_images: bool = False
    """ResNet stem without stride and pooling, for patches of 16 pixels"""
    crop_min: Annotated[float, SHARE] = 0.3
    """smallest fraction of the image area that a crop covers"""
    jitter: Annotated[tuple[float, float, float, float], NOT_NEGATIVE] = (0.4, 0.4, 0.4, 0.1)
    """strengths of brightness, contrast, saturation and hue jitter"""
    patch_margin: Annotated[int, NOT_NEGATIVE] = 2
    """pixels by which each patch is shifted at most; that much of its border is grey"""
    patch_flip_p: Annotated[float, PROBABILITY] = 0.5
    """probability that a patch is flipped, each patch by itself"""
    patch_drop_p: Annotated[float, PROBABILITY] = 0.8
    """probability that a patch loses two of its three colour channels, each patch by itself"""
    training: Training = field(
        default_factory=lambda: Training(200, 512, "adamw", lr=2e-4, weight_decay=0.0, betas=(0.8, 0.999))
    )

    @classmethod
    def paper(cls, backbone: str = "resnet50") -> "Config":
        return cls(backbone)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(14, 32, "adamw", lr=0.008, weight_decay=1e-2, warmup_epochs=0.5)
        grid = {"patch": 16, "stride": 8, "offsets": (1, 2), "directions": 2, "patch_margin": 1, "patch_drop_p": 1.0}
        views = {"crop_min": 0.3, "jitter": (0.8, 0.8, 0.8, 0.5)}
        return cls("resnet_mini", (32, 32), **grid, **views, hidden=64, blocks=2, training=training)

    @property
    def augmentation(self) -> Augmentation:
        view = View(
            self.image_size, crop=(self.crop_min, 1.0), jitter=self.jitter, jitter_p=0.8, grayscale_p=0.2, flip_p=0.5
        )
        return Augmentation((view,))


def linear_probe(backbone: str) -> Official:
    """SGD on the mean features of the patches; the paper's appendix tunes the rest for each layer."""
    return Official(100, 256, "sgd", 0.1, warmup_epochs=0, standardise=False)


def build(config: Config) -> "CPC":
    rows, columns = (1 + (side - config.patch) // config.stride for side in config.image_size)
    across, deepest = min(rows, columns) if config.directions == 4 else rows, max(config.offsets, default=0)
    if min(config.image_size) < config.patch or across <= deepest:
        raise ValueError(
            f"cpc: offsets must be less than the {max(across, 0)} rows of patches of an image, got {deepest}: the grid "
            f"is {max(rows, 0)} × {max(columns, 0)} patches of {config.patch} pixels at stride {config.stride}"
        )
    if 2 * config.patch_margin >= config.patch:
        raise ValueError(f"cpc: patch_margin must be below half of patch={config.patch}, got {config.patch_margin}")
    backbone = build_resnet(config.backbone, 1, config.small_images, norm=lambda channels: nn.GroupNorm(1, channels))
    width, backbone.fc = backbone.fc.in_features, nn.Identity()
    if config.candidates == "all":
        losses = [CPCLoss(width, config.offsets, config.target_dim, config.scale) for _ in range(config.directions)]
    else:
        losses = [DrawnCPCLoss(width, config.offsets, config.negatives) for _ in range(config.directions)]
    contexts = [PixelCNN(width, config.hidden, config.blocks) for _ in losses]
    patches = Patches(config.patch, config.stride, config.patch_margin, config.patch_flip_p, config.patch_drop_p)
    return CPC(backbone, patches, nn.ModuleList(contexts), nn.ModuleList(losses))


class PatchEncoder(ResNet):
    """A ResNet whose features of an image are the mean of those of its patches."""

    patches: Patches

    def forward(self, images: Tensor) -> Tensor:
        grid = self.patches(images)
        features = super().forward(grid.flatten(0, 2))
        return features.unflatten(0, (len(images), -1)).mean(1)


class CPC(nn.Module):
    """Encoder of patches, and for each direction a context network with its loss.

    Args:
        backbone: ResNet without a last layer.
        patches: how images are cut.
        contexts: networks from features [B, C, rows, columns] to contexts of the same shape, one a direction: down, up,
            and both ways sideways.
        losses: `CPCLoss` or `DrawnCPCLoss` of each direction; the loss is their mean.
    """

    def __init__(self, backbone: nn.Module, patches: Patches, contexts: nn.ModuleList, losses: nn.ModuleList):
        super().__init__()
        self.backbone, self.patches, self.contexts, self.losses = backbone, patches, contexts, losses
        save_child_as(self, "backbone", "encoder")

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        results = self.contrast(batch)
        losses = torch.stack([torch.stack([loss.mean() for loss, _ in direction]) for direction in results])
        drawn = isinstance(self.losses[0], DrawnCPCLoss)
        loss = losses.mean() if drawn else losses.sum(1).mean()
        return loss, {"top1": torch.cat([(rank == 0).float() for direction in results for _, rank in direction]).mean()}

    def contrast(self, batch: Batch) -> list[list[InfoNCE]]:
        """Loss and rank of all predictions of each direction and offset. Changes no state."""
        (images,) = batch.views
        seeds = batch.seeds()
        latents = self.latents(images, seeds)
        results = []
        with record_function("loss"):
            for turns, context, loss in zip((0, 2, 1, 3), self.contexts, self.losses):
                turned = latents.rot90(turns, (2, 3))
                drawn = [loss.draw(seeds + turns, *turned.shape[2:])] if isinstance(loss, DrawnCPCLoss) else []
                results.append(loss.contrast(turned, context(turned), *drawn))
        return results

    def latents(self, images: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Features of the patches of images, [B, C, rows, columns]."""
        grid = self.patches(images, seeds)
        features = self.backbone(grid.flatten(0, 2))
        return features.unflatten(0, grid.shape[:3]).permute(0, 3, 1, 2)

    def ranks(self, batch: Batch) -> tuple[Tensor, int]:
        """Number of negatives that score above each prediction's positive [Q], and the number of negatives."""
        ranks = [rank for direction in self.contrast(batch) for _, rank in direction]
        if isinstance(self.losses[0], DrawnCPCLoss):
            return torch.cat(ranks), self.losses[0].negatives
        places = math.prod(self.patches(batch.views[0]).shape[1:3])
        return torch.cat(ranks), world_size() * len(batch.views[0]) * places - 1

    def before_step(self, progress: float) -> None:
        """CPC has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """CPC keeps no state of its own."""

    @property
    def encoder(self) -> nn.Module:
        """The backbone, applied to the patches of an image and averaged; names of torchvision."""
        encoder = shared_copy(self.backbone, PatchEncoder)
        encoder.__dict__["patches"] = Patches(self.patches.size, self.patches.stride)
        return encoder

    def features(self, images: Tensor) -> Tensor:
        """Mean features of the patches of images [B, F]."""
        return self.encoder(images)
