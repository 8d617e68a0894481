"""The Gumbel-softmax: relaxed samples of codes, and noise from the samples' seeds."""

import math

import torch
from torch import Tensor

from fastssl.ops.dispatch import Function

from .masking import splitmix64

NOISE_AT_ONCE = 2**20  # values of noise that are made together


def gumbel_noise(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Gumbel noise [B, *shape] float32, −ln(−ln u), a function of the seeds alone: equal on every device and rank.

    u has 24 random bits, and is at least 2^-25.

    Args:
        seeds: [B] int64.
        shape: of the noise of a sample.

    Memory: the result, and 64 bytes for each value of `NOISE_AT_ONCE` or of one sample.
    """
    count = math.prod(shape)
    noise = torch.empty(len(seeds), count, device=seeds.device)
    at_once = max(1, NOISE_AT_ONCE // count)
    for part, some in zip(noise.split(at_once), seeds.split(at_once)):
        bits = splitmix64(some, (count + 1) // 2).view(torch.int32)[:, :count]
        torch.mul((bits >> 8) & 0xFFFFFF, 2.0**-24, out=part)
    return noise.clamp_(min=2.0**-25).log_().neg_().log_().neg_().view(len(seeds), *shape)


def relax(logits: Tensor, gumbel: Tensor, tau: Tensor | float) -> tuple[Tensor, Tensor]:
    """Samples of codes, relaxed to softmax((logits + noise) / τ), and the divergence of the codes from uniform ones.

    Equals ``((logits + gumbel) / tau).softmax(1)`` and, with p = logits.softmax(1), the sum over the codes of
    p · ln(p · V).

    Args:
        logits: [B, V, h, w] float32 or float64. Gradient, of first order.
        gumbel: [B, V, h, w] noise, −ln(−ln u) of uniform u. **It is overwritten.**
        tau: temperature above 0; a tensor on the device of the logits is not read by the host.

    Returns: relaxed codes [B, V, h, w], which add up to 1; Kullback-Leibler divergence [B, h, w] from p to 1/V.

    Memory: logits, result, and for intermediate values one tensor of their size at a time. With noise and gradients the
        peak is 5 such tensors beside the logits, where the expressions above take 7.

    Source: Jang et al., 2017; Maddison et al., 2017 (the Gumbel-softmax); Ramesh et al., 2021 (DALL-E), section 2.1.
    """
    return _Relax.apply(logits, gumbel, tau)


class _Relax(Function):
    @staticmethod
    def forward(ctx, logits, gumbel, tau):
        relaxed = gumbel.add_(logits).div_(tau).softmax(1)
        log_p = logits.log_softmax(1)
        entropy = (log_p.exp() * log_p).sum(1).neg_()
        ctx.save_for_backward(logits, relaxed, entropy, tau if isinstance(tau, Tensor) else None)
        ctx.tau = None if isinstance(tau, Tensor) else tau
        return relaxed, math.log(logits.shape[1]) - entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_relaxed, d_kl):
        logits, relaxed, entropy, tau = ctx.saved_tensors
        product = d_relaxed * relaxed
        grad = product.sub_(product.sum(1, keepdim=True) * relaxed).div_(ctx.tau if tau is None else tau)
        log_p = logits.log_softmax(1)
        grad.addcmul_(log_p.exp(), log_p.add_(entropy[:, None]).mul_(d_kl[:, None]))
        return grad, None, None
