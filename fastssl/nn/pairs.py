"""Pairs of images and texts: a queue of both, the contrast distilled from momentum encoders, hard negatives (ALBEF)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops import PrototypeTargets, check, linear_cross_entropy, prototype_lse, soft_cross_entropy

from .queue import KeyQueue

LEAST_WEIGHT = 1e-4  # added to the probability of each negative, so that there is one to draw in every row


class PairQueue(KeyQueue):
    """A queue of the last K pairs of keys, of images and of texts, of all ranks.

    A pair is one row [image | text] of `queue` [K, 2·D], so both have one pointer, and a pair with a value that is not
    finite is left out whole. In state dicts the names and layouts are ALBEF's: `image_queue` and `text_queue` [D, K],
    `queue_ptr` [1].

    Args:
        dim: width D of a key.
        queue_size: number of pairs K, at first random unit vectors.

    Source: Li et al., 2021 (ALBEF), section 3.2, and its code.
    """

    def __init__(self, dim: int, queue_size: int):
        super().__init__(2 * dim, queue_size)
        halves = F.normalize(self.queue.unflatten(1, (2, dim)), dim=2)
        self.queue.copy_(halves.flatten(1))
        self.register_state_dict_post_hook(_save)
        self.register_load_state_dict_pre_hook(_load)

    def columns(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Keys of images and of texts [B + K, D]: those given [B, D], then the queue's."""
        pairs = torch.cat([torch.cat([images, texts], dim=1).to(self.queue.dtype), self.queue])
        image_keys, text_keys = pairs.chunk(2, dim=1)
        return image_keys, text_keys


def _save(module: PairQueue, state: dict, prefix: str, metadata: dict) -> None:
    """After `KeyQueue` has saved the queue as [2·D, K]."""
    images, texts = state.pop(f"{prefix}queue").chunk(2)
    state |= {f"{prefix}image_queue": images.contiguous(), f"{prefix}text_queue": texts.contiguous()}


def _load(module: PairQueue, state: dict, prefix: str, *_) -> None:
    names = f"{prefix}image_queue", f"{prefix}text_queue"
    if all(name in state for name in names):
        state[f"{prefix}queue"] = torch.cat([state.pop(name) for name in names]).T.contiguous()


def distilled_contrast(student: Tensor, twin: Tensor, keys: Tensor, tau: Tensor, alpha: float | Tensor) -> Tensor:
    """Cross entropy of each row's softmax over keys, against that of its momentum twin mixed with its own key.

    Equals ``logits = student @ keys.T / tau``, ``targets = alpha * (twin @ keys.T / tau).softmax(1)``, in which
    ``1 - alpha`` is added to the entry of key i in row i, and ``F.cross_entropy(logits, targets)``, with targets that
    have no gradient.

    Args:
        student: [B, D] floating, unit vectors. Gradient.
        twin: [B, D] floating, the same rows by the momentum encoder.
        keys: [M, D] floating, M ≥ B; the first B are those of the rows.
        tau: temperature, a 0-dim tensor. Gradient, from the student's logits alone.
        alpha: share α of the twin's softmax in the targets.

    Returns: the mean over rows, a scalar in float32 (float64 for float64).

    Raises:
        ValueError: a shape does not fit.

    Memory: no logits where `ops.soft_cross_entropy` has a kernel.

    Source: Li et al., 2021 (ALBEF), equation 6.
    """
    name, batch = "distilled_contrast", student.shape[0]
    check.tensor(name, "student", student, "B D")
    check.tensor(name, "twin", twin, "B D", B=batch, D=student.shape[1])
    check.tensor(name, "keys", keys, "M D", D=student.shape[1])
    if keys.shape[0] < batch:
        raise ValueError(f"{name}: keys must begin with those of the {batch} rows, got {keys.shape[0]} keys")
    twin, keys, constant = twin.detach(), keys.detach(), tau.detach()
    twin_keys, twin_tau = keys.detach(), tau.detach()  # torch.compile takes no tensor twice
    scaled = student * (constant / tau)  # unchanged, and the way of the gradient to tau, which the ops do not have
    mass = prototype_lse(twin, keys, constant)
    targets = PrototypeTargets(twin, twin_keys, twin_tau, -mass, mass.new_zeros(keys.shape[0]))
    soft = soft_cross_entropy(scaled, keys, constant, targets)
    hard = linear_cross_entropy(scaled, keys, constant, torch.arange(batch, device=keys.device))
    return (alpha * soft + (1 - alpha) * hard).mean()


@torch.no_grad()
def hard_negatives(queries: Tensor, keys: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
    """For each query the number of another row's key, drawn with the probabilities of a softmax over similarities.

    The draw is the inverse of the cumulative weights at one uniform number, without a wait of the host. A softmax that
    gives its own key everything leaves no weight to draw from: each negative's is raised by 0.0001.

    Args:
        queries: [B, D] floating. keys: [B, D], B ≥ 2; key i is the positive of query i.
        tau: temperature, a 0-dim tensor.
        noise: [B] floating, uniform in [0, 1).

    Returns: [B] int64, never a row's own number.

    Raises:
        ValueError: there are fewer than two rows.

    Source: Li et al., 2021 (ALBEF), section 3.2, "image-text matching", and its code.
    """
    if queries.shape[0] < 2:
        raise ValueError(f"hard_negatives: queries must have at least two rows, got {queries.shape[0]}")
    weights = negative_weights(queries, keys, tau).cumsum(1)
    drawn = noise.double()[:, None] * weights[:, -1:]
    return torch.searchsorted(weights, drawn, right=True)[:, 0]


@torch.no_grad()
def negative_weights(queries: Tensor, keys: Tensor, tau: Tensor) -> Tensor:
    """The weights [B, B] float64 by which `hard_negatives` draws; 0 on the diagonal."""
    weights = (queries.double() @ keys.double().T / tau.double()).softmax(1)
    weights = weights.nan_to_num(0.0)  # of a step that will be skipped, and must not fail before
    return (weights + LEAST_WEIGHT).fill_diagonal_(0)
