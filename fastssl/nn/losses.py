"""Contrastive losses as modules: over a queue of keys, and in the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import all_gather, all_gather_with_grad, all_to_all, rank, world_size
from fastssl.ops import InfoNCE, info_nce, nt_xent
from fastssl.ops.dispatch import acc_dtype

from .queue import KeyQueue


def unit(x: Tensor) -> Tensor:
    """Rows [B, D] of unit length, in float32 (float64 for float64) also where autocast made x."""
    return F.normalize(x.to(acc_dtype(x)), dim=1)


class InfoNCELoss(KeyQueue):
    """MoCo's loss with its queue: ``loss = criterion(q, k)``, and in training the keys enter the queue.

    Replaces MoCo's `_dequeue_and_enqueue` and logits, and lightly's `NTXentLoss` with a memory bank. The queue is never
    copied and no logits are kept. All ranks must bring batches of one size (drop the last, incomplete one).

    Args:
        dim: D of queries and keys.
        queue_size: K negatives.
        tau: temperature: a number, or an `nn.Parameter` with one element, which is trained.
        normalize: make queries and keys unit vectors first.
        shard: each rank keeps K / world keys and every query meets all of them; the results are those of one queue, to
            rounding. See `KeyQueue`.

    Source: He et al., 2020 (MoCo), equation 1 and algorithm 1.
    """

    def __init__(
        self,
        dim: int,
        queue_size: int = 65536,
        tau: float | nn.Parameter = 0.07,
        *,
        normalize: bool = True,
        shard: bool = False,
    ):
        super().__init__(dim, queue_size, shard)
        if not isinstance(tau, Tensor) and not tau > 0:
            raise ValueError(f"{type(self).__name__}: tau must be > 0, got {tau}")
        self.tau, self.normalize = tau, normalize

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Mean loss of the queries q [B, D] against their keys k [B, D] and the queue, a float32 scalar (float64 for
        float64). Gradient to q and to a trained tau, none to k. In training mode, with gradients on, k is enqueued."""
        q, k = self._prepared(q, k)
        loss = self._contrast(q, k).loss.mean()
        if self.training and torch.is_grad_enabled():
            super().enqueue(k)
        return loss

    def contrast(self, q: Tensor, k: Tensor) -> InfoNCE:
        """Loss and rank of each query, [B]; the queue is only read."""
        return self._contrast(*self._prepared(q, k))

    def enqueue(self, keys: Tensor) -> None:
        """Writes the keys [B, D] of all ranks over the oldest, made unit vectors first with `normalize`."""
        super().enqueue(unit(keys) if self.normalize else keys)

    def _prepared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (unit(q), unit(k.detach())) if self.normalize else (q, k.detach())

    def _contrast(self, q: Tensor, k: Tensor) -> InfoNCE:
        self._check_ranks()
        if not self.shard or world_size() == 1:
            return info_nce(q, k, self.queue, self.tau)
        # Every rank contrasts all queries with its shard; each then joins what the shards say of its own.
        loss, beaten_by = info_nce(all_gather_with_grad(q), all_gather(k), self.queue, self.tau)
        shards = (world_size(), -1)
        return InfoNCE(
            _joined(all_to_all(loss.unflatten(0, shards))), all_to_all(beaten_by.unflatten(0, shards)).sum(0)
        )


def _joined(losses_WB: Tensor) -> Tensor:
    """The loss over all negatives from those over disjoint parts of them: e^loss − 1 = Σ (e^loss_r − 1), since both are
    sums over negatives of e^(s_j − s_positive)."""
    losses = losses_WB.double()
    largest = losses.detach().amax(0)
    others = (-torch.expm1(-losses) * (losses - largest).exp()).sum(0)
    return (largest + torch.log((-largest).exp() + others)).to(losses_WB.dtype)


class NTXentLoss(nn.Module):
    """SimCLR's loss: ``loss = criterion(z1, z2)``. Replaces lightly's `NTXentLoss` without memory bank.

    Args:
        tau: temperature: a number, or an `nn.Parameter` with one element, which is trained.
        gather: contrast with the views of all ranks, with gradient to them. Every rank computes all rows then; their
            batches must be of one size.

    Source: Chen et al., 2020 (SimCLR), equation 1.
    """

    def __init__(self, tau: float | nn.Parameter = 0.5, gather: bool = False):
        super().__init__()
        if not isinstance(tau, Tensor) and not tau > 0:
            raise ValueError(f"NTXentLoss: tau must be > 0, got {tau}")
        self.tau, self.gather = tau, gather

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Mean loss of the 2B views of this rank, z1 and z2 [B, D], row i of both showing image i: a float32 scalar
        (float64 for float64). They are made unit vectors first. Gradient to both and to a trained tau."""
        z1, z2 = unit(z1), unit(z2)
        if not self.gather or world_size() == 1:
            return nt_xent(z1, z2, self.tau).mean()
        batch = z1.shape[0]
        loss = nt_xent(all_gather_with_grad(z1), all_gather_with_grad(z2), self.tau).view(2, -1)
        return loss[:, rank() * batch : (rank() + 1) * batch].mean()
