"""Clusters of the images of an epoch, for methods that cluster between epochs."""

from typing import Any

import torch
from torch import Tensor

UNKNOWN = -100  # cluster of an image that could not be decoded, or that the epoch left out


def clusters_of(assignments: Tensor, index: Tensor) -> Tensor:
    """The clusters [..., B] of images [B], of the assignments [..., images]; `UNKNOWN` for images that have none."""
    images = assignments.shape[-1]
    if not images:  # not clustered yet
        return assignments.new_full((*assignments.shape[:-1], len(index)), UNKNOWN)
    return torch.where(index < images, assignments[..., index.clamp(max=images - 1)], UNKNOWN)


def fit_assignments(module: Any, state: dict, prefix: str, *rest) -> None:
    """Hook before a state dict is loaded: the buffer `assignments` takes the number of images of the state."""
    stored, own = state.get(f"{prefix}assignments"), module.assignments
    if stored is not None and stored.ndim == own.ndim and stored.shape[:-1] == own.shape[:-1]:
        module.assignments = own.new_full(stored.shape, UNKNOWN)
