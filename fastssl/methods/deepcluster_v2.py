"""DeepCluster-v2: cluster the embeddings of the last epoch by spherical k-means, and predict each crop's cluster.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", 2020, arXiv:2006.09882,
section 4.1 and appendix. Names in the state dict are those of the official code.
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1
from fastssl.contract import Batch, TrainingImages
from fastssl.distributed import all_gather, all_mean, world_size
from fastssl.nn import l2_normalize
from fastssl.nn.clusters import UNKNOWN, clusters_of, fit_assignments
from fastssl.nn.crops import encode_crops
from fastssl.nn.embedding_memory import EmbeddingMemory
from fastssl.nn.kmeans import k_means, random_rows
from fastssl.nn.norm import sync_batch_norms
from fastssl.nn.sharing import save_child_unprefixed
from fastssl.ops import linear_cross_entropy
from fastssl.train.config import Training

from . import swav

OFFICIAL = swav.OFFICIAL
ASSIGNED = swav.ASSIGNED  # crops whose embeddings are stored: the large ones


@dataclass
class Config(swav.CropConfig):
    """DeepCluster-v2 as in its paper and code: 800 epochs of batch 4096 with LARC, two large and six small crops."""

    prototypes: Annotated[tuple[int, ...], AT_LEAST_1] = (3000, 3000, 3000)
    """number of clusters of each head"""
    kmeans_rounds: Annotated[int, AT_LEAST_1] = 10
    """rounds of k-means before each epoch"""
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
        )
    )

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(10, 32, "sgd", lr=0.8, weight_decay=5e-4, decay_all=True, warmup_epochs=0.5)
        views = {"crop_min": 0.4, "local_crop_min": 0.2, "jitter": (0.4, 0.4, 0.2, 0.5), "blur_p": 0.0}
        sizes = {"dim": 64, "hidden": 256, "prototypes": (40, 40, 40)}
        return cls("resnet_mini", (32, 32), (16, 16), 2, **sizes, **views, training=training)


linear_probe = swav.linear_probe


def build(config: Config) -> "DeepClusterV2":
    backbone, projector = swav.build_parts(config)
    method = DeepClusterV2(backbone, projector, config.dim, config.prototypes, config.tau, config.kmeans_rounds)
    return sync_batch_norms(method)


class DeepClusterV2(nn.Module):
    """Encoder and projector, the centroids of several clusterings, and the memory that is clustered.

    Args:
        backbone: encoder, images → features [B, F]; its parameters have no prefix in the state dict.
        projector: features → embeddings before their normalisation [B, D].
        dim: D.
        clusters: number of clusters of each head; head h clusters the embeddings of large crop h mod 2.
        tau: temperature τ.
        rounds: rounds of k-means.
    """

    tables = ("assignments",)  # whose shape may differ from that of a file, see `ViT.tables`

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        dim: int,
        clusters: tuple[int, ...],
        tau: float = 0.1,
        rounds: int = 10,
    ):
        super().__init__()
        self.backbone, self.projection_head, self.tau, self.rounds = backbone, projector, tau, rounds
        heads = {f"prototypes{i}": nn.Linear(dim, count, bias=False) for i, count in enumerate(clusters)}
        self.prototypes = nn.ModuleDict(heads).requires_grad_(False)  # centroids, which are not trained
        self.memory = EmbeddingMemory(ASSIGNED, dim)
        self.register_buffer("assignments", torch.full((len(clusters), 0), UNKNOWN))  # [heads, images]
        self.pending: list[tuple[Tensor, Tensor]] = []  # (embeddings, index) of each micro-batch of the current step
        save_child_unprefixed(self, "backbone")
        self.register_load_state_dict_pre_hook(fit_assignments)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.embed(batch.views)
        clusters = clusters_of(self.assignments, batch.index)
        with record_function("loss"):
            known = all_mean((clusters[0] >= 0).sum().float()).clamp(min=1 / world_size())  # of the mean rank
            losses = []
            for head, own in zip(self.prototypes.values(), clusters):
                loss = linear_cross_entropy(z, head.weight, self.tau, own.repeat(len(batch.views)))
                losses.append(loss.sum() / (len(batch.views) * known))
        large = z.detach()[: ASSIGNED * len(batch.index)]
        if self.training:
            self.pending.append((large.unflatten(0, (ASSIGNED, -1)), batch.index))
        return torch.stack(losses).mean(), {"std": large.std(0).mean()}  # near 0: all images have one embedding

    def embed(self, crops: tuple[Tensor, ...]) -> Tensor:
        """Unit embeddings [V·B, D] of V crops; the projector sees all of them together."""
        return l2_normalize(self.projection_head(encode_crops(self.backbone, crops)))

    def check_images(self, count: int, in_epoch: int) -> None:
        if most := [head.out_features for head in self.prototypes.values() if head.out_features > in_epoch]:
            raise ValueError(
                f"deepcluster_v2: --prototypes must be at most the {in_epoch} images of an epoch, got {most[0]}"
            )

    @torch.no_grad()
    def before_epoch(self, images: TrainingImages) -> None:
        """Cluster the memory; fill it first, in a pass in training mode, where it is not that of these images."""
        memory = self.memory
        if (self.assignments.shape[1], len(memory)) != (images.count, images.batches * memory.batch) or not len(memory):
            for batch in images.augmented():
                if not memory.batch or len(memory) != images.batches * len(batch.index):
                    memory.resize(images.batches, len(batch.index))
                z = [self.embed((crop,)) for crop in batch.views[:ASSIGNED]]  # one crop at a time, for the batch norms
                memory.write(torch.stack(z), batch.index)
        self.check_images(images.count, len(memory) * world_size())
        index = all_gather(memory.index)
        if self.assignments.shape[1] != images.count:
            self.assignments = self.assignments.new_empty(len(self.prototypes), images.count)
        self.assignments.fill_(UNKNOWN)  # in place: a CUDA graph reads it
        for i, head in enumerate(self.prototypes.values()):
            x = memory.embeddings[i % ASSIGNED]
            centroids, nearest = k_means(x, random_rows(x, head.out_features, memory.numbers()), self.rounds)
            head.weight.copy_(centroids)
            self.assignments[i, index] = all_gather(nearest)

    def before_step(self, progress: float) -> None:
        """DeepCluster-v2 has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """Store the embeddings of the large crops."""
        pending, self.pending = self.pending, []
        for embeddings, index in pending if len(self.memory) else ():
            self.memory.write(embeddings, index)

    @property
    def encoder(self) -> nn.Module:
        """The backbone; names of torchvision."""
        return self.backbone

    def features(self, images: Tensor) -> Tensor:
        """Features of the backbone [B, F], before its projector."""
        return self.backbone(images)
