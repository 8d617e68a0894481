"""Optimisation and execution of a run as plain values, read by the trainer."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fastssl.bounds import AT_LEAST_1, BELOW_1, COEFFICIENT, NOT_NEGATIVE, POSITIVE, check_ranges
from fastssl.milestones import MILESTONE, check_milestones


@dataclass
class Training:
    """Optimizer and schedules: the numbers of a paper. Learning rates are per 256 images and scale with the batch."""

    epochs: Annotated[int, AT_LEAST_1]
    """passes over the data"""
    batch_size: Annotated[int, AT_LEAST_1]
    """images per step, over all ranks and micro-batches"""
    optimizer: Literal["adamw", "sgd", "lars", "lars_simclr", "larc"]
    """adamw, sgd, or one of the three forms of LARS: lars (most papers), lars_simclr, larc (SwAV)"""
    lr: Annotated[float, NOT_NEGATIVE]
    """peak learning rate for a batch of 256 images"""
    weight_decay: Annotated[float, NOT_NEGATIVE]
    """weight decay λ: decoupled for adamw, part of the gradient for the others"""
    weight_decay_end: Annotated[float | None, NOT_NEGATIVE] = None
    """weight decay at the end of training, reached along a cosine; constant if not given"""
    decay_all: bool = False
    """apply weight decay, and the trust ratio of LARS, to biases and normalisation layers too"""
    momentum: Annotated[float, COEFFICIENT] = 0.9
    """momentum coefficient of SGD and LARS"""
    betas: Annotated[tuple[float, float], BELOW_1] = (0.9, 0.999)
    """decay rates β1 and β2 of AdamW's moment estimates"""
    eps: Annotated[float, POSITIVE] = 1e-8
    """number that AdamW adds to the root of its second moment"""
    warmup_epochs: Annotated[float, NOT_NEGATIVE, MILESTONE] = 0
    """epochs of linear learning-rate warm-up"""
    warmup_lr: Annotated[float, NOT_NEGATIVE] = 0.0
    """learning rate at the start of the warm-up, for a batch of 256 images"""
    warmup_includes_peak: bool = False
    """reach the peak learning rate in the last step of the warm-up (SwAV, DINO), not in the step after it"""
    warmup_stair: Annotated[int, NOT_NEGATIVE] = 0
    """steps of a stair, of which 20 lead from --warmup-lr to the peak in the first epoch, instead of --warmup-epochs;
    from the second epoch on the learning rate follows the cosine once per epoch (ALBEF); 0 for none"""
    lr_end: Annotated[float, NOT_NEGATIVE] = 0.0
    """learning rate at the end of the cosine schedule, for a batch of 256 images"""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """how learning rates grow with the batch: linear (by batch / 256) or sqrt (by its root)"""
    lr_by_epoch: bool = False
    """change the learning rate once per epoch instead of every step"""
    lr_drops: Annotated[tuple[float, ...], NOT_NEGATIVE, MILESTONE] = ()
    """epochs at which the learning rate is divided by 10, instead of a cosine schedule"""
    clip_parameter_norm: Annotated[float, NOT_NEGATIVE] = 0.0
    """largest gradient norm of each single parameter, in dinov2 of backbone and heads; 0 for no clipping (clip_grad)"""
    freeze: tuple[str, ...] = ()
    """names of parameters or modules that keep their initial weights during the first --freeze-epochs"""
    freeze_epochs: Annotated[float, NOT_NEGATIVE, MILESTONE] = 0
    """epochs during which the parameters of --freeze are not updated (freeze_last_layer of DINO)"""
    accumulate: Annotated[int, AT_LEAST_1] = 1
    """micro-batches per step, whose gradients are accumulated: less memory for the same step"""

    def check(self, owner: str = "train") -> None:
        """Check every number, and those that depend on each other.

        Args:
            owner: command or class that the error names.

        Raises:
            ValueError: a value is out of range, a milestone (warm-up, learning-rate drop, end of freezing) lies at or
                after the last epoch, or --freeze-epochs is given without --freeze, --lr-end with --lr-drops, or
                --warmup-stair with another schedule.
        """
        check_ranges(self, owner)
        check_milestones(self, owner)
        if self.lr_end and self.lr_drops:
            raise ValueError(
                f"{owner}: --lr-end must be 0 with --lr-drops, got {self.lr_end:g}: it ends a cosine schedule"
            )
        if self.warmup_stair and (self.warmup_epochs or self.lr_drops):
            other = "--warmup-epochs" if self.warmup_epochs else "--lr-drops"
            raise ValueError(f"{owner}: --warmup-stair must be 0 with {other}, got {self.warmup_stair}: choose one")
        if self.freeze_epochs and not self.freeze:
            raise ValueError(
                f"{owner}: --freeze-epochs must be 0 without --freeze, got {self.freeze_epochs:g}: name parameters or "
                f"modules by --freeze"
            )


