"""Ops of self-supervised learning: each has a contract (its docstring), a plain-torch body, a gradient, and kernels.

Letters of shapes in all docstrings: **B** batch · **L** tokens · **M** kept tokens, or keys of all ranks · **D** width
· **K** queue length · **H E** heads and head width · **P** values of a patch, or prototypes · **N** features that are
compared with prototypes. Where a function has tensors of several shapes, the name of a local variable ends in the
letters of its shape: ``logits_BK``.
"""

from . import dispatch, products
from .attention import attention, attention_packed
from .augment import ColourLaw, augment_
from .bank import SampledNCE, sampled_info_nce, sampled_nce, update_bank_
from .batchnorm import Running, batch_norm
from .block_masks import block_mask
from .contrastive import InfoNCE, batch_info_nce, info_nce, nt_xent
from .correspondence import dense_match
from .crops import resized_crops_
from .dense import linear
from .ema import ema_update_
from .gelu import bias_gelu
from .masking import Masking, keep_tokens, random_masking, restore_tokens
from .norm import residual_norm
from .pairwise import pairwise_sigmoid
from .patches import keep_patches, masked_patch_mse, patchify, unpatchify
from .pixels import normalise
from .prototypes import PrototypeTargets, linear_cross_entropy, prototype_lse, soft_cross_entropy
from .queue import enqueue_
from .scores import sampled_scores

dispatch.load_native()
products.choose_library()
