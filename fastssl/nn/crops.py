"""Encoding of views of several sizes."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .heads import DINOHead, FactoredLogits


def encode_crops(encoder: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> Tensor:
    """Features of all views [V·B, F], view by view. Views of one size that follow each other are encoded in one call.

    Batch norms thus see the views of one size together.

    Args:
        encoder: images [N, C, H, W] → features [N, F].
        views: V tensors [B, C, H, W].

    Source: Caron et al., 2020 (SwAV), section 3.3, and 2021 (DINO), section 3.1, and their code.
    """
    groups = [list(group) for _, group in itertools.groupby(views, key=lambda view: view.shape)]
    features = [encoder(group[0] if len(group) == 1 else torch.cat(group)) for group in groups]
    return features[0] if len(features) == 1 else torch.cat(features)


class MultiCropNetwork(nn.Module):
    """Backbone and head: views → `FactoredLogits` of all views, view by view.

    Source: Caron et al., 2021 (DINO), section 3.1.
    """

    def __init__(self, backbone: nn.Module, head: DINOHead):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: Sequence[Tensor]) -> FactoredLogits:
        return self.head.factored(encode_crops(self.backbone, views))
