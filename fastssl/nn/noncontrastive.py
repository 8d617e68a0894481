"""Losses without negatives: cosine similarity (BYOL, SimSiam) and redundancy reduction (Barlow Twins, VICReg)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.distributed import all_gather, all_sum, world_size
from fastssl.ops.dispatch import acc_dtype, first_order, without_autocast

COMPARED = 64  # most dimensions that `redundancy` compares


class NegativeCosineSimilarity(nn.Module):
    """``loss = criterion(p, z)``: minus the mean cosine similarity of rows. Replaces lightly's of the same name.

    BYOL's loss of one direction is 2 + 2 times this, with z detached.

    Args:
        dim: dimension of the vectors.
        eps: smallest product of two norms that a cosine is divided by.

    Source: Chen and He, 2021 (SimSiam), equation 1; Grill et al., 2020 (BYOL), equation 2.
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8):
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, p: Tensor, z: Tensor) -> Tensor:
        """A scalar in [−1, 1], float32 (float64 for float64), of p and z [B, D]; gradient to both.

        Raises:
            ValueError: the shapes differ.
        """
        if p.shape != z.shape:
            raise ValueError(
                f"NegativeCosineSimilarity: p and z must have one shape, got {list(p.shape)} and {list(z.shape)}"
            )
        return -F.cosine_similarity(p.to(acc_dtype(p)), z.to(acc_dtype(z)), self.dim, self.eps).mean()


class BarlowTwinsLoss(nn.Module):
    """``loss = criterion(z1, z2)``. Replaces lightly's of the same name.

    The cross-correlation matrix of the two views' standardised dimensions becomes the identity:
    Σ_i (c_ii − 1)² + λ Σ_{i≠j} c_ij². Memory is O(min(N, D)²), see `squared_cross_product`.

    Args:
        redundancy_weight: λ, the weight of the elements off the diagonal; lightly's `lambda_param`.
        gather: correlate over the batches of all ranks, which must have the same size.
        gradient_ranks: the gradient is divided by this number. The reference code divides it by its number of ranks,
            since its sum over ranks has no gradient; learning rates of biases and norms were tuned with 16.
        eps: added to variances.

    Raises:
        ValueError: gradient_ranks is less than 1.

    Source: Zbontar et al., 2021, equation 1 and algorithm 1.
    """

    def __init__(
        self, redundancy_weight: float = 0.005, gather: bool = False, gradient_ranks: int = 1, eps: float = 1e-5
    ):
        super().__init__()
        if gradient_ranks < 1:
            raise ValueError(f"BarlowTwinsLoss: gradient_ranks must be at least 1, got {gradient_ranks}")
        self.redundancy_weight, self.gather = redundancy_weight, gather
        self.gradient_ranks, self.eps = gradient_ranks, eps

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """A scalar, float32 (float64 for float64), of the views' embeddings [B, D], B ≥ 2; gradient to both.

        Raises:
            ValueError: the shapes differ, or there is a single row.
        """
        _check_views("BarlowTwinsLoss", z1, z2, self.gather)
        a, b = (self._standardise(z) for z in (z1, z2))
        return self.of_standardised(a, b)

    def of_standardised(self, a: Tensor, b: Tensor) -> Tensor:
        """The loss of embeddings [B, D] that a batch norm without weight and bias has standardised."""
        a, b = a.to(acc_dtype(a)), b.to(acc_dtype(b))
        count = a.shape[0] * (world_size() if self.gather else 1)
        diagonal = self._sum((a * b).sum(0)) / count
        squares = squared_cross_product(a, b, self.gather) / count**2
        off_diagonal = squares - diagonal.square().sum()
        loss = (diagonal - 1).square().sum() + self.redundancy_weight * off_diagonal
        if self.gradient_ranks == 1:
            return loss
        scaled = loss / self.gradient_ranks
        return scaled + (loss - scaled).detach()

    def _standardise(self, z: Tensor) -> Tensor:
        centred, variance = _centre(z, self.gather, correction=0)
        return centred * (variance + self.eps).rsqrt()

    def _sum(self, x: Tensor) -> Tensor:
        return all_sum(x) if self.gather else x


