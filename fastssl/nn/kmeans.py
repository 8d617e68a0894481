"""k-means over the rows of all ranks, and the whitening before it, for methods that cluster between epochs.

Every rank holds some of the rows, any number of them, and calls these functions together with the others. Sums over
clusters are one `index_add_` a round, without a loop over clusters, and one all-reduce.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import all_gather, all_gather_object, all_sum, rank
from fastssl.ops.dispatch import acc_dtype

PRODUCTS = 2**24  # distances that exist at once: 64 MB in float32
SPLIT = 1 / 1024  # relative distance from each other of two centroids that one cluster is divided between


@torch.no_grad()
def k_means(x: Tensor, centroids: Tensor, rounds: int, spherical: bool = True) -> tuple[Tensor, Tensor]:
    """Centroids [K, D] of the rows of all ranks, and the nearest centroid of each row of this rank [M] int64.

    Spherical: nearest is the largest dot product, centroids are unit vectors, and one without rows stays where it was.
    Otherwise: nearest is the smallest Euclidean distance, and a centroid without rows is put beside that of a large
    cluster, which the two then divide. Ties go to the first centroid.

    Args:
        x: rows of this rank [M, D], any floating dtype; computed in float32 (float64 for float64), under autocast too.
        centroids: initial centroids [K, D], equal on all ranks, for instance of `random_rows`.
        rounds: number of rounds of assignment and means; a last assignment follows.
        spherical: cluster directions instead of positions.

    Raises:
        ValueError: rounds is less than 1, or shapes do not fit.

    Memory: O(M + K·D) and a tile of 16 M products.

    Source: Caron et al., 2020 (SwAV), appendix on DeepCluster-v2, and its code; Caron et al., 2018 (DeepCluster),
        section 3.3, "Avoiding trivial solutions".
    """
    if rounds < 1:
        raise ValueError(f"k_means: rounds must be at least 1, got {rounds}")
    if x.ndim != 2 or centroids.ndim != 2 or x.shape[1] != centroids.shape[1]:
        raise ValueError(
            f"k_means: x and centroids must be [M, D] and [K, D], got {list(x.shape)} and {list(centroids.shape)}"
        )
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(acc_dtype(x))
        centroids = centroids.to(x.dtype)
        for _ in range(rounds):
            means, counts = _means(x, nearest_centroid(x, centroids, spherical), centroids)
            centroids = F.normalize(means, dim=1) if spherical else _divide_large_clusters(means, counts)
        return centroids, nearest_centroid(x, centroids, spherical)


def nearest_centroid(x: Tensor, centroids: Tensor, spherical: bool = True) -> Tensor:
    """Number [M] int64 of the nearest of the centroids [K, D] of each row [M, D], as in `k_means`."""
    half = None if spherical else centroids.square().sum(1) / 2
    parts = []
    for tile in x.split(max(1, PRODUCTS // max(1, len(centroids)))):
        products = tile @ centroids.T
        parts.append((products if half is None else products - half).argmax(1))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=x.device)


def _means(x: Tensor, nearest: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Means [K, D] of the rows of each cluster on all ranks, centroids where there are none, and their number [K]."""
    sums = torch.cat([torch.zeros_like(centroids), centroids.new_zeros(len(centroids), 1)], 1)
    sums.index_add_(0, nearest, torch.cat([x, x.new_ones(len(x), 1)], 1))
    sums = all_sum(sums)
    counts = sums[:, -1]
    return torch.where(counts[:, None] > 0, sums[:, :-1] / counts.clamp(min=1)[:, None], centroids), counts


def _divide_large_clusters(centroids: Tensor, counts: Tensor) -> Tensor:
    """Centroids of which those without rows stand beside those of the largest clusters, one on either side."""
    empty = (counts == 0).nonzero().flatten()
    if not len(empty):
        return centroids
    order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    donors = order[torch.arange(len(empty), device=order.device) % len(order)]
    step = centroids.new_full((centroids.shape[1],), SPLIT)
    step[1::2] *= -1
    centroids = centroids.clone()
    centroids[empty] = centroids[donors] * (1 + step)
    centroids[donors] = centroids[donors] * (1 - step)
    return centroids


@torch.no_grad()
def random_rows(x: Tensor, count: int, numbers: Tensor | None = None) -> Tensor:
    """`count` different rows of the rows [M, D] of all ranks, drawn by the first rank from torch's global generator.

    Equal on all ranks.

    Args:
        x: rows of this rank.
        count: number of rows to draw.
        numbers: number [M] int64 of each row among the rows of all ranks, from 0 on; by default rank by rank.

    Raises:
        ValueError: there are fewer rows.
    """
    sizes = all_gather_object(len(x))
    if sum(sizes) < count:
        raise ValueError(f"random_rows: count must be at most the {sum(sizes)} rows, got {count}")
    if numbers is None:
        numbers = torch.arange(len(x), device=x.device) + sum(sizes[: rank()])
    drawn = all_gather(torch.randperm(sum(sizes))[:count].to(x.device))[:count]
    place = torch.full((sum(sizes),), -1, device=x.device)
    place[drawn] = torch.arange(count, device=x.device)
    own = place[numbers]
    rows = x.new_zeros(count, x.shape[1])
    rows[own[own >= 0]] = x[own >= 0]
    return all_sum(rows)


@torch.no_grad()
def whitened(x: Tensor, dim: int) -> Tensor:
    """Unit vectors [M, dim] of rows [M, D]: their first principal components, each divided by its standard deviation,
    over the rows of all ranks.

    Components whose variance is a billionth of the largest or less are 0.

    Raises:
        ValueError: dim is larger than D.

    Source: Caron et al., 2018 (DeepCluster), section 4.1 and its code, with PCA of faiss.
    """
    if dim > x.shape[1]:
        raise ValueError(f"whitened: dim must be at most the width {x.shape[1]}, got {dim}")
    with torch.autocast(x.device.type, enabled=False):
        y = x.double()
        count = all_sum(torch.tensor(float(len(y)), dtype=y.dtype, device=y.device))
        y = y - all_sum(y.sum(0)) / count
        variances, directions = torch.linalg.eigh(all_sum(y.T @ y) / count)
        variances, directions = variances.flip(0)[:dim], directions.flip(1)[:, :dim]
        scale = torch.where(variances > 1e-9 * variances[0], variances.clamp(min=1e-300).rsqrt(), 0.0)
        return F.normalize(y @ directions * scale, dim=1).to(acc_dtype(x))
