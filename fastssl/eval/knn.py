"""Weighted k-nearest-neighbour classification on frozen features."""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 1024  # queries at a time: memory is TILE × bank, never queries × bank


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 20, tau: float = 0.07
) -> float:
    """Share of the queries whose k nearest bank features, by cosine, vote for their label with weights exp(cos / τ).

    Args:
        bank: [N, F], queries: [M, F], floating, on one device. bank_labels: [N], labels: [M] int64, ≥ 0.
        k: neighbours, cut to N.
        tau: temperature of the votes.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018, section 3.4.
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    classes = int(torch.maximum(bank_labels.max(), labels.max())) + 1
    right = 0
    for tile, wanted in zip(queries.split(TILE), labels.split(TILE)):
        cosine, nearest = (tile @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = cosine.new_zeros(len(tile), classes)
        votes.scatter_add_(1, bank_labels[nearest], ((cosine - 1) / tau).exp())  # −1: the same votes, no overflow
        right += int((votes.argmax(1) == wanted).sum())
    return right / len(queries)


def nearest(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """[M, k] rows of the bank nearest to each query by cosine, nearest first."""
    return (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(min(k, len(bank)), dim=1).indices
