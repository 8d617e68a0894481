"""Learning rate and momentum as functions of the epoch, which may be a fraction."""

import math

from .recipe import Training


def learning_rate(training: Training, epoch: float) -> float:
    """Linear warm-up from 0, then half a cosine to 0, for the batch size of `training`.

    Source: He et al., 2021 (MAE), appendix A.1, table 8; with ``lr_by_epoch`` MoCo v2's, which steps once an epoch.
    """
    peak = training.lr * training.batch_size / 256
    epoch = math.floor(epoch) if training.lr_by_epoch else epoch
    if epoch < training.warmup_epochs:
        return peak * epoch / training.warmup_epochs
    done = (epoch - training.warmup_epochs) / (training.epochs - training.warmup_epochs)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def cosine_momentum(start: float, progress: float) -> float:
    """Momentum that rises from `start` to 1 over the run; progress in [0, 1].

    Source: Chen et al., 2021 (MoCo v3), section 4.1, "Momentum encoder"; Grill et al., 2020 (BYOL).
    """
    return 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - start)
