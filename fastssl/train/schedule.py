"""Schedules: learning rate, weight decay and other values as functions of the training progress."""

import math

from .config import Training

STAIRS = 20  # of ALBEF's warm-up


def cosine_schedule(start: float, end: float, progress: float) -> float:
    """Value on half a cosine from `start` to `end`; progress from 0 to 1.

    Equals ``end + (start − end) · (1 + cos(π · progress)) / 2``.

    Source: Loshchilov and Hutter, 2017 (SGDR), equation 5; for the momentum of a momentum encoder Grill et al., 2020
        (BYOL), section 3.2, and Chen et al., 2021 (MoCo v3), section 4.1; for weight decay Caron et al., 2021 (DINO),
        section 3.2.
    """
    return end - 0.5 * (1 + math.cos(math.pi * progress)) * (end - start)


def peak_learning_rate(training: Training, lr: float | None = None) -> float:
    """A learning rate per 256 images, by default the peak, for the batch size of `training`.

    Source: Goyal et al., 2017, section 2.1 (linear); Chen et al., 2020 (SimCLR), appendix B.1 (square root).
    """
    ratio = training.batch_size / 256
    return (training.lr if lr is None else lr) * (math.sqrt(ratio) if training.lr_scaling == "sqrt" else ratio)


def learning_rate(training: Training, epoch: float, steps_per_epoch: float = math.inf) -> float:
    """Learning rate for the batch size of `training`, after `epoch` epochs, which may be a fraction.

    Linear warm-up from ``warmup_lr``, then half a cosine to ``lr_end``, or a division by 10 at each of ``lr_drops``.
    `steps_per_epoch` tells which step is the last of a warm-up that includes the peak.

    Source: He et al., 2021 (MAE), appendix A.1, table 8; with ``lr_by_epoch`` the code of MoCo v2, which changes the
        learning rate once per epoch; with ``lr_drops`` He et al., 2020 (MoCo), section 4; with ``warmup_stair`` the
        code of ALBEF.
    """
    peak, end = peak_learning_rate(training), peak_learning_rate(training, training.lr_end)
    if training.warmup_stair:
        if epoch >= 1:
            return cosine_schedule(peak, end, math.floor(epoch) / training.epochs)
        start = peak_learning_rate(training, training.warmup_lr)
        done = epoch * steps_per_epoch - 1 + 1e-6 if epoch else 0.0  # the code sets the rate after a step
        stair = math.floor(min(max(done, 0.0) / training.warmup_stair, STAIRS))
        return start + (peak - start) * stair / STAIRS
    epoch = math.floor(epoch) if training.lr_by_epoch else epoch
    if epoch < training.warmup_epochs:
        start = peak_learning_rate(training, training.warmup_lr)
        last = training.warmup_epochs - (1 / steps_per_epoch if training.warmup_includes_peak else 0)
        return start + (peak - start) * min(epoch / last, 1) if last > 0 else peak
    if training.lr_drops:
        return peak * 0.1 ** sum(epoch >= drop for drop in training.lr_drops)
    return cosine_schedule(peak, end, (epoch - training.warmup_epochs) / (training.epochs - training.warmup_epochs))


def weight_decay(training: Training, progress: float) -> float:
    """Weight decay at `progress`, the share of the run's steps that are done.

    Source: Caron et al., 2021 (DINO), section 3.2: a cosine from 0.04 to 0.4.
    """
    if training.weight_decay_end is None:
        return training.weight_decay
    return cosine_schedule(training.weight_decay, training.weight_decay_end, progress)
