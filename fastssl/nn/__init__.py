"""Drop-in modules for your own models and training loops. docs/drop-in.md lists what each of them replaces."""

from .attention import Attention
from .decoupled import DCLLoss, DCLWLoss
from .losses import InfoNCELoss, NTXentLoss, l2_normalize
from .masking import MaskedPatchLoss, random_masking, seeded_noise
from .momentum import MomentumEncoder
from .noncontrastive import BarlowTwinsLoss, NegativeCosineSimilarity, VICRegLoss
from .queue import KeyQueue
from .swap import accelerate
from .vit import ViT
