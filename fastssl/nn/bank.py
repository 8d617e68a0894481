"""Memory banks: a feature of every training image, from which negatives are drawn (InstDisc, CMC)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.distributed import all_gather
from fastssl.ops import InfoNCE, SampledNCE, info_nce, sampled_nce, update_bank_

from .masking import splitmix64


class MemoryBank(nn.Module):
    """One feature of each training image. All ranks hold the whole bank, and all update it alike.

    The buffer `memory` [N, D] starts with values uniform in ±sqrt(3 / D): rows of about unit length.

    Args:
        images: number of training images (N).
        dim: width of the features (D).
        momentum: share of the old feature in an update.

    Raises:
        ValueError: images or dim is less than 1, or momentum is not in 0 … 1.

    Source: Wu et al., 2018 (InstDisc), section 3.2, and its code.
    """

    memory: Tensor

    def __init__(self, images: int, dim: int, momentum: float = 0.5):
        super().__init__()
        for argument, value in (("images", images), ("dim", dim)):
            if value < 1:
                raise ValueError(f"MemoryBank: {argument} must be at least 1, got {value}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"MemoryBank: momentum must be from 0 to 1, got {momentum}")
        self.momentum = momentum
        self.memory: Tensor
        self.register_buffer("memory", torch.empty(images, dim).uniform_(-1, 1).mul_(math.sqrt(3 / dim)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: a bank has two uses, writing and reading, and is not called."""
        raise TypeError(
            "MemoryBank: write features by update(index, features) and read them as .memory [N, D]: no call"
        )

    @torch.no_grad()
    def update(self, index: Tensor, features: Tensor) -> None:
        """Moves the rows `index` [B] towards the features [B, D], of all ranks: see `ops.update_bank_`."""
        update_bank_(self.memory, all_gather(index), all_gather(features.detach()), self.momentum)


def draw_rows(index: Tensor, seed: Tensor | None, count: int, rows: int) -> Tensor:
    """Rows of a bank for each image: its own, then `count` drawn uniformly with replacement, its own included.

    Args:
        index: [B] int64, the images.
        seed: [B] int64, `Batch.seed`: equal seeds draw equal rows, on any device and rank. None for torch's generator.
        count: number of negatives m.
        rows: number of rows N of the bank.

    Returns: [B, 1+m] int64.
    """
    if seed is None:
        drawn = torch.randint(rows, (index.shape[0], count), device=index.device)
    else:  # the remainder of 64 random bits prefers no row by more than N / 2^63
        drawn = splitmix64(seed, count) % rows
    return torch.cat([index[:, None], drawn], 1)


class BankNCE(nn.Module):
    """Noise-contrastive estimation against rows of a bank, with Z from the first batch.

    The buffer `z` is −1 until `keep_z` is called with the first step's estimate, and constant from then on; it is saved
    in state dicts.

    Args:
        tau: temperature.

    Source: Wu et al., 2018 (InstDisc), section 3.2, and its code, which estimates Z from one batch.
    """

    z: Tensor

    def __init__(self, tau: float = 0.07):
        super().__init__()
        self.tau = tau
        self.z: Tensor
        self.register_buffer("z", torch.tensor(-1.0))
        self.has_z = False  # known to the host, so that no step waits for the device to read z
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "has_z", bool(module.z > 0)))

    def forward(self, q: Tensor, memory: Tensor, indices: Tensor) -> tuple[SampledNCE, Tensor]:
        """Loss and rank of each query, and the Z that was used: of the first batch of all ranks, the batch's own.

        Args:
            q: [B, D] queries of unit length. Gradient.
            memory: [N, D], the bank.
            indices: [B, 1+m] int64, rows of the bank, the positive first (`draw_rows`).
        """
        z = self.z if self.has_z else self.estimate(q, memory, indices)
        return sampled_nce(q, memory, indices, self.tau, z), z

    @torch.no_grad()
    def estimate(self, q: Tensor, memory: Tensor, indices: Tensor) -> Tensor:
        """Z of a batch of all ranks: N times the mean of exp(q·row / τ)."""
        lse = all_gather(sampled_nce(q, memory, indices, self.tau, 1.0).lse)
        return memory.shape[0] * (lse - math.log(indices.shape[1])).exp().mean()

    @torch.no_grad()
    def keep_z(self, estimates: list[Tensor]) -> None:
        """Fixes Z as the mean of the first step's estimates, one a micro-batch, unless it is fixed or not finite."""
        if self.has_z or not estimates:
            return
        z = torch.stack(estimates).mean()
        if z.isfinite():  # the host waits for the device, in the first step alone
            self.z.copy_(z)
            self.has_z = True


def bank_cross_entropy(q: Tensor, memory: Tensor, index: Tensor, tau: float) -> InfoNCE:
    """Cross entropy over the whole bank, whose row `index` is the right class; loss and rank of each query.

    Equals ``F.cross_entropy(q @ memory.T / tau, index, reduction="none")``. The logits are not stored.

    Args:
        q: [B, D] queries. Gradient.
        memory: [N, D], the bank, no gradient.
        index: [B] int64.
        tau: temperature.

    Source: Wu et al., 2018 (InstDisc), equation 2.
    """
    # InfoNCE with the bank as its queue counts the positive twice: e^loss = e^(cross entropy) + 1.
    loss, rank = info_nce(q, memory[index], memory, tau)
    return InfoNCE(loss + torch.log(-torch.expm1(-loss)), rank)
