"""Weighted k-nearest-neighbour classification on frozen features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import all_gather, all_gather_object

from .features import all_gather_uneven

TILE = 1024  # rows of queries and of the bank in one matrix product, which bounds memory
LOW = 2**32 - 1  # lower half of a key, and the largest tag
NONE = -(2**63)  # key of a missing neighbour


@torch.no_grad()
def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    ks: Sequence[int] = (10, 20, 200),
    tau: float = 0.07,
) -> dict[int, float]:
    """{k: accuracy} of weighted kNN: the k bank features nearest to a query by cosine vote with weights exp(cos / τ).

    Among equally near features those with smaller labels vote, so that the result does not depend on the order of the
    bank. On several ranks each passes its part of bank and queries, of any size, and all get the accuracy of the
    whole: queries are gathered, the bank is not, and the k nearest of all ranks are merged.

    Args:
        bank: [N, F], queries: [M, F], floating point, on one device; computed in float32. bank_labels: [N],
            0 … 2³² − 1, labels: [M], int64.
        ks: numbers of neighbours, all from one search; at most N are used.
        tau: temperature of the votes.

    Raises:
        ValueError: no features, or some that are not finite, a negative bank label, a k below 1, or τ not above 0.

    Memory: TILE × (TILE + k) keys of 8 bytes and the votes of a tile beside copies of bank and, on ranks, queries.
    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018, section 3.4.
    """
    if not ks or min(ks) < 1 or not tau > 0:
        raise ValueError(f"knn: ks must be at least 1 and tau > 0, got {tuple(ks)} and {tau}")
    invalid = not bank.isfinite().all() or not queries.isfinite().all() or bool((bank_labels < 0).any())
    largest = max((int(column.max()) for column in (bank_labels, labels) if len(column)), default=0)
    banks, counts, invalid_parts, classes = zip(*all_gather_object((len(bank), len(queries), invalid, largest)))
    if any(invalid_parts) or not sum(banks) or not sum(counts):
        detail = ", some of which are not" if any(invalid_parts) else ""
        raise ValueError(
            f"knn: bank and queries must be finite features, bank labels at least 0, got {sum(banks)} "
            f"features and {sum(counts)} queries{detail}"
        )
    queries, labels = all_gather_uneven(queries), all_gather_uneven(labels)
    bank, largest_k = F.normalize(bank.float(), dim=1), min(max(ks), sum(banks))
    correct = {k: torch.zeros((), dtype=torch.int64, device=bank.device) for k in ks}
    for tile, tile_labels in zip(queries.split(TILE), labels.split(TILE)):
        keys = _merge_ranks(_nearest(bank, bank_labels, F.normalize(tile.float(), dim=1), largest_k))
        cosine, voters = _unpack(keys)
        weights = ((cosine - cosine[:, :1]) / tau).exp()  # minus the largest: no overflow, and not all 0
        for k in correct:
            correct[k] += (_vote(voters[:, :k], weights[:, :k], max(classes) + 1) == tile_labels).sum()
    return {k: int(hits) / len(queries) for k, hits in correct.items()}


@torch.no_grad()
def nearest(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """Rows [M, k] of the bank nearest to each query by cosine, nearest first; among equally near ones the earlier.

    At most N are returned. For one process.
    """
    bank, rows = F.normalize(bank.float(), dim=1), torch.arange(len(bank), device=bank.device)
    k = min(k, len(bank))
    tiles = (_nearest(bank, rows, F.normalize(tile.float(), dim=1), k) for tile in queries.split(TILE))
    return torch.cat([_unpack(keys)[1] for keys in tiles])


@torch.no_grad()
def nearest_on_all_ranks(bank: Tensor, tags: Tensor, queries: Tensor, k: int) -> Tensor:
    """Tags [M, k] of the features of all ranks' banks nearest to each query by cosine, nearest first.

    Among equally near ones the smaller tag comes first. Each rank passes its part of bank and queries, of any size; all
    get the rows of all queries, in rank order. Queries are gathered, the bank is not. At most N tags are returned.

    Args:
        bank: [N, F], queries: [M, F], floating point; computed in float32.
        tags: [N] int64, 0 … 2³² − 1, one of each row of the bank.
        k: most neighbours of a query.

    Raises:
        ValueError: features are not finite.

    Memory: TILE × (TILE + k) keys of 8 bytes and what is returned, beside copies of bank and, on ranks, queries.
    """
    parts = all_gather_object((len(bank), bool(bank.isfinite().all() and queries.isfinite().all())))
    if not all(finite for _, finite in parts):
        raise ValueError("eval: features must be finite, some of them are not")
    bank, k = F.normalize(bank.float(), dim=1), min(k, sum(count for count, _ in parts))
    tiles = all_gather_uneven(queries).split(TILE)
    keys = (_merge_ranks(_nearest(bank, tags, F.normalize(tile.float(), dim=1), k)) for tile in tiles)
    return torch.cat([_unpack(tile)[1] for tile in keys])


def _nearest(bank: Tensor, tags: Tensor, queries: Tensor, k: int) -> Tensor:
    """Keys [T, k] int64 of the nearest rows of the bank [N, F], descending; `NONE` where N < k.

    A key has the cosine in its upper half and the row's tag in its lower half, a smaller tag being better. Keys have no
    ties, so the neighbours depend on neither tiles nor ranks.
    """
    best = torch.full((len(queries), k), NONE, device=queries.device)
    for features, tag in zip(bank.split(TILE), tags.split(TILE)):
        bits = (queries @ features.T).add_(0.0).view(torch.int32)  # + 0 makes −0 of the products 0
        ordered = bits ^ (bits >> 31 & 0x7FFFFFFF)  # integers that sort as the floats do
        keys = ordered.long().bitwise_left_shift_(32).add_(LOW - tag)
        best = torch.cat([best, keys], dim=1).topk(k, dim=1).values
    return best


def _merge_ranks(keys: Tensor) -> Tensor:
    """The best k of all ranks' keys [T, k] for the same queries."""
    gathered = all_gather(keys.T.contiguous()).T  # [T, world · k]
    return gathered.topk(keys.shape[1], dim=1).values if gathered.shape != keys.shape else keys


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(cosine float32, tag int64) of keys."""
    ordered = (keys >> 32).int()
    return (ordered ^ (ordered >> 31 & 0x7FFFFFFF)).view(torch.float32), LOW - (keys & LOW)


def _vote(voters: Tensor, weights: Tensor, classes: int) -> Tensor:
    """Class [T] with the largest sum of weights among voters [T, k]; in chunks of queries if there are many classes."""
    rows = max(1, TILE * TILE // classes)
    return torch.cat(
        [
            weight.new_zeros(len(voter), classes).scatter_add_(1, voter, weight).argmax(1)
            for voter, weight in zip(voters.split(rows), weights.split(rows))
        ]
    )
