"""Drop-in modules for your own models and training loops. docs/drop-in.md lists what each of them replaces."""

from .attention import Attention
from .bank import BankNCE, MemoryBank, draw_rows
from .decoupled import DCLLoss, DCLWLoss
from .heads import DINOHead, FactoredLogits
from .image_text_losses import CLIPLoss, SigLIPLoss
from .koleo import KoLeoLoss
from .losses import InfoNCELoss, NTXentLoss, l2_normalize
from .masking import MaskedPatchLoss, random_masking, seeded_noise
from .momentum import MomentumEncoder
from .noncontrastive import BarlowTwinsLoss, NegativeCosineSimilarity, VICRegLoss
from .prototype_losses import DINOLoss, IBOTPatchLoss, cross_entropy
from .queue import KeyQueue
from .sinkhorn import SinkhornKnopp, sinkhorn_potentials
from .swap import accelerate
from .swav_loss import SwaVLoss
from .vit import ViT
