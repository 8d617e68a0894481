"""The contract between data loaders, methods, and the code that uses methods: trainer, evaluation, report.

A method is a module of `fastssl.methods`, or any other importable module that defines:

    Config                     dataclass whose defaults are the paper's numbers, with ``Config.paper(backbone)``,
                               ``Config.small()`` (preset for images of at most 64 pixels), ``config.augmentation``
                               (a `data.augmentation.Augmentation`) and ``config.training`` (a `train.config.Training`).
                               Evaluations normalise images as the first view, or by ``config.normalisation``
                               ({"mean", "std"}) where there is one.
                               Its fields are the flags of `fastssl pretrain`, their docstrings the help texts; numbers
                               declare their range (`fastssl.bounds`). A field `images` that is None becomes the number
                               of training images when a run starts (memory banks)
    build(config)              the method with initial weights: an `nn.Module` that fulfils `Method`

and optionally

    linear_probe(backbone)     the paper's linear evaluation, an `eval.protocols.Official`
    finetuning(backbone)       the paper's fine-tuning, an `eval.protocols.Finetune`; MAE's or SwAV's by default
    OFFICIAL                   layout of the reference checkpoint, a format of `fastssl export`
    parameter_groups(method)   groups for the optimizer, where the paper treats some parameters differently: dicts of
                               "params" and optional factors "lr_scale" and "weight_decay_scale", "constant_lr" and
                               others (`train.optim.build_optimizer`)

A command that needs an optional name which the module does not define raises an error.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """One training batch, on the device of the method."""

    views: tuple[Tensor, ...]  # augmented views of the images, each [B, 3, H, W] float32, normalised; sizes may differ
    index: Tensor  # type: ignore[assignment]  # [B] int64, number of the image in its source
    label: Tensor  # [B] int64, −1 for no label; for evaluation, never for the loss
    seed: Tensor | None = None  # [B] int64, function of (run, epoch, image): draws from it are the same on any rank
    extras: dict[str, Tensor] = {}  # noqa: RUF012 - further data of the source, each [B, …]: token ids, a depth map

    def seeds(self) -> Tensor:
        """A seed for each image, [B] int64: `seed`, or numbers drawn by torch's generator where the batch has none."""
        if self.seed is not None:
            return self.seed
        return torch.randint(2**62, self.views[0].shape[:1], device=self.views[0].device)


@runtime_checkable
class Method(Protocol):
    """A self-supervised method: an `nn.Module` whose `forward` reads state and whose hooks write it.

    One step is ``before_step``, then ``forward`` and backward of each micro-batch, the optimizer's step, and
    ``after_step``. Progress is the share of the run's steps that are done, from 0 to 1. With a CUDA graph the hooks run
    outside of it, at every step.
    """

    @property
    def encoder(self) -> nn.Module:
        """Module for evaluation, fine-tuning and export: images [B, 3, H, W] → features [B, F].

        It shares its parameters with the method, and its state dict has the names of timm or torchvision.
        """
        ...

    def before_step(self, progress: float) -> None:
        """Write scheduled values (a temperature, a momentum) into buffers, which a captured CUDA graph reads."""
        ...

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and metrics to log, scalars without gradient. Changes no state, see `DefersUpdates`."""
        ...

    def after_step(self, progress: float) -> None:
        """Update state after the optimizer's step: momentum encoder, queue, centre."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Features [B, F] of normalised images [B, 3, H, W], for evaluation."""
        ...


@runtime_checkable
class DefersUpdates(Protocol):
    """A method whose `after_step` updates state from tensors of `forward`: keys for a queue, outputs for a centre.

    `forward` must keep such tensors in no other attribute: when a CUDA graph is replayed its Python code does not run.
    """

    pending: list[Any]  # `forward` appends one entry per micro-batch; `after_step` reads all and clears the list


class TrainingImages(NamedTuple):
    """The training images of a rank, for a method that `PreparesEpochs`. All ranks must start a pass together."""

    count: int  # type: ignore[assignment]  # images of the source
    batches: int  # batches of an epoch on this rank
    augmented: Callable[[], Iterator[Batch]]  # the batches that the coming epoch will train with
    plain: Callable[[], Iterator[Batch]]  # this rank's share of all images in the source's order, one centre crop each


@runtime_checkable
class ReadsWeights(Protocol):
    """A method that computes with weights of another run or file, which are not in its state dict: a tokenizer's."""

    def checksums(self) -> dict[str, str]:
        """A checksum of the weights that each field of the config names; a resumed run must find the same."""
        ...


@runtime_checkable
class PreparesEpochs(Protocol):
    """A method that needs the training images between epochs, for instance to cluster them.

    What `before_epoch` computes must be in the state dict: a run that resumes within an epoch does not call it again.
    Tensors that `forward` reads must keep their places in memory where they keep their shapes, for CUDA graphs.
    """

    def check_images(self, count: int, in_epoch: int) -> None:
        """Refuse too few training images before a run starts.

        Args:
            count: images of the source.
            in_epoch: images in the whole batches of an epoch.

        Raises:
            ValueError: there are too few.
        """
        ...

    def before_epoch(self, images: TrainingImages) -> None:
        """Prepare the next epoch, before its first step. Called in training mode; it must end each pass it starts."""
        ...


@runtime_checkable
class Reconstructs(Protocol):
    """A method that predicts masked patches."""

    def reconstruct(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predictions of all patches [B, L, P] and the mask [B, L]: 0 kept, 1 removed."""
        ...


@runtime_checkable
class Autoencodes(Protocol):
    """A method that makes codes of images, and images of codes."""

    def autoencode(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] as their codes show them, normalised alike."""
        ...


@runtime_checkable
class RanksNegatives(Protocol):
    """A method that contrasts a query with one positive key and many negative keys."""

    def ranks(self, batch: Batch) -> tuple[Tensor, int]:
        """Number of negative keys that score above each query's positive key [Q], and the number of negative keys.

        Changes no state.
        """
        ...


@runtime_checkable
class SchedulesMomentum(Protocol):
    """A method with a momentum encoder, whose momentum coefficient may follow a schedule."""

    def momentum_at(self, progress: float) -> float:
        """Momentum coefficient of the momentum encoder's update at `progress`."""
        ...


@runtime_checkable
class EmbedsText(Protocol):
    """A method of images and text, with one space for both: a caption lies near the images that it describes."""

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D] of normalised images [B, 3, H, W]."""
        ...

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Unit vectors [B, D] of texts [B, L] int64: token ids of the method's tokenizer (`config.text`), padded."""
        ...


@runtime_checkable
class MatchesText(Protocol):
    """A method of images and text that also judges a pair by both together, to rank the best pairs again."""

    def match(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Scores [B] of pairs of normalised images [B, 3, H, W] and texts [B, L]; the greater, the better they match.

        One image [1, 3, H, W] pairs with all B texts, and need be encoded only once. Scores are logarithms of odds: a
        pair that matches as likely as not scores 0.
        """
        ...


@runtime_checkable
class Completes(Protocol):
    """A method that draws the rest of images."""

    def complete(self, images: Tensor, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """Normalised images [N, 3, H, W] whose upper ⌊H / 2⌋ lines are those of `images`, with what the method keeps
        of their colours, and whose other lines are drawn.

        Args:
            images: [N, 3, H, W] normalised.
            temperature: above 0; smaller values draw what is likely.
            seed: another seed draws other lines; an image's lines depend on it and on the image's place in `images`.
        """
        ...
