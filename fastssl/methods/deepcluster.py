"""DeepCluster: cluster the features of all images before each epoch, and learn to classify images by their clusters.

Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features", 2018, arXiv:1807.05520.
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, NOT_NEGATIVE, SHARE
from fastssl.contract import Batch, TrainingImages
from fastssl.data.augmentation import Augmentation, View
from fastssl.distributed import all_gather, all_sum
from fastssl.nn import sobel
from fastssl.nn.backbones import build_backbone
from fastssl.nn.clusters import UNKNOWN, clusters_of, fit_assignments
from fastssl.nn.kmeans import k_means, random_rows, whitened
from fastssl.nn.norm import sync_batch_norms
from fastssl.nn.sobel import SobelNet
from fastssl.train.config import Training


@dataclass
class Config:
    """DeepCluster as in its paper (section 4.1) and code: AlexNet, 200 epochs of SGD at a constant learning rate."""

    backbone: str = "alexnet"
    """encoder: alexnet, vgg16, resnet_mini, resnet18, resnet34, resnet50, resnet101, resnet152, timm:NAME or
    torchvision:NAME"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the images in pixels"""
    sobel: bool = True
    """replace colours by the gradients of the grey image, for alexnet and vgg16"""
    clusters: Annotated[int, AT_LEAST_1] = 10000
    """number of clusters"""
    components: Annotated[int, AT_LEAST_1] = 256
    """principal components of the features that are whitened and clustered"""
    kmeans_rounds: Annotated[int, AT_LEAST_1] = 20
    """rounds of k-means before each epoch"""
    small_images: bool = False
    """ResNet stem without stride and pooling, for images of 32 pixels"""
    crop_min: Annotated[float, SHARE] = 0.08
    """smallest fraction of the image area that a crop covers"""
    jitter: Annotated[tuple[float, float, float, float], NOT_NEGATIVE] = (0.0, 0.0, 0.0, 0.0)
    """strengths of brightness, contrast, saturation and hue jitter, with probability 0.8; none in the paper"""
    training: Training = field(
        default_factory=lambda: Training(200, 256, "sgd", lr=0.05, weight_decay=1e-5, decay_all=True, lr_end=0.05)
    )

    @classmethod
    def paper(cls, backbone: str = "alexnet") -> "Config":
        """A ResNet takes the colours of the images."""
        return cls(backbone, sobel=backbone in sobel.NAMES)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(10, 32, "sgd", lr=0.4, weight_decay=5e-4, decay_all=True, warmup_epochs=0.5)
        views = {"crop_min": 0.25, "jitter": (0.4, 0.4, 0.2, 0.5)}
        sizes = {"clusters": 40, "components": 24}
        return cls("resnet_mini", (32, 32), False, **sizes, **views, training=training)

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(
            (View(self.image_size, crop=(self.crop_min, 1.0), jitter=self.jitter, jitter_p=0.8, flip_p=0.5),)
        )


def build(config: Config) -> "DeepCluster":
    if config.backbone in sobel.NAMES:
        backbone: nn.Module = SobelNet(config.backbone, config.image_size, config.sobel)
        width = 4096
    else:
        if config.sobel:
            raise ValueError(f"deepcluster: --sobel is for {' and '.join(sobel.NAMES)}, got {config.backbone}")
        backbone = build_backbone(config.backbone, 1, config.small_images, image_size=config.image_size)
        width, backbone.fc = backbone.fc.in_features, nn.Identity()
    if config.components > width:
        raise ValueError(
            f"deepcluster: --components must be at most the {width} features of {config.backbone}, got "
            f"{config.components}"
        )
    return sync_batch_norms(DeepCluster(backbone, width, config.clusters, config.components, config.kmeans_rounds))


def parameter_groups(method: "DeepCluster") -> list[dict]:
    """The new layer of each epoch has no momentum."""
    trained = [p for p in method.backbone.parameters() if p.requires_grad]
    return [{"params": trained}, {"params": list(method.top_layer.parameters()), "momentum": 0.0}]


