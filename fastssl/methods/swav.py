"""SwAV: predict the assignment of one crop to prototypes from other crops; assignments use all prototypes equally.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", 2020, arXiv:2006.09882.
Names in the state dict are those of the official code.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, PROBABILITY, SHARE
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, multi_crop
from fastssl.eval.protocols import Official
from fastssl.milestones import MILESTONE
from fastssl.nn import KeyQueue, l2_normalize, sinkhorn_potentials
from fastssl.nn.backbones import ForeignNetwork, build_backbone
from fastssl.nn.crops import encode_crops
from fastssl.nn.heads import mlp_head
from fastssl.nn.norm import sync_batch_norms
from fastssl.nn.sharing import save_child_unprefixed
from fastssl.ops import PrototypeTargets, soft_cross_entropy
from fastssl.train.config import Training

OFFICIAL = "swav"  # layout of the reference checkpoint
ASSIGNED = 2  # crops whose assignments are predicted: the large ones


@dataclass
class CropConfig:
    """What SwAV and DeepCluster-v2 have in common: two large and several small crops of an image, and the projector."""

    backbone: str = "resnet50"
    """encoder: resnet_mini, resnet18, resnet34, resnet50, resnet101, resnet152, timm:NAME or torchvision:NAME"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the two large views in pixels"""
    local_size: Annotated[tuple[int, int], AT_LEAST_1] = (96, 96)
    """height and width of the small views in pixels"""
    local_crops: Annotated[int, NOT_NEGATIVE] = 6
    """number of small views"""
    dim: Annotated[int, AT_LEAST_1] = 128
    """dimension of embeddings and prototypes"""
    hidden: Annotated[int, AT_LEAST_1] = 2048
    """hidden width of the projector"""
    tau: Annotated[float, POSITIVE] = 0.1
    """temperature τ of the softmax over prototypes"""
    small_images: bool = False
    """ResNet stem without stride and pooling, for images of 32 pixels"""
    crop_min: Annotated[float, SHARE] = 0.14
    """fraction of the image area that divides large views, above it, from small ones"""
    local_crop_min: Annotated[float, SHARE] = 0.05
    """smallest fraction of the image area that a small view covers"""
    jitter: Annotated[tuple[float, float, float, float], NOT_NEGATIVE] = (0.8, 0.8, 0.8, 0.2)
    """strengths of brightness, contrast, saturation and hue jitter"""
    blur_p: Annotated[float, PROBABILITY] = 0.5
    """probability of Gaussian blur"""

    @classmethod
    def paper(cls, backbone: str = "resnet50"):
        return cls(backbone)

    @property
    def augmentation(self) -> Augmentation:
        areas = (self.local_crop_min, self.crop_min)
        return multi_crop(
            self.image_size, self.local_size, self.local_crops, areas=areas, jitter=self.jitter, blur_p=self.blur_p
        )


@dataclass
class Config(CropConfig):
    """SwAV as in its paper (section 4) and code: 800 epochs of batch 4096 with LARC, two large and six small crops."""

    prototypes: Annotated[int, AT_LEAST_1] = 3000
    """number of prototypes"""
    epsilon: Annotated[float, POSITIVE] = 0.05
    """temperature ε of the assignments; 0.03 if the loss stays at the logarithm of the number of prototypes"""
    sinkhorn_rounds: Annotated[int, AT_LEAST_1] = 3
    """rounds of Sinkhorn-Knopp"""
    queue_size: Annotated[int, NOT_NEGATIVE] = 0
    """earlier embeddings that take part in the assignments, over all ranks, for small batches: 3840 at 256 in the code;
    lowered to a multiple of the batch size; 0 for none"""
    queue_start: Annotated[float, NOT_NEGATIVE, MILESTONE] = 15
    """epoch at which the queue begins to fill; it is used when it is full"""
    training: Training = field(
        default_factory=lambda: Training(
            800,
            4096,
            "larc",
            lr=0.3,
            weight_decay=1e-6,
            decay_all=True,
            warmup_epochs=10,
            warmup_lr=0.3 / 16,
            warmup_includes_peak=True,
            lr_end=0.0003,
            freeze=("prototypes",),
            freeze_epochs=1.003,  # 313 steps of 312 an epoch
        )
    )

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        frozen: Any = {"freeze": ("prototypes",), "freeze_epochs": 0.5}
        training = Training(10, 32, "sgd", 0.8, 5e-4, decay_all=True, warmup_epochs=0.5, **frozen)
        views = {"crop_min": 0.4, "local_crop_min": 0.2, "jitter": (0.4, 0.4, 0.2, 0.5), "blur_p": 0.0}
        sizes = {"dim": 64, "hidden": 256, "prototypes": 120, "epsilon": 0.03}
        return cls("resnet_mini", (32, 32), (16, 16), 2, **sizes, **views, queue_start=1, training=training)


def linear_probe(backbone: str) -> Official:
    """SGD. Source: Caron et al., 2020 (SwAV), section 4.1 and its code, eval_linear.py."""
    views = {"standardise": False, "interpolation": "bilinear"}
    return Official(100, 256, "sgd", 0.3, weight_decay=1e-6, warmup_epochs=0, lr_by_epoch=True, **views)


