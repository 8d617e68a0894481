"""The learning rate as a function of the epoch, which may be a fraction."""

import math

from .config import Training


def learning_rate(training: Training, epoch: float) -> float:
    """Linear warm-up from 0, then half a cosine to 0, or a tenth at each of ``lr_drops``, for the batch size of
    `training`.

    Source: He et al., 2021 (MAE), appendix A.1, table 8; with ``lr_by_epoch`` MoCo v2's, which steps once an epoch;
        with ``lr_drops`` He et al., 2020 (MoCo), section 4.
    """
    peak = training.lr * training.batch_size / 256
    epoch = math.floor(epoch) if training.lr_by_epoch else epoch
    if epoch < training.warmup_epochs:
        return peak * epoch / training.warmup_epochs
    if training.lr_drops:
        return peak * 0.1 ** sum(epoch >= drop for drop in training.lr_drops)
    done = (epoch - training.warmup_epochs) / (training.epochs - training.warmup_epochs)
    return peak * 0.5 * (1 + math.cos(math.pi * done))
