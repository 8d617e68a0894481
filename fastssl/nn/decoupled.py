"""Decoupled contrastive losses: NT-Xent without the positive in the denominator."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import all_gather_with_grad, rank, world_size
from fastssl.ops.dispatch import first_order, without_autocast

from .losses import l2_normalize

LOGITS_AT_ONCE = 2**22  # 16 MB of float32

Weights = Callable[[Tensor, Tensor], Tensor]


class DCLLoss(nn.Module):
    """``loss = criterion(z1, z2)``. Replaces lightly's of the same name.

    Each view has the loss −w·s⁺ + log Σ exp(s⁻): s are cosines over the temperature, s⁺ that with the other view of the
    image, s⁻ those with all views of other images. The sum is taken directly: NT-Xent's minus the positive would cancel
    once the positive dominates it.

    Args:
        tau: temperature: a number, or an `nn.Parameter` with one element, which is trained.
        weight_fn: ``weight_fn(z, other)`` gives the weight w [B] of each positive, from unit vectors [B, D]; 1 if None.
        gather: contrast with the views of all ranks, with gradient to them. The batches of all ranks must have the same
            size.

    Raises:
        ValueError: tau is not positive.

    Memory: blocks of `LOGITS_AT_ONCE` logits, which are computed again for the gradient.

    Source: Yeh et al., "Decoupled Contrastive Learning", 2022, equation 6.
    """

    def __init__(self, tau: float | nn.Parameter = 0.1, weight_fn: Weights | None = None, gather: bool = False):
        super().__init__()
        if not isinstance(tau, Tensor) and not tau > 0:
            raise ValueError(f"{type(self).__name__}: tau must be > 0, got {tau}")
        self.tau, self.weight_fn, self.gather = tau, weight_fn, gather

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Mean loss of this rank's 2B views z1 and z2 [B, D], where row i of both is a view of image i: a float32
        scalar (float64 for float64). They are made unit vectors first. Gradient to both and to a trained tau.

        Raises:
            ValueError: the shapes differ, or there is a single image.
        """
        name = type(self).__name__
        if z1.ndim != 2 or z1.shape != z2.shape:
            shapes = f"{list(z1.shape)} and {list(z2.shape)}"
            raise ValueError(f"{name}: z1 and z2 must have one shape [B, D], got {shapes}")
        batch, gathers = len(z1), self.gather and world_size() > 1
        total, first = (batch * world_size(), batch * rank()) if gathers else (batch, 0)
        if total < 2:
            raise ValueError(f"{name}: there must be at least 2 images, since negatives are of other ones, got {total}")
        z1, z2 = l2_normalize(z1), l2_normalize(z2)
        positive = (z1 * z2).sum(1) / self.tau
        weights = [positive.new_ones(batch)] * 2
        if self.weight_fn is not None:
            weights = [self.weight_fn(z1, z2), self.weight_fn(z2, z1)]
        keys = torch.cat([all_gather_with_grad(z1), all_gather_with_grad(z2)] if gathers else [z1, z2])
        own = torch.arange(first, first + batch, device=z1.device)
        excluded = torch.stack([own, own + total], 1).repeat(2, 1)
        lse = _LogSumExp.apply(torch.cat([z1, z2]) / self.tau, keys, excluded)
        return (lse - torch.cat(weights) * positive.repeat(2)).mean()


class DCLWLoss(DCLLoss):
    """`DCLLoss` with larger weights of hard positives, w = 2 − B·softmax(cosines of the positives / sigma). Replaces
    lightly's of the same name.

    Args:
        tau: temperature, as for `DCLLoss`.
        sigma: temperature of the weights.
        gather: as for `DCLLoss`; the softmax is over this rank's batch.

    Source: Yeh et al., "Decoupled Contrastive Learning", 2022, section 3.2.
    """

    def __init__(self, tau: float | nn.Parameter = 0.1, sigma: float = 0.5, gather: bool = False):
        super().__init__(tau, functools.partial(von_mises_fisher_weights, sigma=sigma), gather)


def von_mises_fisher_weights(z: Tensor, other: Tensor, sigma: float = 0.5) -> Tensor:
    """2 − B·softmax over the batch of z·other / sigma, [B], for unit vectors [B, D]; no gradient."""
    return 2 - len(z) * F.softmax((z.detach() * other.detach()).sum(1) / sigma, dim=0)


class _LogSumExp(torch.autograd.Function):
    """log Σ_j exp(q_i·k_j) over the keys that row i does not exclude, [Q], in blocks of queries.

    q [Q, D], keys [M, D], excluded [Q, E] int64: numbers of keys.
    """

    @staticmethod
    def forward(ctx, q, keys, excluded):
        with without_autocast(q):
            lse = torch.cat([_logits(q, keys, excluded, rows).logsumexp(1) for rows in _blocks(q, keys)])
        ctx.save_for_backward(q, keys, excluded, lse)
        return lse

    @staticmethod
    @first_order("DCLLoss")
    def backward(ctx, dlse):
        q, keys, excluded, lse = ctx.saved_tensors
        dq, dkeys = torch.empty_like(q), torch.zeros_like(keys)
        with without_autocast(q):
            for rows in _blocks(q, keys):
                weights = (_logits(q, keys, excluded, rows) - lse[rows, None]).exp_().mul_(dlse[rows, None])
                dq[rows] = weights @ keys
                dkeys += weights.T @ q[rows]
        return dq, dkeys, None


def _blocks(q: Tensor, keys: Tensor) -> list[slice]:
    """Rows of q with `LOGITS_AT_ONCE` logits."""
    size = max(1, LOGITS_AT_ONCE // len(keys))
    return [slice(start, start + size) for start in range(0, len(q), size)]


def _logits(q: Tensor, keys: Tensor, excluded: Tensor, rows: slice) -> Tensor:
    """Logits of these rows, −∞ for excluded keys."""
    return (q[rows] @ keys.T).scatter_(1, excluded[rows], float("-inf"))
