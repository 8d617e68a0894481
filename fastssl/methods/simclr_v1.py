"""SimCLR: contrast each view with all other views of the batch; ResNets.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020, arXiv:2002.05709. Equals the
official TensorFlow code, but for the padding of its max-pooling: weights and names of the encoder are torchvision's.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, PROBABILITY, SHARE
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View
from fastssl.distributed import all_gather, rank, world_size
from fastssl.eval.protocols import Official
from fastssl.nn import NTXentLoss, l2_normalize
from fastssl.nn.backbones import build_backbone
from fastssl.nn.heads import mlp_head
from fastssl.nn.norm import sync_batch_norms
from fastssl.nn.sharing import headless
from fastssl.ops import batch_info_nce
from fastssl.train.config import Training


@dataclass
class Config:
    """SimCLR as in its paper (section 2.1 and appendix B.6): 1000 epochs of batch 4096 with LARS."""

    backbone: str = "resnet50"
    """encoder: resnet_mini, resnet18, resnet34, resnet50, resnet101, resnet152, timm:NAME or torchvision:NAME"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the images in pixels"""
    dim: Annotated[int, AT_LEAST_1] = 128
    """dimension of the contrasted vectors"""
    hidden: Annotated[int, AT_LEAST_1] = 2048
    """hidden width of the projector"""
    layers: Annotated[int, AT_LEAST_1] = 2
    """number of linear layers of the projector: 2 in SimCLR, 3 in its second version"""
    tau: Annotated[float, POSITIVE] = 0.1
    """temperature τ of the contrastive loss"""
    loss_scale: Annotated[float, POSITIVE] = 2.0
    """factor of the mean loss of all views: 2 as in the code, which adds the means of both views; 1 as in the paper"""
    small_images: bool = False
    """ResNet stem without stride and pooling, for images of 32 pixels"""
    crop_min: Annotated[float, SHARE] = 0.08
    """smallest fraction of the image area that a crop covers"""
    jitter: Annotated[tuple[float, float, float, float], NOT_NEGATIVE] = (0.8, 0.8, 0.8, 0.2)
    """strengths of brightness, contrast, saturation and hue jitter"""
    colour_law: Literal["simclr_v1", "simclr_v2", "torchvision"] = "simclr_v1"
    """formulas of jitter, grayscale and blur: those of the official code, or torchvision's"""
    blur_p: Annotated[float, PROBABILITY] = 0.5
    """probability of Gaussian blur"""
    training: Training = field(
        default_factory=lambda: Training(1000, 4096, "lars_simclr", lr=0.3, weight_decay=1e-6, warmup_epochs=10)
    )

    @classmethod
    def paper(cls, backbone: str = "resnet50") -> "Config":
        return cls(backbone)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(10, 64, "sgd", lr=0.4, weight_decay=5e-4, decay_all=True, warmup_epochs=0.5)
        views = {"crop_min": 0.25, "jitter": (0.4, 0.4, 0.2, 0.5), "colour_law": "torchvision", "blur_p": 0.0}
        return cls("resnet_mini", (32, 32), 128, 256, tau=0.2, **views, training=training)

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
            blur_p=self.blur_p,
            flip_p=0.5,
        )
        return Augmentation((view, view))


def linear_probe(backbone: str) -> Official:
    """SGD with Nesterov's momentum in the code. Source: Chen et al., 2020 (SimCLR), appendix B.6, and its code."""
    return Official(90, 4096, "sgd", 0.1, weight_decay=1e-6, warmup_epochs=0, standardise=False)


def build(config: Config) -> "SimCLR":
    backbone = build_backbone(
        config.backbone, config.dim, config.small_images, zero_init_residual=True, image_size=config.image_size
    )
    hidden = [config.hidden] * (config.layers - 1)
    backbone.fc = mlp_head(backbone.fc.in_features, *hidden, config.dim, last_norm="scale")
    for layer in backbone.fc:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
    return sync_batch_norms(SimCLR(backbone, config.tau, config.loss_scale))


class SimCLR(nn.Module):
    """Encoder with projector (the paper's algorithm 1).

    Args:
        backbone: encoder whose `fc` is the projector.
        tau: temperature τ.
        loss_scale: factor of the mean loss of all views.
    """

    def __init__(self, backbone: nn.Module, tau: float = 0.1, loss_scale: float = 2.0):
        super().__init__()
        self.backbone, self.tau, self.loss_scale = backbone, tau, loss_scale
        self.criterion = NTXentLoss(tau, gather=True)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        z1, z2 = self.project(batch)
        with record_function("loss"):
            loss = self.loss_scale * self.criterion(z1, z2)
        return loss, {"top1": (self.partner_ranks(z1, z2) == 0).float().mean()}

    def project(self, batch: Batch) -> tuple[Tensor, ...]:
        """Projections of both views, [B, D] each; batch norms see all views together, as in the official code."""
        return self.backbone(torch.cat(batch.views)).chunk(2)

    @torch.no_grad()
    def partner_ranks(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Number of second views of other images that are closer to each first view than its own second view, [B]."""
        z1, z2 = l2_normalize(z1), all_gather(l2_normalize(z2))
        return batch_info_nce(z1, z2, self.tau, label_offset=rank() * len(z1)).rank

    def ranks(self, batch: Batch) -> tuple[Tensor, int]:
        """Number of negative keys that score above each query's positive key [B], and the number of negative keys."""
        return self.partner_ranks(*self.project(batch)), world_size() * len(batch.views[0]) - 1

    def before_step(self, progress: float) -> None:
        """SimCLR has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """SimCLR keeps no state of its own."""

    @property
    def encoder(self) -> nn.Module:
        """The backbone without its projector; names of timm or torchvision."""
        return headless(self.backbone, "fc")

    def features(self, images: Tensor) -> Tensor:
        """Features of the backbone [B, F], before its projector."""
        return self.encoder(images)
