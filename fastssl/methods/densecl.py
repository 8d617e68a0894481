"""DenseCL: MoCo v2 that also contrasts the places of feature maps, each with its most similar place of the other view.

Wang et al., "Dense Contrastive Learning for Self-Supervised Visual Pre-Training", 2021, arXiv:2011.09157. Names and
layouts in the state dict are those of the official code, without its second copy of the backbone.
"""

import functools
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import SHARE
from fastssl.contract import Batch
from fastssl.distributed import shuffle, unshuffle, world_size
from fastssl.nn.backbones import ForeignNetwork, build_backbone
from fastssl.nn.losses import InfoNCELoss, l2_normalize
from fastssl.nn.momentum import MomentumEncoder
from fastssl.ops import InfoNCE, dense_match
from fastssl.train.config import Training, check_batch_norm_parts
from fastssl.train.schedule import cosine_schedule

from . import moco_v1, moco_v2

OFFICIAL = "densecl"  # layout of the reference checkpoint


@dataclass
class Config(moco_v2.Config):
    """DenseCL as in its paper (section 4.1) and code for ImageNet: 200 epochs, batch size 256."""

    dense_weight: Annotated[float, SHARE] = 0.5
    """share λ of the dense loss; the rest is that of the global one"""
    training: Training = field(
        default_factory=lambda: Training(
            epochs=200, batch_size=256, optimizer="sgd", lr=0.03, weight_decay=1e-4, decay_all=True, lr_by_epoch=True
        )
    )

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper. A map of 2×2 places is easily told apart, so the dense loss has less weight."""
        config = super().small()
        config.dense_weight = 0.2
        return config


linear_probe = moco_v1.linear_probe


def build(config: Config) -> "DenseCL":
    splits = check_batch_norm_parts(config.training, config.bn_splits, world_size(), "densecl")
    backbone = build_backbone(config.backbone, 1, config.small_images, splits, image_size=config.image_size)
    if isinstance(backbone, ForeignNetwork):
        with torch.no_grad():
            backbone.eval().feature_map(torch.zeros(1, 3, *config.image_size))  # refuses a network without a map
        backbone.train()
    width, backbone.fc = backbone.fc.in_features, nn.Identity()
    return DenseCL(
        DenseEncoder(backbone, DenseNeck(width, config.dim)),
        {"dim": config.dim, "queue_size": config.queue_size, "tau": config.tau, "shard": config.shard_queue},
        (config.ema_momentum, config.ema_momentum if config.ema_momentum_end is None else config.ema_momentum_end),
        config.dense_weight,
        config.symmetric,
        shuffled=max(config.bn_splits, world_size()) > 1,
    )


class DenseNeck(nn.Module):
    """Global and dense projection heads: two linear layers, and the same as 1×1 convolutions.

    Args:
        width: channels C of the feature map, and the hidden width.
        dim: D of the projections.
    """

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))
        self.mlp2 = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, dim, 1))

    def forward(self, features: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Feature map [B, C, H, W] and its mean [B, C] → projections of the image [B, D] and of its places
        [B, D, H · W]."""
        return self.mlp(pooled), self.mlp2(features).flatten(2)


class DenseEncoder(nn.Sequential):
    """A backbone with `feature_map`, and a `DenseNeck`. Networks of other libraries pool their map themselves."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the places [B, C, S], and the neck's projections of image and places."""
        backbone: Any = self[0]
        if isinstance(backbone, ForeignNetwork):
            pooled, features = backbone.features_and_map(images)
        else:
            features = backbone.feature_map(images)
            pooled = features.mean((2, 3))
        return features.flatten(2), *self[1](features, pooled)


