"""SigLIP: whether an image and a caption belong together, by a logistic loss of each pair of the batch; ViTs.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, arXiv:2303.15343. The recipe of its WebLI models is
not public. Official weights load (.npz of big_vision, timm's and open_clip's files), and exports have open_clip's
names.
"""

from dataclasses import dataclass, field
from typing import Annotated

from torch import Tensor
from torch.profiler import record_function

from fastssl.bounds import AT_LEAST_1, Range
from fastssl.contract import Batch
from fastssl.data.augmentation import Augmentation, View
from fastssl.data.text import TextInput
from fastssl.methods import clip
from fastssl.nn import SigLIPLoss
from fastssl.nn.two_towers import SIGLIP_SIZES, Towers, siglip_towers, size_of
from fastssl.train.config import Training

OFFICIAL = "open_clip"  # layout of the reference checkpoint


@dataclass
class Config:
    """SigLIP ViT-B/16 (section 4): batch 32,768, with the text length of its code."""

    backbone: str = "vit_base"
    """towers: vit_mini, vit_base, vit_large or vit_so400m"""
    patch_size: Annotated[int | None, AT_LEAST_1] = None
    """side of the patches in pixels; by default 16, for vit_so400m 14 and for vit_mini 4"""
    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (224, 224)
    """height and width of the images in pixels"""
    exact_gelu: bool = False
    """exact GELU, as in timm's and open_clip's models of the first SigLIP; the weights were trained with the tanh
    approximation"""
    vocabulary: Annotated[int, AT_LEAST_1] = 49408
    """number of tokens: that of CLIP's tokenizer; 32,000 in the official weights, whose vocabulary no package ships"""
    text_length: Annotated[int, Range(2, 65535)] = 64
    """tokens of a caption, padded"""
    logit_bias: Annotated[float, Range(-1000, 1000)] = -10.0
    """initial value of the number that is added to all logits; log(p / (1 − p)) with p = 1 / batch size is best"""
    training: Training = field(
        default_factory=lambda: Training(
            32, 32768, "adamw", lr=1e-3 / 128, weight_decay=1e-4, betas=(0.9, 0.95), warmup_epochs=0.16
        )
    )

    @classmethod
    def paper(cls, backbone: str = "vit_base") -> "Config":
        """The same numbers for every backbone."""
        return cls(backbone)

    @classmethod
    def small(cls) -> "Config":
        """Not from the paper: for images of at most 64 pixels, minutes on a laptop."""
        training = Training(16, 64, "adamw", lr=4e-3, weight_decay=1e-4, betas=(0.9, 0.95), warmup_epochs=2)
        return cls("vit_mini", 8, (32, 32), text_length=24, logit_bias=-4.14, training=training)  # log(1 / 63)

    @property
    def augmentation(self) -> Augmentation:
        """The whole image, squashed."""
        half = (0.5, 0.5, 0.5)
        return Augmentation((View(self.image_size, interpolation="bicubic", mean=half, std=half),))

    @property
    def text(self) -> TextInput:
        """Captions have one length: the text tower reads the last position."""
        return TextInput("clip", self.text_length, trim=False)


def build(config: Config) -> "SigLIP":
    size = size_of(SIGLIP_SIZES, config.backbone, config.patch_size, "siglip")
    text = config.vocabulary, config.text_length
    return SigLIP(siglip_towers(size, config.image_size, *text, config.exact_gelu), config.logit_bias)


parameter_groups = clip.parameter_groups


class SigLIP(clip.CLIP):
    """Image and text tower (the paper's algorithm 1).

    Args:
        towers: their outputs are made unit vectors.
        logit_bias: initial number added to logits.
    """

    def __init__(self, towers: Towers, logit_bias: float = -10.0):
        super().__init__(towers, None, logit_scale=10.0, logit_bias=logit_bias, norm_eps=1e-8)
        self.criterion = SigLIPLoss()

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, texts = self.embed_images(batch.views[0]), self.embed_text(clip.tokens_of(batch, "siglip"))
        scale = self.logit_scale.exp()
        with record_function("loss"):
            loss = self.criterion(images, texts, scale, self.logit_bias)
        return loss, {"logit_scale": scale.detach()[0], "logit_bias": self.logit_bias.detach()[0]}
