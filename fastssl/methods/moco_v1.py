"""MoCo: a query must find its key among a queue of others, made by a slowly moving encoder.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020, arXiv:1911.05722. Names and
layouts in the state dict are those of the official code (queue [D, K] there, [K, D] here).
"""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View
from fastssl.distributed import shuffle, unshuffle, world_size
from fastssl.eval.protocols import Official
from fastssl.nn.heads import moco_v2_head
from fastssl.nn.losses import InfoNCELoss, l2_normalize
from fastssl.nn.momentum import MomentumEncoder
from fastssl.nn.resnet import build_resnet
from fastssl.nn.sharing import headless
from fastssl.ops import InfoNCE
from fastssl.train.config import Training

OFFICIAL = "moco"  # layout of the reference checkpoint


@dataclass
class Config:
    """MoCo as in its paper (sections 3.3 and 4, "Technical details") and code: 200 epochs, batch 256."""

    backbone: str = "resnet50"
    """resnet_mini, resnet18, resnet34, resnet50, resnet101 or resnet152"""
    image_size: tuple[int, int] = (224, 224)
    """height and width in pixels"""
    dim: int = 128
    """width of queries and keys"""
    queue_size: int = 65536
    """negatives"""
    tau: float = 0.07
    """temperature"""
    ema_momentum: float = 0.999
    """of the key encoder"""
    symmetric: bool = False
    """each view is query once and key once"""
    bn_splits: int = 8
    """parts of the whole batch with batch statistics of their own, for the 8 GPUs of the paper; at least one a rank"""
    shard_queue: bool = False
    """each rank keeps its share of the queue, instead of a copy of it"""
    small_images: bool = False
    """a stem without stride and pooling, for images of 32 pixels"""
    crop_min: float = 0.2
    """smallest share of the image that a crop takes"""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.4)
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
        return cls(backbone)  # one recipe for all ResNets

    @classmethod
    def small(cls) -> "Config":
        """For images of at most 64 pixels and minutes on a laptop: not of the paper."""
        training = Training(epochs=14, batch_size=32, optimizer="sgd", lr=1.2, weight_decay=5e-4, decay_all=True)
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
    batch, parts = config.training.batch_size, world_size() * config.training.accumulate
    splits = max(1, config.bn_splits // parts)
    if config.bn_splits < 1 or batch % (splits * parts):
        raise ValueError(f"moco: batch_size must be divisible by bn_splits={max(config.bn_splits, parts)}, got {batch}")
    if splits > 1 and batch < 2 * splits * parts:
        raise ValueError(f"moco: batch_size must be at least twice bn_splits={config.bn_splits}, got {batch}")
    encoder = build_resnet(config.backbone, config.dim, config.small_images, splits)
    momentum, shuffled = config.ema_momentum, max(config.bn_splits, world_size()) > 1
    return MoCo(encoder, config.queue_size, config.tau, momentum, mlp, config.symmetric, shuffled, config.shard_queue)


class MoCo(nn.Module):
    """Query encoder, momentum key encoder and queue.

    Args:
        encoder: a network whose last layer is the linear `fc`.
        queue_size: K.
        tau: temperature.
        momentum: of the key encoder.
        mlp: replace `fc` by v2's head; False for v1.
        symmetric: each view is query once and key once; the loss is the mean of both.
        shuffled: shuffle the batch over all ranks for the key encoder, so that batch norms of a rank, or split ones,
            see other company than the query's.
        shard_queue: each rank keeps its share of the queue (see `KeyQueue`: state dicts are then made together).
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
    ):
        super().__init__()
        dim = encoder.fc.out_features
        if mlp:
            encoder.fc = moco_v2_head(encoder.fc)
        self.symmetric, self.shuffled = symmetric, shuffled
        self.encoder_q = encoder
        self.encoder_k = MomentumEncoder(encoder, momentum)
        self.criterion = InfoNCELoss(dim, queue_size, tau, normalize=False, shard=shard_queue)
        self.register_state_dict_post_hook(functools.partial(_rename, "criterion.queue", "queue"))
        self.register_load_state_dict_pre_hook(functools.partial(_rename, "queue", "criterion.queue"))
        self._keys: list[list[Tensor]] = []  # of each micro-batch of the step under way; they enter the queue after it

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        keys, (loss, rank) = self.contrast(batch)
        if torch.is_grad_enabled():
            self._keys.append(keys)
        return loss.mean(), {"top1": (rank == 0).float().mean()}

    def contrast(self, batch: Batch) -> tuple[list[Tensor], InfoNCE]:
        """(the keys [B, D] of each direction, loss and rank of all queries); changes nothing."""
        one, two = batch.views
        pairs = [(one, two), (two, one)] if self.symmetric else [(one, two)]
        keys = [self.keys(view) for _, view in pairs]
        queries = [l2_normalize(self.encoder_q(view)) for view, _ in pairs]
        with record_function("loss"):
            results = [self.criterion.contrast(q, k) for q, k in zip(queries, keys)]
            return keys, InfoNCE(*map(torch.cat, zip(*results)))

    def ranks(self, batch: Batch) -> tuple[Tensor, int]:
        """(how many negatives score above each query's key [Q], negatives); for reports, changes nothing."""
        _, (_, rank) = self.contrast(batch)
        return rank, self.criterion.full_queue().shape[0]

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """[B, D] of unit length, by the key encoder."""
        if not self.shuffled:
            return l2_normalize(self.encoder_k(images))
        images, order = shuffle(images)
        return unshuffle(l2_normalize(self.encoder_k(images)), order)

    def before_step(self, progress: float) -> None:
        """MoCo schedules nothing."""

    def after_step(self, progress: float) -> None:
        """The reference updates the key encoder at the start of a step and enqueues at its end: with both here the
        losses are the same, since its two encoders start equal. Keys enter in the order of the whole batch, however it
        was cut into micro-batches and ranks."""
        for direction in zip(*self._keys):
            for keys in direction:
                self.criterion.enqueue(keys)
        self._keys = []
        self.encoder_k.update(self.encoder_q)

    @property
    def encoder(self) -> nn.Module:
        """The query encoder without its head, in torchvision's names."""
        return headless(self.encoder_q, "fc")

    def features(self, images: Tensor) -> Tensor:
        """Pooled features of the query encoder [B, F]."""
        return self.encoder(images)


def _rename(old: str, new: str, moco: MoCo, state: dict, prefix: str, *_) -> None:
    for name in (f"{prefix}{old}", f"{prefix}{old}_ptr"):
        if name in state:
            state[prefix + new + name.removeprefix(prefix + old)] = state.pop(name)
