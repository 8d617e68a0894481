"""MoCo: contrast each query with its positive key and a queue of negative keys from a momentum encoder.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020, arXiv:1911.05722. Names and
layouts in the state dict are those of the official code (queue [D, K]; in memory it is [K, D]).
"""

import functools
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, COEFFICIENT, NOT_NEGATIVE, POSITIVE, SHARE
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View
from fastssl.distributed import shuffle, unshuffle, world_size
from fastssl.eval.protocols import Official
from fastssl.nn.backbones import build_backbone
from fastssl.nn.heads import moco_v2_head
from fastssl.nn.losses import InfoNCELoss, l2_normalize
from fastssl.nn.momentum import MomentumEncoder
from fastssl.nn.sharing import headless
from fastssl.ops import InfoNCE
from fastssl.train.config import Training, check_batch_norm_parts
from fastssl.train.schedule import cosine_schedule

OFFICIAL = "moco"  # layout of the reference checkpoint


@dataclass
class Config:
    """MoCo as in its paper (sections 3.3 and 4, "Technical details") and code: 200 epochs, batch size 256."""

    backbone: str = "resnet50"
    """encoder: resnet_mini, resnet18, resnet34, resnet50, resnet101, resnet152, timm:NAME or torchvision:NAME"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the images in pixels"""
    dim: Annotated[int, AT_LEAST_1] = 128
    """dimension of queries and keys"""
    queue_size: Annotated[int, AT_LEAST_1] = 65536
    """number of negative keys in the queue (K)"""
    tau: Annotated[float, POSITIVE] = 0.07
    """temperature τ of the contrastive loss"""
    ema_momentum: Annotated[float, COEFFICIENT] = 0.999
    """momentum coefficient m of the key encoder"""
    ema_momentum_end: Annotated[float | None, COEFFICIENT] = None
    """momentum coefficient m at the end of training, reached along a cosine; constant if not given"""
    symmetric: bool = False
    """use each view once as query and once as key, and average both losses"""
    bn_splits: Annotated[int, AT_LEAST_1] = 8
    """parts of the whole batch with separate batch-norm statistics (8 GPUs in the paper), at least one per rank"""
    shard_queue: bool = False
    """keep 1/ranks of the queue on each rank instead of a copy of the whole queue"""
    small_images: bool = False
    """ResNet stem without stride and pooling, for images of 32 pixels"""
    crop_min: Annotated[float, SHARE] = 0.2
    """smallest fraction of the image area that a crop covers"""
    jitter: Annotated[tuple[float, float, float, float], NOT_NEGATIVE] = (0.4, 0.4, 0.4, 0.4)
    """strengths of brightness, contrast, saturation and hue jitter"""
    training: Training = field(
        default_factory=lambda: Training(
            epochs=200,
            batch_size=256,
            optimizer="sgd",
            lr=0.03,
            weight_decay=1e-4,
            decay_all=True,
            lr_by_epoch=True,
            lr_drops=(120, 160),
        )
    )

    @classmethod
    def paper(cls, backbone: str = "resnet50") -> "Config":
        return cls(backbone)  # the same numbers for all ResNets

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(epochs=10, batch_size=32, optimizer="sgd", lr=1.2, weight_decay=5e-4, decay_all=True)
        return cls(
            "resnet_mini",
            (32, 32),
            queue_size=512,
            ema_momentum=0.99,
            symmetric=True,
            bn_splits=1,
            crop_min=0.25,
            jitter=(0.4, 0.4, 0.2, 0.5),
            training=training,
        )

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
        return Augmentation((view, view))


def linear_probe(backbone: str) -> Official:
    """SGD with a learning rate of 30. Source: He et al., 2020 (MoCo), section 4.1; MoCo v2 keeps it."""
    return Official(
        100,
        256,
        "sgd",
        30.0,
        warmup_epochs=0,
        lr_by_epoch=True,
        lr_drops=(60, 80),
        standardise=False,
        interpolation="bilinear",
    )


def build(config: Config, mlp: bool = False) -> "MoCo":
    splits = check_batch_norm_parts(config.training, config.bn_splits, world_size(), "moco")
    encoder = build_backbone(config.backbone, config.dim, config.small_images, splits, image_size=config.image_size)
    choices = {"shuffled": max(config.bn_splits, world_size()) > 1, "shard_queue": config.shard_queue}
    momenta = {"momentum": config.ema_momentum, "momentum_end": config.ema_momentum_end}
    return MoCo(encoder, config.queue_size, config.tau, mlp=mlp, symmetric=config.symmetric, **choices, **momenta)


