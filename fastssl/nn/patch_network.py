"""Networks of iBOT and DINOv2: a ViT whose class tokens and patches are compared with prototypes."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastssl.ops import PrototypeTargets, soft_cross_entropy

from .heads import DINOHead, FactoredLogits, PrototypeLayer
from .patch_masks import MaskedRows
from .vit import ViT


class PatchOutput(NamedTuple):
    """What the losses need of a network."""

    tokens: Tensor  # class tokens of the large crops [2B, D], before the head
    cls: FactoredLogits  # of the class tokens of all crops, crop by crop
    patches: FactoredLogits  # of the chosen patches


class IBOTHead(DINOHead):
    """iBOT's head: `DINOHead` with a second layer of prototypes for patches, unless one serves both.

    Args:
        in_dim: width of the features.
        out_dim: number of prototypes of class tokens.
        patch_out_dim: number of prototypes of patches; None for those of class tokens.
        options: further arguments of `DINOHead`.

    Source: Zhou et al., 2022 (iBOT), section 3.2 and its code.
    """

    def __init__(self, in_dim: int, out_dim: int, patch_out_dim: int | None = None, **options):
        super().__init__(in_dim, out_dim, **options)
        bottleneck, fixed = self.last_layer.weight_v.shape[1], not self.last_layer.weight_g.requires_grad
        self.last_layer2 = None if patch_out_dim is None else PrototypeLayer(bottleneck, patch_out_dim, fixed)
        self.shared = patch_out_dim is None  # settable: a teacher may have one layer where its student has two

    def factored_pair(self, cls: Tensor, patches: Tensor) -> tuple[FactoredLogits, FactoredLogits]:
        """Class tokens [N, in_dim] and patches [M, in_dim], in one pass."""
        features, prototypes = self.factored(torch.cat([cls, patches.to(cls.dtype)]))
        cls_features, patch_features = features.split([cls.shape[0], patches.shape[0]])
        patch_prototypes = prototypes if self.shared else self.last_layer2.prototypes()
        return FactoredLogits(cls_features, prototypes), FactoredLogits(patch_features, patch_prototypes)


class PatchNetwork(nn.Module):
    """ViT and heads: crops → `PatchOutput`. Names in the state dict are those of the official checkpoints.

    Args:
        backbone: ViT with a mask token.
        head: `IBOTHead` of iBOT, saved as "head".
        dino_head: instead of it the head of DINOv2, saved as "dino_head".
        ibot_head: with it a head for patches, saved as "ibot_head"; None if `dino_head` serves both.
    """

    def __init__(
        self,
        backbone: ViT,
        head: IBOTHead | None = None,
        dino_head: DINOHead | None = None,
        ibot_head: DINOHead | None = None,
    ):
        super().__init__()
        self.backbone, self.head, self.dino_head, self.ibot_head = backbone, head, dino_head, ibot_head

    @property
    def prototypes(self) -> tuple[int, int]:
        """Numbers of prototypes of class tokens and of patches."""
        head = self.dino_head if self.head is None else self.head
        patches = head if self.ibot_head is None else self.ibot_head
        layer = patches.last_layer if self.head is None or self.head.last_layer2 is None else self.head.last_layer2
        return head.last_layer.weight_v.shape[0], layer.weight_v.shape[0]

    def forward(
        self, large: Tensor, small: Tensor | None = None, mask: Tensor | None = None, rows: Tensor | None = None
    ) -> PatchOutput:
        """
        Args:
            large: large crops [2B, C, H, W].
            small: small crops [V·B, C, h, w], which are never masked; None for none.
            mask: [2B, L] bool, patches of the large crops that are hidden; None for none.
            rows: [M] int64, the patches of the large crops whose logits are computed; None for all.
        """
        tokens = self.backbone.forward_features(large, mask)
        cls, patches = tokens[:, 0], tokens[:, self.backbone.num_prefix_tokens :].flatten(0, 1)
        patches = patches if rows is None else patches.index_select(0, rows)
        all_cls = cls if small is None else torch.cat([cls, self.backbone.features(small, "token")])
        return PatchOutput(cls, *self._project(all_cls, patches))

    def _project(self, cls: Tensor, patches: Tensor) -> tuple[FactoredLogits, FactoredLogits]:
        if self.head is not None:
            return self.head.factored_pair(cls, patches)
        if self.ibot_head is not None:
            return self.dino_head.factored(cls), self.ibot_head.factored(patches)
        features, prototypes = self.dino_head.factored(torch.cat([cls, patches.to(cls.dtype)]))
        parts = features.split([cls.shape[0], patches.shape[0]])
        return FactoredLogits(parts[0], prototypes), FactoredLogits(parts[1], prototypes)


def patch_cross_entropy(
    student: FactoredLogits, targets: PrototypeTargets, tau: float, rows: MaskedRows, crops: int
) -> Tensor:
    """Mean over crops of the mean over masked patches of the cross entropy; a crop without masked patches counts 0.

    Args:
        student, targets: those of `rows`, one to one.
        tau: temperature of the student.
        rows: the masked patches.
        crops: number of large crops of the batch.

    Source: Zhou et al., 2022 (iBOT), equation 2.
    """
    return (soft_cross_entropy(*student, tau, targets) * rows.weights).sum() / crops
