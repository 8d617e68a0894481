"""Parts of Contrastive Predictive Coding for images: patches, the context network, and both losses."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import all_gather_with_grad, rank, world_size
from fastssl.nn.masking import seeded_noise
from fastssl.ops import InfoNCE, batch_info_nce, sampled_scores


class Patches(nn.Module):
    """Cuts images into overlapping patches, and augments each by itself if seeds are given.

    Args:
        size, stride: side of a patch, and distance of patches, in pixels.
        margin: a patch shows a part that is smaller by this margin on each side, shifted at random, with a border of 0,
            the mean colour.
        flip_p: probability of a horizontal flip.
        drop_p: probability that only one of the three channels is kept; the others become 0.
    """

    def __init__(self, size: int, stride: int, margin: int = 0, flip_p: float = 0.0, drop_p: float = 0.0):
        super().__init__()
        self.size, self.stride, self.margin, self.flip_p, self.drop_p = size, stride, margin, flip_p, drop_p

    def forward(self, images: Tensor, seeds: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] → [B, rows, columns, 3, size, size]; draws depend on the images' seeds [B] alone.

        Raises:
            ValueError: an image is smaller than a patch.
        """
        if min(images.shape[2:]) < self.size:
            got = " × ".join(map(str, images.shape[2:]))
            raise ValueError(f"Patches: images must have at least {self.size} pixels on each side, got {got}")
        grid = images.unfold(2, self.size, self.stride).unfold(3, self.size, self.stride).permute(0, 2, 3, 1, 4, 5)
        return (
            grid
            if seeds is None
            else self.augment(grid.flatten(0, 2), seeds, grid.shape[1] * grid.shape[2]).view_as(grid)
        )

    def augment(self, patches: Tensor, seeds: Tensor, places: int) -> Tensor:
        """The patches [B · places, 3, size, size] with shift, flip, and loss of colours."""
        drop, channel, flip, *shift = seeded_noise(5 * places, seeds).view(-1, 5).unbind(1)
        if self.margin:
            inner = self.size - 2 * self.margin
            window = torch.arange(inner, device=patches.device)
            first = [(noise * (2 * self.margin + 1)).long()[:, None] + window for noise in shift]  # [B · places, inner]
            patches = patches.gather(2, first[0][:, None, :, None].expand(-1, 3, -1, self.size))
            patches = patches.gather(3, first[1][:, None, None].expand(-1, 3, inner, -1))
            patches = F.pad(patches, (self.margin,) * 4)
        patches = torch.where((flip < self.flip_p).view(-1, 1, 1, 1), patches.flip(3), patches)
        kept = (3 * channel).long()[:, None] == torch.arange(3, device=patches.device)
        return patches * (kept | (drop >= self.drop_p)[:, None])[:, :, None, None]


class PixelCNN(nn.Module):
    """Context of each place of a grid from its own row and the rows above: residual blocks of 1×1, 1×3 and 2×1
    convolutions.

    Args:
        dim: D of the features.
        hidden: channels inside a block.
        blocks: number of blocks. A block's context reaches one row further up and one column to each side.

    Source: Hénaff et al., "Data-Efficient Image Recognition with Contrastive Predictive Coding", 2020, appendix.
    """

    def __init__(self, dim: int, hidden: int = 256, blocks: int = 5):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, hidden, 1),
                nn.ReLU(),
                nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1)),
                nn.ZeroPad2d((0, 0, 1, 0)),
                nn.Conv2d(hidden, hidden, (2, 1)),
                nn.ReLU(),
                nn.Conv2d(hidden, dim, 1),
            )
            for _ in range(blocks)
        )

    def forward(self, latents: Tensor) -> Tensor:
        """[B, D, H, W] → [B, D, H, W]."""
        for block in self.blocks:
            latents = latents + block(latents)
        return F.relu(latents)


