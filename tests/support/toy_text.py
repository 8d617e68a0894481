"""A method of images and text from outside the package, which knows the words of colours without training."""

from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.bounds import AT_LEAST_1
from fastssl.contract import Batch
from fastssl.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, Augmentation, View
from fastssl.data.text import TextInput
from fastssl.data.tokenizers import build_tokenizer
from fastssl.train.config import Training
from tests.support.toy_captions import COLOURS


@dataclass
class Config:
    """Colours of images beside words of colours."""

    image_size: Annotated[tuple[int, int], AT_LEAST_1] = (32, 32)
    """height and width of the images in pixels"""
    length: Annotated[int, AT_LEAST_1] = 16
    """most tokens of a caption"""
    training: Training = field(
        default_factory=lambda: Training(epochs=2, batch_size=16, optimizer="adamw", lr=1e-3, weight_decay=0)
    )

    @classmethod
    def paper(cls, backbone: str = "") -> "Config":
        return cls()

    @classmethod
    def small(cls) -> "Config":
        """For images of at most 64 pixels."""
        return cls()

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation((View(self.image_size, crop=(0.9, 1.0)),))

    @property
    def text(self) -> TextInput:
        return TextInput("bert", self.length)


def build(config: Config) -> "ColourWords":
    return ColourWords()


class MeanColour(nn.Module):
    """The mean colour of an image, from −1 to 1."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        mean, std = images.new_tensor(IMAGENET_MEAN), images.new_tensor(IMAGENET_STD)
        return self.scale * ((images.mean((2, 3)) * std + mean) * 2 - 1)


class ColourWords(nn.Module):
    """The loss is one minus the mean cosine of images and their captions."""

    def __init__(self):
        super().__init__()
        tokenizer = build_tokenizer("bert")
        self.backbone = MeanColour()
        self.words = nn.Embedding(tokenizer.vocabulary, 3)
        nn.init.normal_(self.words.weight, std=0.05, generator=torch.Generator().manual_seed(0))
        self.words.weight.data[tokenizer.pad] = 0
        for name, colour in COLOURS.items():
            (word,) = tokenizer.encode(name)[1:-1]
            self.words.weight.data[word] = torch.tensor(colour) / 127.5 - 1

    @property
    def encoder(self) -> nn.Module:
        return self.backbone

    def features(self, images: Tensor) -> Tensor:
        return self.backbone(images)

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(self.backbone(images), dim=1)

    def embed_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.words(tokens).sum(1), dim=1)

    def match(self, images: Tensor, tokens: Tensor) -> Tensor:
        return -(self.backbone(images) - self.words(tokens).sum(1)).square().sum(1)

    def before_step(self, progress: float) -> None:
        pass

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        cosine = (self.embed_images(batch.views[0]) * self.embed_text(batch.extras["tokens"])).sum(1)
        return 1 - cosine.mean(), {}

    def after_step(self, progress: float) -> None:
        pass
