"""MoCo v2: a query must find its key among a queue of others, with an MLP head and stronger augmentation.

Chen et al., "Improved Baselines with Momentum Contrastive Learning", 2020, arXiv:2003.04297, on top of He et al.,
"Momentum Contrast for Unsupervised Visual Representation Learning", 2020, arXiv:1911.05722. Names and layouts in the
state dict are those of the official code (queue [D, K] there, [K, D] here).
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.data.recipe import Recipe, View
from fastssl.nn.heads import moco_v2_head
from fastssl.nn.resnet import build_resnet, features_before_fc
from fastssl.nn.twin import MomentumTwin
from fastssl.ops import enqueue_, info_nce
from fastssl.train.recipe import Training


@dataclass
class Config:
    """MoCo v2 as in its paper and code; 200 epochs and batch 256 as in table 1."""

    backbone: str = "resnet50"
    """resnet_mini, resnet18, resnet34, resnet50, resnet101 or resnet152"""
    image_size: tuple[int, int] = (224, 224)
    """height and width in pixels"""
    dim: int = 128
    """width of queries and keys"""
    queue_size: int = 65536
    """negatives"""
    tau: float = 0.2
    """temperature"""
    twin_momentum: float = 0.999
    """of the key encoder"""
    symmetric: bool = False
    """each view is query once and key once"""
    bn_splits: int = 8
    """parts of the batch with batch statistics of their own, for the 8 GPUs of the paper"""
    small_images: bool = False
    """a stem without stride and pooling, for images of 32 pixels"""
    crop_min: float = 0.2
    """smallest share of the image that a crop takes"""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """strengths of brightness, contrast, saturation and hue jitter"""
    blur_p: float = 0.5
    """probability of Gaussian blur"""
    training: Training = field(
        default_factory=lambda: Training(
            epochs=200, batch_size=256, optimizer="sgd", lr=0.03, weight_decay=1e-4, decay_all=True, lr_by_epoch=True
        )
    )

    @classmethod
    def small(cls) -> "Config":
        """For images of at most 64 pixels and minutes on a laptop: not of the paper."""
        training = Training(epochs=14, batch_size=32, optimizer="sgd", lr=1.2, weight_decay=5e-4, decay_all=True)
        return cls("resnet_mini", (32, 32), queue_size=512, twin_momentum=0.99, symmetric=True, bn_splits=1,
                   crop_min=0.25, jitter=(0.4, 0.4, 0.2, 0.5), blur_p=0.0, training=training)  # fmt: skip

    @property
    def recipe(self) -> Recipe:
        view = View(
            self.image_size, crop=(self.crop_min, 1.0), jitter=self.jitter, jitter_p=0.8, grayscale_p=0.2,
            blur_p=self.blur_p, flip_p=0.5,
        )  # fmt: skip
        return Recipe((view, view))


def build(config: Config) -> "MoCo":
    if config.training.batch_size % config.bn_splits:
        raise ValueError(
            f"moco_v2: batch_size must be divisible by bn_splits={config.bn_splits}, got {config.training.batch_size}"
        )
    encoder = build_resnet(config.backbone, config.dim, config.small_images, config.bn_splits)
    momentum, shuffle = config.twin_momentum, config.bn_splits > 1
    return MoCo(encoder, config.queue_size, config.tau, momentum, symmetric=config.symmetric, shuffle=shuffle)


class MoCo(nn.Module):
    """Query encoder, momentum key encoder and queue.

    Args:
        encoder: a network whose last layer is the linear `fc`.
        queue_size: K.
        tau: temperature.
        momentum: of the key encoder.
        mlp: replace `fc` by v2's head; False for v1.
        symmetric: each view is query once and key once; the loss is the mean of both.
        shuffle: shuffle the batch for the key encoder, so that split batch norms see other company than the query's.
    """

    def __init__(
        self,
        encoder: nn.Module,
        queue_size: int = 65536,
        tau: float = 0.2,
        momentum: float = 0.999,
        mlp: bool = True,
        symmetric: bool = False,
        shuffle: bool = False,
    ):
        super().__init__()
        if not tau > 0:
            raise ValueError(f"MoCo: tau must be > 0, got {tau}")
        if queue_size < 1:
            raise ValueError(f"MoCo: queue_size must be at least 1, got {queue_size}")
        dim = encoder.fc.out_features
        if mlp:
            encoder.fc = moco_v2_head(encoder.fc)
        self.tau, self.symmetric, self.shuffle = tau, symmetric, shuffle
        self.encoder_q = encoder
        self.encoder_k = MomentumTwin(encoder, momentum)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self._register_state_dict_hook(_queue_to_official)
        self.register_load_state_dict_pre_hook(_queue_from_official)
        self._keys: Tensor | None = None  # of the step under way; they enter the queue after it

    def forward(self, batch) -> tuple[Tensor, dict[str, Tensor]]:
        one, two = batch.views
        pairs = [(one, two), (two, one)] if self.symmetric else [(one, two)]
        keys = [self.keys(view) for _, view in pairs]
        results = [info_nce(_unit(self.encoder_q(view)), k, self.queue, self.tau) for (view, _), k in zip(pairs, keys)]
        self._keys = torch.cat(keys)
        loss, rank = (torch.cat(both) for both in zip(*results))
        return loss.mean(), {"top1": (rank == 0).float().mean()}

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """[B, D] of unit length, by the key encoder."""
        if not self.shuffle:
            return _unit(self.encoder_k(images))
        order = torch.randperm(images.shape[0], device=images.device)
        return _unit(self.encoder_k(images[order]))[order.argsort()]

    def after_step(self, progress: float) -> None:
        """The reference updates the key encoder at the start of a step and enqueues at its end: with both here the
        losses are the same, since its two encoders start equal."""
        enqueue_(self.queue, self.queue_ptr, self._keys)
        self._keys = None
        self.encoder_k.update(self.encoder_q)

    def features(self, images: Tensor) -> Tensor:
        """What the query encoder hands to its head, [B, features]."""
        return features_before_fc(self.encoder_q, images)


def _unit(x: Tensor) -> Tensor:
    """Rows of unit length, in float32 or wider also where autocast made x."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def _queue_to_official(moco: MoCo, state: dict, prefix: str, metadata: dict) -> None:
    state[f"{prefix}queue"] = state[f"{prefix}queue"].T.contiguous()


def _queue_from_official(moco: MoCo, state: dict, prefix: str, *_) -> None:
    if f"{prefix}queue" in state:
        state[f"{prefix}queue"] = state[f"{prefix}queue"].T.contiguous()