def check_images_at_once(training: Training, least: int, owner: str, reason: str) -> None:
    """Check how many images a method gets at once, over all ranks: ``batch_size / accumulate``.

    Args:
        training: batch size and number of micro-batches.
        least: smallest number of images with which the method can learn.
        owner: method that the error names.
        reason: why there must be so many; a clause.

    Raises:
        ValueError: there are fewer.
    """
    images = training.batch_size // training.accumulate
    if images < least:
        parts = f" in {training.accumulate} micro-batches (--accumulate)" if training.accumulate > 1 else ""
        raise ValueError(
            f"{owner}: --batch-size must give at least {least} images at once, since {reason}, got "
            f"{training.batch_size}{parts}"
        )


def check_batch_norm_parts(training: Training, bn_splits: int, ranks: int, owner: str) -> int:
    """The parts into which a rank splits a micro-batch for its batch norms, after a check of the batch size.

    Args:
        training: batch size and number of micro-batches.
        bn_splits: parts of the whole batch, at least one for each rank.
        ranks: number of ranks.
        owner: method that the error names.

    Raises:
        ValueError: the batch does not divide into parts of two images or more.
    """
    check_images_at_once(training, 2 * ranks, owner, "batch norms need two images on each rank")
    batch, parts = training.batch_size, ranks * training.accumulate
    splits = max(1, bn_splits // parts)
    if bn_splits < 1 or batch % (splits * parts):
        divisor = max(bn_splits, parts)
        raise ValueError(f"{owner}: batch_size must be divisible by bn_splits={divisor}, got {batch}")
    if splits > 1 and batch < 2 * splits * parts:
        raise ValueError(f"{owner}: batch_size must be at least twice bn_splits={bn_splits}, got {batch}")
    return splits


@dataclass
class Execution:
    """How a run is executed. Of these options only precision and clip_norm change the result by more than rounding."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32, or bf16 or fp16 for autocast; fp16 with loss scaling"""
    shard: bool = False
    """shard parameters, gradients and optimizer state over the ranks (FSDP2), for models too large for one device"""
    recompute: bool = False
    """recompute the activations of transformer blocks in the backward pass: less memory, more time"""
    compile: bool = False
    """compile the method with torch.compile"""
    graph: bool = False
    """capture forward and backward as a CUDA graph, which avoids kernel-launch overhead; on GPUs, without --shard"""
    clip_norm: Annotated[float, NOT_NEGATIVE] = 0.0
    """largest norm of the whole gradient, 0 for no clipping"""
    max_skipped: Annotated[int, NOT_NEGATIVE] = 10
    """largest number of consecutive steps skipped because the loss or the gradient is not finite"""
    log_every: Annotated[int, AT_LEAST_1] = 10
    """steps between lines of metrics.jsonl"""
    checkpoint_every: Annotated[int, NOT_NEGATIVE] = 0
    """steps between checkpoints, 0 for one per epoch"""
    keep_last: Annotated[int, AT_LEAST_1] = 2
    """number of newest checkpoints to keep"""
    keep_every: Annotated[int, NOT_NEGATIVE] = 0
    """epochs between checkpoints that are never deleted, 0 for none; they must fall on a step of --checkpoint-every"""
    profile: Annotated[int, NOT_NEGATIVE] = 0
    """number of steps to profile; writes a table and a trace"""
    tensorboard: bool = True
    """write TensorBoard event files to RUN/tensorboard"""
    wandb: str | None = None
    """Weights & Biases project to log metrics to"""