class VICRegLoss(nn.Module):
    """``loss = criterion(z1, z2)``. Replaces lightly's of the same name.

    Args:
        sim_weight: weight of the invariance: the mean squared difference of the views; lightly's `lambda_param`.
        std_weight: weight of the variance: mean of relu(1 − σ) over dimensions; lightly's `mu_param`.
        cov_weight: weight of the covariance: squares off the diagonal, by dimension; lightly's `nu_param`.
        halve_std: take half of the variance term of each view, as the official code does; the paper adds them.
        gather: take variance and covariance over the batches of all ranks, which must have the same size.
        eps: added to variances.

    Source: Bardes et al., 2022, equations 1 to 6, and its code.
    """

    def __init__(
        self,
        sim_weight: float = 25.0,
        std_weight: float = 25.0,
        cov_weight: float = 1.0,
        halve_std: bool = True,
        gather: bool = False,
        eps: float = 1e-4,
    ):
        super().__init__()
        self.sim_weight, self.std_weight, self.cov_weight = sim_weight, std_weight, cov_weight
        self.halve_std, self.gather, self.eps = halve_std, gather, eps

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """A scalar, float32 (float64 for float64), of the views' embeddings [B, D], B ≥ 2; gradient to both.

        Raises:
            ValueError: the shapes differ, or there is a single row.
        """
        return self.weighted(*self.terms(z1, z2))

    def weighted(self, sim: Tensor, std: Tensor, cov: Tensor) -> Tensor:
        """The loss of its three terms."""
        return self.sim_weight * sim + self.std_weight * std + self.cov_weight * cov

    def terms(self, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Invariance of this rank's rows, variance and covariance: scalars without their weights."""
        _check_views("VICRegLoss", z1, z2, self.gather)
        z1, z2 = z1.to(acc_dtype(z1)), z2.to(acc_dtype(z2))
        (std1, cov1), (std2, cov2) = (self._std_and_cov(z) for z in (z1, z2))
        std = (std1 + std2) / 2 if self.halve_std else std1 + std2
        return F.mse_loss(z1, z2), std, cov1 + cov2

    def _std_and_cov(self, z: Tensor) -> tuple[Tensor, Tensor]:
        centred, variance = _centre(z, self.gather, correction=1)
        count = z.shape[0] * (world_size() if self.gather else 1)
        std = F.relu(1 - (variance + self.eps).sqrt()).mean()
        squares = squared_cross_product(centred, None, self.gather) / (count - 1) ** 2
        return std, (squares - variance.square().sum()) / z.shape[1]


@torch.no_grad()
def redundancy(*views: Tensor) -> Tensor:
    """Mean squared correlation of two dimensions of the embeddings, less what chance gives: at most 1.

    Near 0 each dimension has something of its own; at 1 all say the same. It is the mean over the views of
    1 − (1 − c²)·(B − 1) / (B − 2), which adjusts c², the mean square off the diagonal of a view's correlation matrix,
    as R² is adjusted for B rows. By chance it is about 0, and may lie below.

    Args:
        views: embeddings [B, D] of each view, of this rank; the first `COMPARED` dimensions stand for all.

    Returns: a scalar, float32 (float64 for float64), without gradient; NaN of fewer than 3 rows or 2 dimensions.
    """
    rows, dim = views[0].shape[0], min(views[0].shape[1], COMPARED)
    if rows < 3 or dim < 2:
        return views[0].new_full((), float("nan"), dtype=acc_dtype(views[0]))
    with without_autocast(views[0]):
        squares = torch.stack([_correlations(view[:, :dim]).square().sum() for view in views]).mean()
    return 1 - (1 - squares / (dim * (dim - 1))) * (rows - 1) / (rows - 2)


def _correlations(z: Tensor) -> Tensor:
    """Correlations [D, D] of different columns of z [B, D]; 0 on the diagonal, and of a column that is constant but for
    rounding. `torch.corrcoef` reads a value on the host, so that neither torch.compile nor a CUDA graph can take it."""
    z = z.to(acc_dtype(z))
    centred = z - z.mean(0)
    length = torch.linalg.vector_norm(centred, dim=0)
    rounding = z.shape[0] * torch.finfo(z.dtype).eps * z.abs().amax(0)
    unit = torch.where(length > rounding, centred / length, 0)
    return (unit.T @ unit).fill_diagonal_(0)


def _check_views(name: str, z1: Tensor, z2: Tensor, gather: bool) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"{name}: z1 and z2 must have one shape [B, D], got {list(z1.shape)} and {list(z2.shape)}")
    rows = z1.shape[0] * (world_size() if gather else 1)
    if rows < 2:
        raise ValueError(f"{name}: there must be at least 2 rows, over which a variance is taken, got {rows}")