class MoCo(nn.Module):
    """Query encoder, momentum key encoder and queue.

    Args:
        encoder: network whose last layer is the linear `fc`.
        queue_size: number of negative keys K.
        tau: temperature τ.
        momentum: momentum coefficient m of the key encoder.
        mlp: replace `fc` by the MLP head of MoCo v2.
        symmetric: use each view once as query and once as key; the loss is the mean of both.
        shuffled: shuffle the batch over all ranks for the key encoder, so that its batch norms compute statistics over
            other sets of samples than those of the query encoder.
        shard_queue: keep 1/ranks of the queue on each rank; all ranks must then make state dicts together.
        momentum_end: momentum coefficient at the end of training, reached along a cosine; None for a constant one.
    """

    def __init__(
        self,
        encoder: nn.Module,
        queue_size: int = 65536,
        tau: float = 0.07,
        momentum: float = 0.999,
        mlp: bool = False,
        symmetric: bool = False,
        shuffled: bool = False,
        shard_queue: bool = False,
        momentum_end: float | None = None,
    ):
        super().__init__()
        dim = encoder.fc.out_features
        if mlp:
            encoder.fc = moco_v2_head(encoder.fc)
        self.symmetric, self.shuffled = symmetric, shuffled
        self.momentum, self.momentum_end = momentum, momentum if momentum_end is None else momentum_end
        self.encoder_q = encoder
        self.encoder_k = MomentumEncoder(encoder, momentum)
        self.criterion = InfoNCELoss(dim, queue_size, tau, normalize=False, shard=shard_queue)
        self.register_state_dict_post_hook(functools.partial(rename, "criterion.queue", "queue"))
        self.register_load_state_dict_pre_hook(functools.partial(rename, "queue", "criterion.queue"))
        self.pending: list[list[Tensor]] = []  # keys of each micro-batch of the current step, for `after_step`

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        keys, (loss, rank) = self.contrast(batch)
        if torch.is_grad_enabled():
            self.pending.append(keys)
        return loss.mean(), {"top1": (rank == 0).float().mean()}

    def contrast(self, batch: Batch) -> tuple[list[Tensor], InfoNCE]:
        """The keys [B, D] of each direction, and loss and rank of all queries. Changes no state."""
        view1, view2 = batch.views
        pairs = [(view1, view2), (view2, view1)] if self.symmetric else [(view1, view2)]
        keys = [self.keys(view) for _, view in pairs]
        queries = [l2_normalize(self.encoder_q(view)) for view, _ in pairs]
        with record_function("loss"):
            results = [self.criterion.contrast(q, k) for q, k in zip(queries, keys)]
            return keys, InfoNCE(*map(torch.cat, zip(*results)))

    def ranks(self, batch: Batch) -> tuple[Tensor, int]:
        """Number of negative keys that score above each query's positive key [Q], and the number of negative keys."""
        _, (_, rank) = self.contrast(batch)
        return rank, self.criterion.full_queue().shape[0]

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """Keys [B, D] of unit length, by the key encoder."""
        if not self.shuffled:
            return l2_normalize(self.encoder_k(images))
        images, order = shuffle(images)
        return unshuffle(l2_normalize(self.encoder_k(images)), order)

    def before_step(self, progress: float) -> None:
        """The forward pass of MoCo has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """Enqueue the step's keys and update the key encoder. The keys are in the order of the whole batch, however it
        is divided into micro-batches and ranks. The reference updates the key encoder at the start of a step instead:
        the losses are the same, since both encoders start with equal weights."""
        for direction in zip(*self.pending):
            for keys in direction:
                self.criterion.enqueue(keys)
        self.pending = []
        self.encoder_k.update(self.encoder_q, self.momentum_at(progress))

    def momentum_at(self, progress: float) -> float:
        """Momentum coefficient of the key encoder's update at `progress`."""
        return cosine_schedule(self.momentum, self.momentum_end, progress)

    @property
    def encoder(self) -> nn.Module:
        """The query encoder without its head; names of timm or torchvision."""
        return headless(self.encoder_q, "fc")

    def features(self, images: Tensor) -> Tensor:
        """Pooled features of the query encoder [B, F]."""
        return self.encoder(images)


def rename(old: str, new: str, method: nn.Module, state: dict, prefix: str, *_) -> None:
    """A hook of state dicts: the queue `old` and its pointer `old`_ptr get the name `new`."""
    for name in (f"{prefix}{old}", f"{prefix}{old}_ptr"):
        if name in state:
            state[prefix + new + name.removeprefix(prefix + old)] = state.pop(name)
