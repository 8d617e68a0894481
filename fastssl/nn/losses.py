"""Contrastive losses as modules: with a queue of keys (MoCo) and within the batch (SimCLR)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import all_gather, all_gather_with_grad, all_to_all, rank, world_size
from fastssl.ops import InfoNCE, batch_info_nce, info_nce, nt_xent
from fastssl.ops.dispatch import acc_dtype

from .queue import KeyQueue


def l2_normalize(x: Tensor) -> Tensor:
    """x [B, D] with rows of unit length, in float32 (float64 for float64), also for an x in autocast's dtype."""
    return F.normalize(x.to(acc_dtype(x)), dim=1)


class InfoNCELoss(KeyQueue):
    """MoCo's loss with its queue: ``loss = criterion(q, k)``, and in training the keys enter the queue.

    Replaces MoCo's `_dequeue_and_enqueue` and logits, and lightly's `NTXentLoss` with a memory bank. The queue is not
    copied and no logits are kept. All ranks must have batches of the same size (drop the last, incomplete one).

    The keys get no gradient: they come from the momentum encoder, and lightly's loss, which gives them one, differs
    there. So keys that require a gradient are refused.

    Args:
        dim: D of queries and keys.
        queue_size: number of negative keys in the queue (K).
        tau: temperature: a number, or an `nn.Parameter` with one element, which is trained.
        normalize: make queries and keys unit vectors first.
        shard: keep K / world keys on each rank and contrast every query with all of them; results equal those of one
            queue, to rounding. See `KeyQueue`.

    Raises:
        ValueError: tau is not positive, or an argument of `KeyQueue` does not fit.

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
        """Mean loss of the queries q [B, D] with their keys k [B, D] and the queue, a float32 scalar (float64 for
        float64). Gradient to q and to a trained tau, none to k. In training mode, with gradients on, k is enqueued.

        Raises:
            ValueError: k requires a gradient, or a shape or device does not fit.
        """
        q, k = self._prepare(q, k)
        loss = self._contrast(q, k).loss.mean()
        if self.training and torch.is_grad_enabled():
            super().enqueue(k)
        return loss

    def contrast(self, q: Tensor, k: Tensor) -> InfoNCE:
        """Loss and rank of each query, [B]; the queue does not change."""
        return self._contrast(*self._prepare(q, k))

    def enqueue(self, keys: Tensor) -> None:
        """Writes the keys [B, D] of all ranks over the oldest, with `normalize` as unit vectors."""
        super().enqueue(l2_normalize(keys) if self.normalize else keys)

    def _prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if k.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{type(self).__name__}: k must not require a gradient, since keys get none: pass k.detach(), or use "
                "fastssl.ops.batch_info_nce, which gives a gradient to queries and keys"
            )
        return (l2_normalize(q), l2_normalize(k.detach())) if self.normalize else (q, k.detach())

    def _contrast(self, q: Tensor, k: Tensor) -> InfoNCE:
        self._check_ranks()
        if not self.shard or world_size() == 1:
            return info_nce(q, k, self.queue, self.tau)
        # Every rank contrasts the queries of all ranks with its shard, and sends each rank the results of its queries.
        losses, query_ranks = info_nce(all_gather_with_grad(q), all_gather(k), self.queue, self.tau)
        by_query = (world_size(), -1)
        loss = _loss_over_shards(all_to_all(losses.unflatten(0, by_query)))
        return InfoNCE(loss, all_to_all(query_ranks.unflatten(0, by_query)).sum(0))


def _loss_over_shards(losses_WB: Tensor, signs: Sequence[int] | None = None) -> Tensor:
    """Loss over all negatives [B] from the losses over disjoint shards of them [W, B].

    e^loss − 1 = Σ_r (e^loss_r − 1), since both are sums over negatives of e^(s_j − s_positive). A shard with sign −1 is
    taken away, from others that count its negatives twice.
    """
    losses = losses_WB.double()
    largest = losses.detach().amax(0)
    negatives_WB = -torch.expm1(-losses) * (losses - largest).exp()
    if signs is not None:
        negatives_WB = torch.stack([sign * shard for sign, shard in zip(signs, negatives_WB)])
    negatives = negatives_WB.sum(0)
    return (largest + torch.log((-largest).exp() + negatives)).to(losses_WB.dtype)


class NTXentLoss(nn.Module):
    """SimCLR's loss: ``loss = criterion(z1, z2)``. Replaces lightly's `NTXentLoss` without memory bank.

    Args:
        tau: temperature: a number, or an `nn.Parameter` with one element, which is trained.
        gather: contrast with the views of all ranks, with gradient to them. Every rank computes the losses of its own
            views. The batches of all ranks must have the same size.

    Raises:
        ValueError: tau is not positive.

    Source: Chen et al., 2020 (SimCLR), equation 1.
    """

    def __init__(self, tau: float | nn.Parameter = 0.5, gather: bool = False):
        super().__init__()
        if not isinstance(tau, Tensor) and not tau > 0:
            raise ValueError(f"NTXentLoss: tau must be > 0, got {tau}")
        self.tau, self.gather = tau, gather

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Mean loss of this rank's 2B views z1 and z2 [B, D], where row i of both is a view of image i: a float32
        scalar (float64 for float64). They are made unit vectors first. Gradient to both and to a trained tau."""
        z1, z2 = l2_normalize(z1), l2_normalize(z2)
        if not self.gather or world_size() == 1:
            return nt_xent(z1, z2, self.tau).mean()
        local = nt_xent(z1, z2, self.tau).chunk(2)
        remote = _of_other_ranks(torch.cat([z1, z2], 1)).view(-1, z1.shape[1])
        losses = []
        for q, keys, among_local in zip((z1, z2), (z2, z1), local):
            among_keys = batch_info_nce(q, keys, self.tau).loss  # counted in both of the other two
            among_remote = batch_info_nce(q, torch.cat([keys, remote]), self.tau).loss
            losses.append(_loss_over_shards(torch.stack([among_local, among_remote, among_keys]), (1, 1, -1)))
        return torch.cat(losses).mean()


def _of_other_ranks(x: Tensor) -> Tensor:
    """The rows [B, …] of all ranks but this one, with gradient: [(world − 1) · B, …]."""
    parts = all_gather_with_grad(x).split(x.shape[0])
    return torch.cat([part for r, part in enumerate(parts) if r != rank()])
