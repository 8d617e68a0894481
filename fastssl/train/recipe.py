"""How a method is optimised, as plain values: the numbers of its paper, read by the trainer."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class Training:
    """Optimizer and schedule. Learning rates are per 256 images and scale linearly with the batch."""

    epochs: int
    """passes over the data"""
    batch_size: int
    """images a step"""
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
