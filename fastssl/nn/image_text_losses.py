"""Losses of images and their captions: CLIP's and SigLIP's, called as open_clip's."""

from typing import NamedTuple

from torch import Tensor, nn

from fastssl.distributed import all_gather_with_grad, rank, world_size
from fastssl.ops import InfoNCE, batch_info_nce, check, pairwise_sigmoid


class Directions(NamedTuple):
    """Loss and rank of each image among the texts, and of each text among the images."""

    of_images: InfoNCE
    of_texts: InfoNCE


class CLIPLoss(nn.Module):
    """CLIP's loss: ``loss = criterion(image_features, text_features, logit_scale)``. Replaces open_clip's `ClipLoss`.

    Every rank contrasts its own images with the texts of all ranks, and its own texts with the images of all, with
    gradient to all: open_clip's ``local_loss=True, gather_with_grad=True``. The mean of the ranks' losses and of their
    gradients, as DistributedDataParallel computes it, is that of the whole batch exactly. Of open_clip's other settings
    the default gives both towers 1 / world of the gradient, beside a whole one for the scale; ``local_loss`` alone
    gives another direction, since keys get no gradient; and ``gather_with_grad`` alone is right, with all logits on all
    ranks. The batches of all ranks must have the same size. No logits are kept.

    Args:
        gather: contrast with the features of all ranks; False for this rank's alone.

    Source: Radford et al., 2021 (CLIP), figure 3.
    """

    def __init__(self, gather: bool = True):
        super().__init__()
        self.gather = gather

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """Mean of both directions, a float32 scalar (float64 for float64). Gradient to all three.

        Args:
            image_features, text_features: [B, D] unit vectors; row i of both belongs to pair i.
            logit_scale: factor of the cosines, the exponential of what is trained.
            output_dict: return ``{"contrastive_loss": loss}``.

        Raises:
            ValueError: the features are not [B, D] both.
        """
        of_images, of_texts = self.directions(image_features, text_features, logit_scale)
        loss = (of_images.loss.mean() + of_texts.loss.mean()) / 2
        return {"contrastive_loss": loss} if output_dict else loss

    def directions(self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor) -> Directions:
        """Loss and rank of each of this rank's images and texts."""
        _check_pairs("CLIPLoss", image_features, text_features)
        images, texts, offset = image_features, text_features, 0
        if self.gather and world_size() > 1:
            offset = rank() * len(image_features)
            images, texts = all_gather_with_grad(image_features), all_gather_with_grad(text_features)
        tau = 1 / logit_scale
        return Directions(
            batch_info_nce(image_features, texts, tau, offset), batch_info_nce(text_features, images, tau, offset)
        )


class SigLIPLoss(nn.Module):
    """SigLIP's loss: ``loss = criterion(image_features, text_features, logit_scale, logit_bias)``. Replaces open_clip's
    `SigLipLoss`.

    Every rank compares its own images with the texts of all ranks, and divides by the number of its own. The mean of
    the ranks' losses and of their gradients is that of the whole batch exactly, as with open_clip's exchanges of
    neighbours. The batches of all ranks must have the same size. No logits are kept.

    Args:
        gather: compare with the texts of all ranks; False for this rank's alone.

    Source: Zhai et al., 2023 (SigLIP), algorithm 1.
    """

    def __init__(self, gather: bool = True):
        super().__init__()
        self.gather = gather

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor = 0.0,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of all pairs, divided by the number of images: a float32 scalar (float64 for float64).

        Args:
            image_features, text_features: [B, D] unit vectors; row i of both belongs to pair i. Gradient.
            logit_scale: factor of the cosines, the exponential of what is trained. Gradient.
            logit_bias: number added to all logits. Gradient.
            output_dict: return ``{"contrastive_loss": loss}``.

        Raises:
            ValueError: the features are not [B, D] both.
        """
        _check_pairs("SigLIPLoss", image_features, text_features)
        texts, offset = text_features, 0
        if self.gather and world_size() > 1:
            texts, offset = all_gather_with_grad(text_features), rank() * len(image_features)
        loss = pairwise_sigmoid(image_features, texts, logit_scale, logit_bias, offset)
        return {"contrastive_loss": loss} if output_dict else loss


def _check_pairs(name: str, images: Tensor, texts: Tensor) -> None:
    check.tensor(name, "image_features", images, "B D")
    check.tensor(name, "text_features", texts, "B D", B=images.shape[0], D=images.shape[1])