def build(config: Config) -> "SwAV":
    backbone, projector = build_parts(config)
    training = config.training
    queue_size = config.queue_size - config.queue_size % training.batch_size
    if config.queue_size and not queue_size:
        raise ValueError(
            f"swav: --queue-size must be 0 or at least the batch of {training.batch_size}, got {config.queue_size}"
        )
    prototypes = nn.Linear(config.dim, config.prototypes, bias=False)
    temperatures = (config.tau, config.epsilon)
    queue = (queue_size, config.queue_start / training.epochs)
    return sync_batch_norms(SwAV(backbone, projector, prototypes, temperatures, config.sinkhorn_rounds, queue))


def build_parts(config: CropConfig) -> tuple[nn.Module, nn.Module]:
    """Backbone without last layer, and projector."""
    backbone = build_backbone(config.backbone, 1, config.small_images, image_size=config.image_size)
    if isinstance(backbone, ForeignNetwork) and config.local_crops:
        backbone.check(config.local_size, "--local-size")
    projector = mlp_head(backbone.fc.in_features, config.hidden, config.dim, bias=True, last_bias=True)
    backbone.fc = nn.Identity()
    return backbone, projector


class SwAV(nn.Module):
    """Encoder, projector and prototypes (the paper's section 3).

    Args:
        backbone: encoder, images → features [B, F]; its parameters have no prefix in the state dict.
        projector: features → embeddings before their normalisation [B, D].
        prototypes: linear layer without bias; its rows are made unit vectors at the start of every step.
        temperatures: τ of the softmax, and ε of the assignments.
        rounds: rounds of Sinkhorn-Knopp.
        queue: number of embeddings in the queue of each large crop, over all ranks, and the progress at which it begins
            to fill.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        prototypes: nn.Linear,
        temperatures: tuple[float, float] = (0.1, 0.05),
        rounds: int = 3,
        queue: tuple[int, float] = (0, 0.0),
    ):
        super().__init__()
        self.backbone, self.projection_head, self.prototypes = backbone, projector, prototypes
        (self.tau, self.epsilon), self.rounds = temperatures, rounds
        size, self.queue_start = queue
        self.queue = nn.ModuleList(
            KeyQueue(prototypes.in_features, size, shard=True) for _ in range(ASSIGNED if size else 0)
        )
        for one in self.queue:
            one.queue.zero_()  # a row of zeros has not been filled
        self.register_buffer("queue_is_full", torch.zeros((), dtype=torch.bool), persistent=False)
        self.queue_fills = False
        self.pending: list[Tensor] = []  # embeddings of the large crops of each micro-batch of the current step
        save_child_unprefixed(self, "backbone")

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        z = l2_normalize(self.projection_head(encode_crops(self.backbone, batch.views)))
        with record_function("loss"):
            loss = self.swapped_prediction(z.unflatten(0, (len(batch.views), -1)))
        large = z.detach()[: ASSIGNED * len(batch.views[0])]
        if self.training and self.queue:
            self.pending.append(large.unflatten(0, (ASSIGNED, -1)))
        return loss, {"std": large.std(0).mean()}  # near 0: all images have one embedding

    def swapped_prediction(self, z: Tensor) -> Tensor:
        """The mean cross entropy of the crops' embeddings [V, B, D] against the assignments of the two large crops,
        each predicted from all crops but its own."""
        weight, losses = self.prototypes.weight, []
        for i in range(ASSIGNED):
            others = torch.cat([z[:i], z[i + 1 :]]).flatten(0, 1)
            rows = torch.arange(z.shape[1], device=z.device).repeat(z.shape[0] - 1)[:, None]
            losses.append(soft_cross_entropy(others, weight, self.tau, self.targets(i, z[i].detach()), rows))
        return torch.stack(losses).mean()

    def targets(self, i: int, z: Tensor) -> PrototypeTargets:
        """Assignments of large crop i, embeddings [B, D] without gradient, over all ranks and with its queue."""
        weight, teacher, counted = self.prototypes.weight.detach(), z, None
        if self.queue:
            queue = self.queue[i].queue
            teacher = torch.cat([queue.to(z.dtype), z])
            counted = torch.cat([self.queue_is_full.expand(len(queue)), self.queue_is_full.new_ones(len(z))])
        row, column = sinkhorn_potentials(teacher, weight, self.epsilon, self.rounds, counted)
        return PrototypeTargets(z, weight, self.epsilon, row[-len(z) :], column)

    @torch.no_grad()
    def before_step(self, progress: float) -> None:
        weight = self.prototypes.weight
        weight.copy_(F.normalize(weight, dim=1))
        self.queue_fills = bool(self.queue) and progress >= self.queue_start - 1e-9
        if self.queue:  # its last row is filled last; the host does not wait for the answer
            self.queue_is_full.copy_(self.queue[0].queue[-1].any())

    def after_step(self, progress: float) -> None:
        """Enter the embeddings of the large crops into their queues."""
        pending, self.pending = self.pending, []
        if self.queue_fills:
            for queue, z in zip(self.queue, torch.cat(pending, 1)):
                queue.enqueue(z)

    @property
    def encoder(self) -> nn.Module:
        """The backbone; names of torchvision."""
        return self.backbone

    def features(self, images: Tensor) -> Tensor:
        """Features of the backbone [B, F], before its projector."""
        return self.backbone(images)
