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

    @property
    def patch_layer(self) -> PrototypeLayer:
        """The layer of prototypes of patches."""
        return self.last_layer if self.last_layer2 is None or self.shared else self.last_layer2

    def factored_pair(self, cls: Tensor, patches: Tensor) -> tuple[FactoredLogits, FactoredLogits]:
        """Logits of class tokens [N, in_dim] and patches [M, in_dim], in one pass."""
        cls_logits, patch_logits = _both(self, cls, patches)
        layer = self.patch_layer
        if layer is self.last_layer:
            return cls_logits, patch_logits
        return cls_logits, FactoredLogits(patch_logits.features, layer.prototypes())


class PatchNetwork(nn.Module):
    """iBOT's ViT and head: crops → `PatchOutput`. Names in the state dict are those of the official checkpoints.

    Args:
        backbone: ViT with a mask token.
        head: the head of class tokens and patches.
    """

    def __init__(self, backbone: ViT, head: IBOTHead | None = None):
        super().__init__()
        self.backbone = backbone
        if head is not None:
            self.head = head

    @property
    def layers(self) -> tuple[PrototypeLayer, PrototypeLayer]:
        """The prototypes of class tokens and of patches."""
        return self.head.last_layer, self.head.patch_layer

    def forward(
        self, large: Tensor, small: Tensor | None = None, mask: Tensor | None = None, rows: Tensor | None = None
    ) -> PatchOutput:
        """Tokens and logits of large and small crops.

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
        return self.head.factored_pair(cls, patches)


class DINOv2Network(PatchNetwork):
    """DINOv2's ViT with a head of class tokens, which serves patches too unless they have their own.

    Args:
        backbone: ViT with a mask token.
        dino_head: head of class tokens.
        ibot_head: head of patches; None if `dino_head` serves both.
    """

    def __init__(self, backbone: ViT, dino_head: DINOHead, ibot_head: DINOHead | None = None):
        super().__init__(backbone)
        self.dino_head, self.ibot_head = dino_head, ibot_head

    @property
    def layers(self) -> tuple[PrototypeLayer, PrototypeLayer]:
        """The prototypes of class tokens and of patches."""
        return self.dino_head.last_layer, (self.ibot_head or self.dino_head).last_layer

    def _project(self, cls: Tensor, patches: Tensor) -> tuple[FactoredLogits, FactoredLogits]:
        if self.ibot_head is None:
            return _both(self.dino_head, cls, patches)
        return self.dino_head.factored(cls), self.ibot_head.factored(patches)


def _both(head: DINOHead, cls: Tensor, patches: Tensor) -> tuple[FactoredLogits, FactoredLogits]:
    """Logits of class tokens and patches by one head, which computes its prototypes once."""
    features, prototypes = head.factored(torch.cat([cls, patches.to(cls.dtype)]))
    of_cls, of_patches = features.split([cls.shape[0], patches.shape[0]])
    return FactoredLogits(of_cls, prototypes), FactoredLogits(of_patches, prototypes)


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