class DenseCL(nn.Module):
    """Query encoder, momentum key encoder, and two queues: of images, and of means over the places of images.

    Args:
        encoder: `DenseEncoder`, or a module with its results and children.
        queue: arguments of both queues' `InfoNCELoss`.
        momentum: momentum coefficients m of the key encoder at the start and the end of training.
        dense_weight: share λ of the dense loss.
        symmetric: use each view once as query and once as key.
        shuffled: shuffle the batch over all ranks for the key encoder's batch norms.
    """

    def __init__(
        self,
        encoder: nn.Sequential,
        queue: dict,
        momentum: tuple[float, float] = (0.999, 0.999),
        dense_weight: float = 0.5,
        symmetric: bool = False,
        shuffled: bool = False,
    ):
        super().__init__()
        self.dense_weight, self.symmetric, self.shuffled = dense_weight, symmetric, shuffled
        self.momentum, self.momentum_end = momentum
        self.encoder_q, self.encoder_k = encoder, MomentumEncoder(encoder, self.momentum)
        self.criterion = InfoNCELoss(**queue, normalize=False)
        self.dense_criterion = InfoNCELoss(**queue, normalize=False)
        for old, new in (("criterion.queue", "queue"), ("dense_criterion.queue", "queue2")):
            self.register_state_dict_post_hook(functools.partial(moco_v1.rename, old, new))
            self.register_load_state_dict_pre_hook(functools.partial(moco_v1.rename, new, old))
        self.pending: list[list[tuple[Tensor, Tensor]]] = []  # entries of both queues of each micro-batch's directions

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        entries, (loss, rank), (dense_loss, dense_rank) = self.contrast(batch)
        if torch.is_grad_enabled():
            self.pending.append(entries)
        loss, dense_loss = loss.mean(), dense_loss.mean()
        metrics = {"loss_global": loss.detach(), "loss_dense": dense_loss.detach()}
        metrics |= {"top1": (rank == 0).float().mean(), "top1_dense": (dense_rank == 0).float().mean()}
        return (1 - self.dense_weight) * loss + self.dense_weight * dense_loss, metrics

    def contrast(self, batch: Batch) -> tuple[list[tuple[Tensor, Tensor]], InfoNCE, InfoNCE]:
        """What enters both queues for each direction; loss and rank of all images and of all places. Changes no
        state."""
        view1, view2 = batch.views
        pairs = [(view1, view2), (view2, view1)] if self.symmetric else [(view1, view2)]
        keys = [self.keys(view) for _, view in pairs]
        queries = [self.encoder_q(view) for view, _ in pairs]
        images, places = [], []
        with record_function("loss"):
            for (q_features, q, q_dense), (k_features, k, k_dense, _) in zip(queries, keys):
                match = dense_match(q_features, k_features)
                positives = k_dense.gather(2, match[:, None].expand(-1, k_dense.shape[1], -1))
                images.append(self.criterion.contrast(l2_normalize(q), k))
                places.append(self.dense_criterion.contrast(l2_normalize(_rows(q_dense)), _rows(positives)))
            entries = [(k, means) for _, k, _, means in keys]
            return entries, *(InfoNCE(*map(torch.cat, zip(*results))) for results in (images, places))

    def ranks(self, batch: Batch) -> tuple[Tensor, int]:
        """Number of negative keys that score above each image's positive key [Q], and the number of negative keys."""
        _, (_, rank), _ = self.contrast(batch)
        return rank, self.criterion.full_queue().shape[0]

    @torch.no_grad()
    def keys(self, images: Tensor) -> tuple[Tensor, ...]:
        """By the key encoder: features [B, C, S]; unit keys of the images [B, D] and of their places [B, D, S]; the
        mean of the places before that, made a unit vector [B, D]."""
        order = None
        if self.shuffled:
            images, order = shuffle(images)
        features, k, dense = self.encoder_k(images)
        made = features, l2_normalize(k), l2_normalize(dense), l2_normalize(dense.mean(2))
        return made if order is None else tuple(unshuffle(x, order) for x in made)

    def before_step(self, progress: float) -> None:
        """The forward pass of DenseCL has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """Enqueue the step's keys in the order of the whole batch, as MoCo does, and update the key encoder."""
        for direction in zip(*self.pending):
            for k, means in direction:
                self.criterion.enqueue(k)
                self.dense_criterion.enqueue(means)
        self.pending = []
        self.encoder_k.update(self.encoder_q, self.momentum_at(progress))

    def momentum_at(self, progress: float) -> float:
        """Momentum coefficient of the key encoder's update at `progress`."""
        return cosine_schedule(self.momentum, self.momentum_end, progress)

    @property
    def encoder(self) -> nn.Module:
        """The query encoder's backbone; names of torchvision."""
        return self.encoder_q[0]

    def features(self, images: Tensor) -> Tensor:
        """Pooled features of the query encoder's backbone [B, F]."""
        return self.encoder(images)


def _rows(places: Tensor) -> Tensor:
    """[B, D, S] → [B · S, D], image by image."""
    return places.mT.flatten(0, 1)
