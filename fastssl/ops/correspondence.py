"""The dense correspondence of two views (DenseCL): for each place of one, the most similar place of the other.

It needs no kernel of its own: no gradient passes through it, so torch.bmm and argmax over a few images at a time hold
neither features in another dtype nor similarities of the whole batch, and its product is a thousandth of the encoder's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import check
from .dispatch import acc_dtype, fake, op

IMAGES = 32  # at a time: 2,048 features of 49 places of 32 images take 13 MB in float32


def dense_match(q: Tensor, k: Tensor) -> Tensor:
    """For each place of q the place of k with the largest cosine, image by image.

    Equals ``(F.normalize(q, dim=1).mT @ F.normalize(k, dim=1)).argmax(2)``; the first place where several are equally
    similar. The length of a query's features does not matter. DenseCL passes the maps of both backbones, before their
    heads.

    Args:
        q: [B, C, S] any floating dtype, features of S places of an image.
        k: [B, C, R] features of R ≥ 1 places of the same image.

    Returns: index [B, S] int64 of places of k, from 0 to R − 1. No gradient. Computed in float32, in float64 for
        float64 features, also under autocast.

    Raises:
        ValueError: a shape or device does not fit, or k has no places. TypeError: an argument is not floating.

    Memory: similarities [32, S, R] and both features of 32 images in float32, whatever B.

    Source: Wang et al., "Dense Contrastive Learning for Self-Supervised Visual Pre-Training", 2021, section 3.4.
    """
    check.tensor("dense_match", "q", q, "B C S")
    check.tensor("dense_match", "k", k, "B C R", B=q.shape[0], C=q.shape[1])
    check.floating("dense_match", q=q, k=k)
    check.same_device("dense_match", q=q, k=k)
    if k.shape[2] == 0:
        check.fail("dense_match", f"k must have at least one place, got shape {list(k.shape)}")
    return _dense_match(q.detach(), k.detach())


@op("dense_match")
def _dense_match(q: Tensor, k: Tensor) -> Tensor:
    dtype = acc_dtype(q)
    index = torch.empty(q.shape[0], q.shape[2], dtype=torch.int64, device=q.device)
    for q_part, k_part, out in zip(q.split(IMAGES), k.split(IMAGES), index.split(IMAGES)):
        out.copy_((q_part.to(dtype).mT @ F.normalize(k_part.to(dtype), dim=1)).argmax(2))
    return index


@fake(_dense_match)
def _(q, k):
    return q.new_empty(q.shape[0], q.shape[2], dtype=torch.int64)
