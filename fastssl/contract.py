"""What a data loader hands to a method, and what a trainer, an evaluation and a report ask of one.

A method is a module of `fastssl.methods`, or any other module with the same names:

    Config                     a dataclass whose defaults are the paper's numbers: ``Config.paper(backbone)``,
                               ``Config.small()``, ``config.augmentation`` (data), ``config.training`` (trainer)
    build(config)              the method with fresh weights: an `nn.Module` that is a `Method`
    linear_probe(backbone)     the paper's own linear evaluation, an `eval.protocols.Official`
    OFFICIAL                   name of the reference checkpoint's layout, a format of `fastssl export`
    parameter_groups(method)   groups for the optimizer, where the paper treats some parameters differently

The last three are optional: what needs one that a method lacks raises.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn


class Batch(NamedTuple):
    """One training batch, on the device of the method."""

    views: tuple[Tensor, ...]  # augmented views of the images, each [B, 3, H, W] float32, normalised; sizes may differ
    index: Tensor  # [B] int64, number of the image in its source
    label: Tensor  # [B] int64, −1 where there is none; for evaluation, never for the loss
    seed: Tensor | None = None  # [B] int64, of (run, epoch, image): what is drawn from it is the same on any rank
    extras: dict[str, Tensor] = {}  # noqa: RUF012 - what the source gives beside the image, each [B, …]: token ids


@runtime_checkable
class Method(Protocol):
    """A self-supervised method: an `nn.Module` whose `forward` reads state and whose hooks write it.

    One step is ``before_step``, ``forward`` and backward for each micro-batch, the optimizer's step, ``after_step``.
    Progress is the share of the run's steps that are done, 0 … 1.
    """

    @property
    def encoder(self) -> nn.Module:
        """What evaluation, fine-tuning and export take: images [B, 3, H, W] → features [B, F].

        It shares its parameters with the method, and its state dict has the names of timm or torchvision.
        """
        ...

    def before_step(self, progress: float) -> None:
        """Writes scheduled values (a temperature, a momentum) into buffers, where a captured CUDA graph reads them."""
        ...

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and metrics to log, scalars without gradient. Changes no state."""
        ...

    def after_step(self, progress: float) -> None:
        """Updates state after the optimizer's step: momentum encoder, queue, centre."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Features [B, F] of normalised images [B, 3, H, W], as evaluation uses them."""
        ...


@runtime_checkable
class Reconstructs(Protocol):
    """A method that predicts removed patches."""

    def reconstruct(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predictions of all patches [B, L, P] and the mask [B, L]: 0 kept, 1 removed."""
        ...


@runtime_checkable
class RanksNegatives(Protocol):
    """A method that contrasts a query with one positive and many negatives."""

    def ranks(self, batch: Batch) -> tuple[Tensor, int]:
        """How many negatives score above each query's positive [Q], and the number of negatives. Changes no state."""
        ...


@runtime_checkable
class SchedulesMomentum(Protocol):
    """A method whose momentum encoder follows a schedule."""

    def momentum_at(self, progress: float) -> float:
        """Momentum of the momentum encoder's update."""
        ...