class DeepCluster(nn.Module):
    """Encoder, and the layer that classifies clusters, a new one in each epoch.

    Instead of drawing as many images of each cluster, every image of an epoch is seen once, with a weight inversely
    proportional to the size of its cluster: the gradient has the same expectation.

    Args:
        backbone: encoder, images → features [B, width].
        width: number of features.
        clusters: number of clusters.
        components: principal components that are clustered.
        rounds: rounds of k-means.
    """

    tables = ("assignments",)  # whose shape may differ from that of a file, see `ViT.tables`

    def __init__(self, backbone: nn.Module, width: int, clusters: int, components: int = 256, rounds: int = 20):
        super().__init__()
        self.backbone, self.top_layer = backbone, nn.Linear(width, clusters)
        self.components, self.rounds = components, rounds
        self.register_buffer("assignments", torch.zeros(0, dtype=torch.int64))  # [images]
        self.register_buffer("weights", torch.ones(clusters))  # of the images of each cluster
        self.register_load_state_dict_pre_hook(fit_assignments)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        (images,) = batch.views
        logits, clusters = self.top_layer(self.backbone(images)), clusters_of(self.assignments, batch.index)
        with record_function("loss"):
            losses = F.cross_entropy(logits.float(), clusters, reduction="none", ignore_index=UNKNOWN)
            loss = (losses * self.weights[clusters.clamp(min=0)]).sum() / (clusters >= 0).sum().clamp(min=1)
        return loss, {"top1": (logits.argmax(1) == clusters).float().mean()}

    def check_images(self, count: int, in_epoch: int) -> None:
        if (clusters := self.top_layer.out_features) > count:
            raise ValueError(f"deepcluster: --clusters must be at most the {count} images, got {clusters}")

    @torch.no_grad()
    def before_epoch(self, images: TrainingImages) -> None:
        """Cluster the features of all images, and draw a new layer."""
        features, index = self._features_of_all(images)
        places = torch.zeros(images.count, dtype=torch.int64, device=index.device)
        places[index] = 1
        seen = all_sum(places)
        count, clusters = int(seen.sum()), self.top_layer.out_features
        self.check_images(count, count)
        features = whitened(features, self.components)
        first = random_rows(features, clusters, seen.cumsum(0)[index] - 1)
        _, nearest = k_means(features, first, self.rounds, spherical=False)
        places[index] = nearest + 1
        assignments = all_sum(places) - 1
        if len(self.assignments) != images.count:
            self.assignments = torch.empty_like(assignments)
        self.assignments.copy_(assignments.masked_fill(assignments < 0, UNKNOWN))  # in place: a CUDA graph reads it
        sizes = torch.bincount(assignments[assignments >= 0], minlength=clusters)
        self.weights.copy_(count / (sizes > 0).sum() / sizes.clamp(min=1))
        seed = int(all_gather(torch.randint(2**62, (1,)).to(index.device))[0])  # the first rank's
        generator = torch.Generator().manual_seed(seed)
        self.top_layer.weight.copy_(torch.empty(self.top_layer.weight.shape).normal_(std=0.01, generator=generator))
        self.top_layer.bias.zero_()

    def _features_of_all(self, images: TrainingImages) -> tuple[Tensor, Tensor]:
        """Features [M, width] of this rank's share of the images, in evaluation mode, and their numbers [M]."""
        encode = getattr(self.backbone, "before_relu", self.backbone)
        self.eval()
        parts = [(encode(batch.views[0]).float(), batch.index) for batch in images.plain()]
        self.train()
        weight = self.top_layer.weight
        empty = (weight.new_empty(0, weight.shape[1]), torch.empty(0, dtype=torch.int64, device=weight.device))
        features, index = zip(empty, *parts)
        return torch.cat(features), torch.cat(index)

    def before_step(self, progress: float) -> None:
        """DeepCluster has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """DeepCluster keeps no state of its own."""

    @property
    def encoder(self) -> nn.Module:
        """The backbone; a ResNet with the names of torchvision."""
        return self.backbone

    def features(self, images: Tensor) -> Tensor:
        """Features of the backbone [B, F], before the layer of the clusters."""
        return self.backbone(images)
