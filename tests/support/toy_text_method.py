"""A method from outside the package that learns from images and text: features of an image match the words' sum."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from fastssl.bounds import AT_LEAST_1
from fastssl.contract import Batch
from fastssl.data.text import TextInput
from tests.support import toy_method


@dataclass
class Config(toy_method.Config):
    """Linear features of thumbnails that match a sum of word vectors."""

    tokens: Annotated[int, AT_LEAST_1] = 12
    """most tokens of a caption"""

    @property
    def text(self) -> TextInput:
        return TextInput("bert", self.tokens)


def build(config: Config) -> "Matching":
    return Matching(config.dim)


class Matching(toy_method.Autoencoder):
    def __init__(self, dim: int):
        super().__init__(dim)
        self.words = nn.Embedding(30_522, dim)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().forward(batch)
        tokens = batch.extras["tokens"]
        texts = (self.words(tokens) * (tokens != 0)[..., None]).sum(1)
        match = (self.backbone(batch.views[0]) - texts).square().mean()
        return loss + match, {**metrics, "length": torch.tensor(float(tokens.shape[1]))}
