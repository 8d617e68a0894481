"""How a method is optimised, and how a run goes about it, as plain values read by the trainer."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class Training:
    """Optimizer and schedule: the numbers of a paper. Learning rates are per 256 images and scale with the batch."""

    epochs: int
    """passes over the data"""
    batch_size: int
    """images a step, of all ranks and micro-batches together"""
    optimizer: Literal["adamw", "sgd", "lars"]
    """adamw, sgd or lars"""
    lr: float
    """learning rate for a batch of 256"""
    weight_decay: float
    """decoupled for adamw, as part of the gradient for sgd and lars"""
    decay_all: bool = False
    """decay biases and norms too"""
    momentum: float = 0.9
    """of sgd and lars"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of adamw"""
    warmup_epochs: float = 0
    """epochs over which the learning rate rises from 0"""
    lr_by_epoch: bool = False
    """change the learning rate once an epoch instead of every step"""
    lr_drops: tuple[int, ...] = ()
    """epochs at which the learning rate falls to a tenth, instead of along a cosine"""
    accumulate: int = 1
    """micro-batches that a step's images come in, one after the other: less memory for the same step"""


@dataclass
class Execution:
    """How a run goes about it. Without rounding, precision and clipping, nothing here changes what is learned."""

    precision: str = "fp32"
    """fp32; bf16 or fp16 for autocast, fp16 with loss scaling"""
    shard: bool = False
    """shard parameters, gradients and optimizer over the ranks (FSDP2), for models too large for one device"""
    recompute: bool = False
    """run a transformer's blocks again in the backward pass and keep nothing of them: less memory, more time"""
    compile: bool = False
    """give the method to torch.compile"""
    graph: bool = False
    """capture forward and backward as a CUDA graph, which spares a step its launches; on one GPU"""
    clip_norm: float = 0.0
    """largest norm of the gradient, 0 for no clipping, as in the papers"""
    max_skipped: int = 10
    """steps in a row that may be skipped because the loss or the gradient is not finite"""
    log_every: int = 10
    """steps between lines of metrics"""
    checkpoint_every: int = 0
    """steps between checkpoints, 0 for one an epoch"""
    keep_last: int = 2
    """newest checkpoints that are kept"""
    keep_every: int = 0
    """epochs between checkpoints that are kept for good, 0 for none; they are those that --checkpoint-every meets"""
    profile: int = 0
    """steps to profile: where their time goes, as a table and a trace"""
    tensorboard: bool = True
    """write RUN/tensorboard"""
    wandb: str | None = None
    """project at Weights & Biases that metrics go to as well"""
