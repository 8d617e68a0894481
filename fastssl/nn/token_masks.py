"""Masked language modelling: which tokens are masked, by what, and the distilled loss on the masked ones alone."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops.dispatch import acc_dtype

from .bert import CLS, MASK, PAD

IGNORED = -100  # the target of a row without a loss


def mask_tokens(ids: Tensor, noise: Tensor, probability: float, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Masks tokens as BERT does: 80 of 100 become [MASK], 10 a random token of the whole vocabulary, 10 stay.

    Args:
        ids: [B, L] int64; [PAD] and [CLS] are never masked.
        noise: [B, L, 3] uniform in [0, 1): whether a token is masked, by what, and by which random token.
        probability: share of masked tokens.
        vocabulary: number of tokens.

    Returns: (ids with masks [B, L], masked [B, L] bool).

    Source: Devlin et al., "BERT", 2019, section 3.1, task 1.
    """
    chance, kind, word = noise.unbind(2)
    masked = (chance < probability) & (ids != PAD) & (ids != CLS)
    other = (word * vocabulary).long().clamp_(max=vocabulary - 1)
    replaced = torch.where(kind < 0.8, MASK, torch.where(kind < 0.9, other, ids))
    return torch.where(masked, replaced, ids), masked


def masked_positions(targets: Tensor, probability: float) -> Tensor:
    """Positions of the masked tokens in the flat batch.

    On a CPU they are these alone. Elsewhere, and in torch.compile, the host does not wait for their number: there are 8
    standard deviations more than expected, so that a batch with more, of which the last would be left out, does not
    occur in 10¹⁴ batches. Positions of tokens that are not masked fill the rest.

    Args:
        targets: [B, L] int64, −100 where a token is not masked.
        probability: that of a token to be masked.

    Returns: [C] int64, the masked ones first, at least one position.
    """
    is_free = (targets.flatten() == IGNORED).byte()
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        count = max(len(is_free) - int(is_free.sum()), 1)
    else:
        count = most_masked(len(is_free), probability)
    return is_free.argsort(stable=True)[:count]


def most_masked(tokens: int, probability: float) -> int:
    """The number of positions that `masked_positions` returns where it does not count them."""
    expected = tokens * probability
    return min(tokens, math.ceil(expected + 8 * math.sqrt(expected)) + 8)


def distilled_token_loss(logits: Tensor, twin: Tensor | None, targets: Tensor, alpha: float | Tensor) -> Tensor:
    """Mean over rows of the cross entropy against the true tokens, mixed with that against the twin's softmax.

    Args:
        logits: [C, V] floating. Gradient.
        twin: [C, V] floating, the momentum encoder's logits; None for the true tokens alone, whatever α.
        targets: [C] int64, −100 for a row without a loss.
        alpha: share α of the twin's softmax in the targets.

    Returns: scalar in float32 (float64 for float64), 0 without any target.

    Source: Li et al., 2021 (ALBEF), equation 7.
    """
    dtype = acc_dtype(logits)
    used = targets != IGNORED
    log_p = logits.to(dtype).log_softmax(1)
    hard = F.nll_loss(log_p, targets, ignore_index=IGNORED, reduction="sum")
    if twin is None:
        return hard / used.sum().clamp(min=1)
    soft = -((twin.detach().to(dtype).softmax(1) * log_p).sum(1) * used).sum()
    return ((1 - alpha) * hard + alpha * soft) / used.sum().clamp(min=1)