class CPCLoss(nn.Module):
    """Predicts features further down from a context, among the features of all places of all ranks' batches.

    Equals, for each offset, the cross entropy of ``predictions @ targets.T * scale``, whose label is the place that
    many rows further down in the same column and image. The targets are put in an order in which the positives come
    first, which makes this `ops.batch_info_nce`: no logits and no indices are stored.

    Args:
        dim: D of features and contexts.
        offsets: rows from a context to what it predicts, each at least 1. One linear layer for each, without bias.
        target_dim: width in which predictions and features are compared.
        scale: factor of the predictions.

    Raises:
        ValueError: an offset is less than 1 or there is none; by a call, a grid has no more rows than an offset.

    Source: Hénaff et al., 2020 (CPC v2), appendix; its sum over the offsets.
    """

    def __init__(self, dim: int, offsets: tuple[int, ...] = (3, 4, 5), target_dim: int = 64, scale: float = 0.1):
        super().__init__()
        self.offsets, self.scale = _checked("CPCLoss", offsets), scale
        self.target = nn.Linear(dim, target_dim, bias=False)
        self.predict = nn.ModuleList(nn.Linear(dim, target_dim, bias=False) for _ in offsets)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """Sum over the offsets of the mean loss of this rank's predictions, from features and contexts
        [B, D, H, W]."""
        return torch.stack([loss.mean() for loss, _ in self.contrast(latents, context)]).sum()

    def contrast(self, latents: Tensor, context: Tensor) -> list[InfoNCE]:
        """Loss and rank of each prediction for each offset [B · (H − offset) · W]."""
        _check_rows("CPCLoss", latents, self.offsets)
        targets = all_gather_with_grad(self.target(latents.permute(0, 2, 3, 1)))  # [B, H, W, target_dim]
        # all layers in one product, of all rows: so contexts are not copied, and their gradient is made once
        weights = torch.cat([predict.get_parameter("weight") for predict in self.predict])
        together = F.linear(context.permute(0, 2, 3, 1), weights).chunk(len(self.offsets), 3)
        results = []
        for offset, predicted in zip(self.offsets, together):
            predictions = predicted[:, :-offset].flatten(0, 2)
            positives, others = targets[:, offset:].flatten(0, 2), targets[:, :offset].flatten(0, 2)
            keys, first = torch.cat([positives, others]), rank() * len(predictions)
            results.append(batch_info_nce(predictions, keys, 1 / self.scale, label_offset=first))
        return results


class DrawnCPCLoss(nn.Module):
    """Tells features further down from a few that are drawn from the same rows of the batch, with replacement.

    A drawn feature may be the positive itself. The loss of a context c and a feature z is −log(softmax + 1e-11) of the
    scores (W z)·c with the positive first; its mean over contexts and offsets.

    Args:
        dim: D of features and contexts.
        offsets: rows from a context to what it predicts, each at least 1. One linear layer W for each, without bias.
        negatives: number of features drawn for each context and offset.

    Raises:
        ValueError: an offset is less than 1 or there is none; by a call, a grid has no more rows than an offset.

    Source: van den Oord et al., 2018 (CPC), section 3.3; Löwe et al., "Putting An End to End-to-End", 2019, and code.
    """

    def __init__(self, dim: int, offsets: tuple[int, ...] = (2, 3, 4, 5, 6), negatives: int = 16):
        super().__init__()
        self.offsets, self.negatives = _checked("DrawnCPCLoss", offsets), negatives
        self.predict = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in offsets)

    def forward(self, latents: Tensor, context: Tensor, drawn: list[Tensor]) -> Tensor:
        """Mean loss, from features and contexts [B, D, H, W] and the features that `draw` drew."""
        return torch.stack([loss.mean() for loss, _ in self.contrast(latents, context, drawn)]).mean()

    def draw(self, seeds: Tensor, rows: int, columns: int) -> list[Tensor]:
        """Features for each offset, [B · (H − offset) · W, negatives]: they depend on the images' seeds [B] alone."""
        batch, drawn = len(seeds), []
        for offset in self.offsets:
            places = (rows - offset) * columns
            noise = seeded_noise(places * self.negatives, seeds, offset).view(-1, self.negatives)
            drawn.append((noise.double() * (world_size() * batch * places)).long())
        return drawn

    def contrast(self, latents: Tensor, context: Tensor, drawn: list[Tensor]) -> list[InfoNCE]:
        """Loss and rank of each context for each offset [B · (H − offset) · W]."""
        _check_rows("DrawnCPCLoss", latents, self.offsets)
        latents, context = latents.permute(0, 2, 3, 1), context.permute(0, 2, 3, 1)
        results = []
        for offset, predict, negatives in zip(self.offsets, self.predict, drawn):
            contexts = context[:, :-offset].flatten(0, 2)
            features = all_gather_with_grad(predict(latents[:, offset:]).flatten(0, 2))
            own = rank() * len(contexts) + torch.arange(len(contexts), device=latents.device)
            scores = sampled_scores(contexts, features, torch.cat([own[:, None], negatives], 1))
            loss = -torch.log(scores.softmax(1)[:, 0] + 1e-11)
            results.append(InfoNCE(loss, (scores[:, 1:] > scores[:, :1]).sum(1)))
        return results


def _checked(name: str, offsets: tuple[int, ...]) -> tuple[int, ...]:
    if not offsets or min(offsets) < 1:
        raise ValueError(f"{name}: offsets must be one or more numbers of rows of at least 1, got {list(offsets)}")
    return tuple(offsets)


def _check_rows(name: str, latents: Tensor, offsets: tuple[int, ...]) -> None:
    if latents.shape[2] <= max(offsets):
        needed, got = max(offsets) + 1, latents.shape[2]
        raise ValueError(f"{name}: the offsets {list(offsets)} need a grid of at least {needed} rows, got {got}")
