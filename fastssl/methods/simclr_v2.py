"""SimCLR v2: SimCLR with a deeper projector, less training and stronger weight decay.

Chen et al., "Big Self-Supervised Models are Strong Semi-Supervised Learners", 2020, arXiv:2006.10029.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastssl.bounds import AT_LEAST_1
from fastssl.train.config import Training

from . import simclr_v1


@dataclass
class Config(simclr_v1.Config):
    """SimCLR v2's pretraining as in its paper (section 2) and the command of its code: 800 epochs of batch 4096."""

    layers: Annotated[int, AT_LEAST_1] = 3
    """number of linear layers of the projector: 2 in SimCLR, 3 in its second version"""
    colour_law: Literal["simclr_v1", "simclr_v2", "torchvision"] = "simclr_v2"
    """formulas of jitter, grayscale and blur: those of the official code, or torchvision's"""
    training: Training = field(
        default_factory=lambda: Training(
            800, 4096, "lars_simclr", lr=1.2, weight_decay=1e-4, warmup_epochs=10, lr_scaling="sqrt"
        )
    )


linear_probe, build = simclr_v1.linear_probe, simclr_v1.build
