"""Trainers of small methods, for tests of single steps."""

import dataclasses

from torch import nn

from fastssl.train.config import Execution, Training
from fastssl.train.trainer import Trainer


def constant_rate_trainer(method: nn.Module, training: Training, lr: float, steps: int = 10, **execution) -> Trainer:
    """A trainer of `steps` steps at the learning rate `lr`.

    It is the peak throughout the first epoch of a run that changes the learning rate once per epoch.
    """
    lr = lr * 256 / training.batch_size
    training = dataclasses.replace(training, epochs=1, lr=lr, warmup_epochs=0, lr_by_epoch=True, lr_drops=())
    return Trainer(method, training, Execution(**execution), steps)
