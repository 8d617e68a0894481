"""CLIP: an image lies near its own caption and far from all others of the batch, and the other way round; ViTs.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, arXiv:2103.00020. The
training recipe is that of open_clip, since the authors' is not public. Checkpoints of OpenAI and open_clip load, and
exports have their names.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, POSITIVE, SHARE, Range
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View
from fastssl.data.text import TextInput
from fastssl.nn import CLIPLoss
from fastssl.nn.two_towers import CLIP_SIZES, Towers, clip_towers, size_of
from fastssl.train.config import Training

OFFICIAL = "open_clip"  # layout of the reference checkpoint
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Config:
    """CLIP ViT-B/32 with open_clip's recipe: 32 epochs of batch 32,768 with AdamW."""

    backbone: str = "vit_base"
    """towers: vit_mini, vit_base, vit_large or vit_huge"""
    patch_size: Annotated[int | None, AT_LEAST_1] = None
    """side of the patches in pixels; by default 32 for vit_base, 14 for larger ones, 4 for vit_mini"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the images in pixels"""
    quick_gelu: bool = False
    """the activation x·sigmoid(1.702·x) of OpenAI's, DFN's and MetaCLIP's weights; exact GELU without it"""
    vocabulary: Annotated[int, AT_LEAST_1] = 49408
    """number of tokens"""
    text_length: Annotated[int, Range(2, 65535)] = 77
    """most tokens of a caption"""
    max_logit_scale: Annotated[float, POSITIVE] = 100.0
    """largest factor of the cosines, which is trained and starts at 1 / 0.07"""
    crop_min: Annotated[float, SHARE] = 0.9
    """smallest fraction of the image area that a crop covers"""
    training: Training = field(
        default_factory=lambda: Training(
            32,
            32768,
            "adamw",
            lr=5e-4 / 128,  # 5e-4 for 32,768 images
            weight_decay=0.2,
            betas=(0.9, 0.98),
            eps=1e-6,
            warmup_epochs=0.16,  # 2,000 steps of 400 million images
            warmup_lr=5e-4 / 128 / 2000,  # so that the first step counts
            warmup_includes_peak=True,
        )
    )

    @classmethod
    def paper(cls, backbone: str = "vit_base") -> "Config":
        """The same numbers for every backbone."""
        return cls(backbone)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(16, 64, "adamw", lr=4e-3, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6, warmup_epochs=1)
        return cls("vit_mini", 8, (32, 32), text_length=32, training=training)

    @property
    def augmentation(self) -> Augmentation:
        """Crops alone: captions name left and right, and colours."""
        crop = (self.crop_min, 1.0)
        return Augmentation((View(self.image_size, crop=crop, interpolation="bicubic", mean=MEAN, std=STD),))

    @property
    def text(self) -> TextInput:
        """Captions are cut to the longest of the batch, which changes nothing: attention is causal."""
        return TextInput("clip", self.text_length)


def build(config: Config) -> "CLIP":
    size = size_of(CLIP_SIZES, config.backbone, config.patch_size, "clip")
    text = config.vocabulary, config.text_length
    return CLIP(clip_towers(size, config.image_size, *text, config.quick_gelu), config.max_logit_scale)


def parameter_groups(method: "CLIP") -> list[dict]:
    """No weight decay for vectors and scalars, class token and positions; token embeddings are decayed."""
    groups: tuple[list, list] = [], []
    for name, p in method.named_parameters():
        if p.requires_grad:
            exempt = p.ndim <= 1 or name.rpartition(".")[2] in ("cls_token", "pos_embed", "positional_embedding")
            groups[exempt].append(p)
    return [{"params": groups[0]}, {"params": groups[1], "weight_decay_scale": 0.0}]


def tokens_of(batch: Batch, owner: str) -> Tensor:
    """Token ids [B, L] of the captions of a batch.

    Raises:
        ValueError: it has none.
    """
    if "tokens" not in batch.extras:
        raise ValueError(f"{owner}: a batch must have the tokens of captions, got none: use a source with captions")
    return batch.extras["tokens"]


class CLIP(nn.Module):
    """Image and text tower (the paper's figure 3).

    Args:
        towers: their outputs are made unit vectors.
        max_logit_scale: largest factor of the cosines; None for no limit.
        logit_scale: initial factor of the cosines.
        logit_bias: initial number added to logits; None for none.
        norm_eps: number added to the length of a vector before it is divided by that.
    """

    def __init__(
        self,
        towers: Towers,
        max_logit_scale: float | None = 100.0,
        logit_scale: float = 1 / 0.07,
        logit_bias: float | None = None,
        norm_eps: float = 0.0,
    ):
        super().__init__()
        self.visual, self.projection, self.text = towers
        self.max_logit_scale, self.norm_eps, self.criterion = max_logit_scale, norm_eps, CLIPLoss()
        # vectors of one element, since FSDP2 refuses scalars
        self.logit_scale = nn.Parameter(torch.tensor([math.log(logit_scale)]))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor([logit_bias]))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, texts = self.embed_images(batch.views[0]), self.embed_text(tokens_of(batch, "clip"))
        scale = self.logit_scale.exp()
        with record_function("loss"):
            of_images, of_texts = self.criterion.directions(images, texts, scale)
            loss = (of_images.loss.mean() + of_texts.loss.mean()) / 2
        top1 = {"top1_image_to_text": of_images.rank, "top1_text_to_image": of_texts.rank}
        metrics = {name: (rank == 0).float().mean() for name, rank in top1.items()}
        return loss, {**metrics, "logit_scale": scale.detach()[0]}

    def before_step(self, progress: float) -> None:
        """CLIP has no scheduled values."""

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Keep the factor of cosines between 1 and its limit."""
        if self.max_logit_scale is not None:
            self.logit_scale.clamp_(0, math.log(self.max_logit_scale))

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D] of normalised images [B, 3, H, W]."""
        return self._unit(self.projection(self.visual(images)))

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Unit vectors [B, D] of texts [B, L] int64: token ids of the method's tokenizer, padded."""
        return self._unit(self.text(tokens))

    def _unit(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x / (x.norm(dim=1, keepdim=True) + self.norm_eps)

    @property
    def encoder(self) -> nn.Module:
        """The image tower, without the projection; names of timm."""
        return self.visual

    def features(self, images: Tensor) -> Tensor:
        """Features of the image tower [B, F], before the projection."""
        return self.visual(images)
