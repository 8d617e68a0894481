"""Modules to drop into other people's models. README.md has a table: you have … → write …"""

from .attention import Attention
from .losses import InfoNCELoss, NTXentLoss, unit
from .masking import MaskedPatchLoss, random_masking, seeded_noise
from .momentum import MomentumEncoder
from .queue import KeyQueue
from .swap import accelerate
from .vit import ViT