def _centre(z: Tensor, gather: bool, correction: int) -> tuple[Tensor, Tensor]:
    """z [B, D] minus the mean of its dimensions, and their variance [D], of this rank's rows or with `gather` all."""
    sum_ranks, world = (all_sum, world_size()) if gather else (lambda x: x, 1)
    z, count = z.to(acc_dtype(z)), z.shape[0] * world
    centred = z - sum_ranks(z.sum(0)) / count
    return centred, sum_ranks(centred.square().sum(0)) / (count - correction)


def squared_cross_product(a: Tensor, b: Tensor | None = None, gather: bool = False) -> Tensor:
    """‖AᵀB‖², the sum of the squares of AᵀB, over the rows of this rank or with `gather` of all ranks.

    It is ⟨AAᵀ, BBᵀ⟩ too, which takes fewer operations and less memory where there are fewer rows than dimensions. The
    cheaper form is chosen; neither needs a collective in the backward pass but for one number.

    Args:
        a: [B, D] float32 or float64. Gradient.
        b: [B, D] of the same dtype; `a` itself if None. Gradient.
        gather: over the rows of all ranks, each of which has B.

    Returns: a scalar, the same on all ranks; its gradient is that of the sum of all ranks' results.

    Memory: N × N, with B rows of it on each rank, for N rows in all where 4·N < 3·D; else D × D.
    """
    gather = gather and world_size() > 1
    rows = a.shape[0] * (world_size() if gather else 1)
    return _SquaredCrossProduct.apply(a, b, gather, uses_gram(rows, a.shape[1]))


def uses_gram(rows: int, dim: int) -> bool:
    """Whether the products of rows take fewer operations: 8·B·N·D, forward and backward, against 6·B·D²."""
    return 4 * rows < 3 * dim


class _SquaredCrossProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, gather, gram):
        ctx.gather, ctx.gram, ctx.same = gather, gram, b is None
        b = a if b is None else b
        with without_autocast(a):
            if gram:  # this rank's rows of AAᵀ and BBᵀ
                all_a = all_gather(a) if gather else a
                all_b = all_a if ctx.same else all_gather(b) if gather else b
                grams = [a @ all_a.T]
                grams.append(grams[0] if ctx.same else b @ all_b.T)
                ctx.save_for_backward(all_a, all_b, *grams)
                total = (grams[0] * grams[1]).sum()
                return all_sum(total) if gather else total
            cross = a.T @ b
            cross = all_sum(cross) if gather else cross
            ctx.save_for_backward(a, b, cross)
            return cross.square().sum()

    @staticmethod
    @first_order("squared_cross_product")
    def backward(ctx, dout):
        dout = 2 * (all_sum(dout) if ctx.gather else dout)
        with without_autocast(dout):
            if ctx.gram:
                all_a, all_b, gram_a, gram_b = ctx.saved_tensors
                da, db = lambda: gram_b @ all_a, lambda: gram_a @ all_b
            else:
                a, b, cross = ctx.saved_tensors
                da, db = lambda: b @ cross.T, lambda: a @ cross
            if ctx.same:
                return da().mul_(2 * dout), None, None, None
            needs = ctx.needs_input_grad
            return da().mul_(dout) if needs[0] else None, db().mul_(dout) if needs[1] else None, None, None
