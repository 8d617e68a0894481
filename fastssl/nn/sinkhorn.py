"""Sinkhorn–Knopp: soft assignments of samples to prototypes that use all prototypes equally, in log space."""

import torch
from torch import Tensor, nn

from fastssl.distributed import all_max, all_sum, world_size
from fastssl.ops import check, prototype_lse
from fastssl.ops.dispatch import acc_dtype, autocast_dtype, without_autocast

STORED = 2**25  # largest size in bytes of scores that are kept on a CPU: one product in place of two a round
EXCLUDED = -1e30  # potential of a row that is not counted: finite, so that no difference of potentials is NaN


@torch.no_grad()
def sinkhorn_potentials(
    teacher: Tensor, weight: Tensor, tau: float | Tensor, rounds: int = 3, counted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The two potentials of Sinkhorn–Knopp, without large tensors of scores: sample m is assigned to prototype p by
    ``exp(teacher[m] @ weight[p] / tau + a[m] + b[p])``.

    Equals, for scores s [M, P] / tau of all ranks and a = 0, `rounds` times ``b = -(s + a[:, None]).logsumexp(0)`` and
    ``a = -(s + b).logsumexp(1)``: the reference's divisions of exp(s) by its column and row sums, but for a constant in
    b that a takes back. It ends on the rows: each row of assignments sums to 1. Where exp(s) overflows float32, with
    scores above 88 · tau, potentials do not. They are what `fastssl.ops.soft_cross_entropy` needs.

    Over ranks, columns are summed over the samples of all ranks, whose numbers may differ (0 too): one all-reduce of P
    numbers a round, and one more of their maxima in the first. All ranks must call together.

    Args:
        teacher: the samples [M, D] of this rank, any floating dtype.
        weight: prototypes [P, D], equal on all ranks.
        tau: temperature, ε in SwAV: a number, or a tensor with one element.
        rounds: number of rounds; 3 in SwAV and DINOv2.
        counted: [M] bool, which samples take part; None for all. The others, such as an unfilled part of a queue, get
            the potential −1e30, which makes their assignments 0. Some sample of some rank must be counted.

    Returns: a [M] and b [P], float32 (float64 for float64); no gradient.

    Raises:
        ValueError: rounds is less than 1, tau is not positive, or shapes do not fit.
        TypeError: rounds is not an integer, or counted is not bool.

    Memory: O(M + P) beside the arguments; on a CPU also two tensors of scores [M, P] if one takes at most 32 MB.

    Source: Cuturi, 2013, algorithm 1; Caron et al., 2020 (SwAV), section 3.1.
    """
    _check("sinkhorn_potentials", rounds, tau)
    check.tensor("sinkhorn_potentials", "teacher", teacher, "M D")
    check.tensor("sinkhorn_potentials", "weight", weight, "P D", D=teacher.shape[1])
    teacher, weight = teacher.detach(), weight.detach()
    if counted is not None:
        check.tensor("sinkhorn_potentials", "counted", counted, "M", M=teacher.shape[0])
        if counted.dtype != torch.bool:
            got = check.dtype_name(counted.dtype)
            check.fail("sinkhorn_potentials", f"counted must be bool, got {got}", TypeError)
    dtype = torch.promote_types(acc_dtype(teacher), weight.dtype)
    row = torch.zeros(teacher.shape[0], dtype=dtype, device=teacher.device)
    excluded = torch.full_like(row, EXCLUDED)
    if counted is not None:
        row = torch.where(counted, row, excluded)
    scores = _stored_scores(teacher, weight, tau, dtype)

    def lse(offset: Tensor, dim: int) -> Tensor:
        if scores is None:
            return prototype_lse(teacher, weight, tau, offset, dim=dim)
        return (scores + offset.unsqueeze(1 - dim)).logsumexp(dim)

    column: Tensor | None = None
    for _ in range(rounds):
        column = _add_ranks(lse(row, 0), column)
        row = -lse(column, 1)
        if counted is not None:
            row = torch.where(counted, row, excluded)
    assert column is not None  # there is a round
    return row, column


def _stored_scores(teacher: Tensor, weight: Tensor, tau: float | Tensor, dtype: torch.dtype) -> Tensor | None:
    """The scores [M, P] / tau, of factors in autocast's dtype where it is on; None where `prototype_lse` makes them
    anew, on other devices than CPUs and from `STORED` bytes on."""
    if not teacher.is_cpu or teacher.shape[0] * weight.shape[0] * dtype.itemsize > STORED:
        return None
    factors = autocast_dtype(teacher)
    with without_autocast(teacher):
        teacher, weight = ((x if factors is None else x.to(factors)).to(dtype) for x in (teacher, weight))
        return (teacher @ weight.T).div_(tau)


def _add_ranks(lse: Tensor, earlier: Tensor | None) -> Tensor:
    """The column potential −log Σ_r exp(lse_r) [P], from the log-sums over each rank's samples.

    The sum over ranks needs a shift on which they agree. In the first round it is the largest log-sum. Later it is the
    `earlier` potential: under it column sums were 1 and so rows held at most P, which leaves sums between 1/P and the
    number of samples after the rows were divided.
    """
    if world_size() == 1:
        return -lse
    shift = -all_max(lse).nan_to_num(neginf=0.0) if earlier is None else earlier
    return shift - all_sum((lse + shift).exp()).log()


class SinkhornKnopp(nn.Module):
    """``codes = sinkhorn(scores)``. Replaces SwAV's `distributed_sinkhorn`, lightly's `sinkhorn` and DINOv2's
    `sinkhorn_knopp_teacher`, whose exp overflows float32 at scores above 88 · epsilon.

    Where scores are products with prototypes, `sinkhorn_potentials` needs no scores.

    Args:
        iterations: number of rounds.
        epsilon: temperature of the scores, a number or a tensor with one element: 0.05 in SwAV, the teacher's in
            DINOv2.
        gather: assign the samples of all ranks together; their numbers may differ. All ranks must call together.

    Raises:
        ValueError: iterations is less than 1, or epsilon is not positive.

    Source: Cuturi, 2013, algorithm 1; Caron et al., 2020 (SwAV), section 3.1.
    """

    def __init__(self, iterations: int = 3, epsilon: float | Tensor = 0.05, gather: bool = False):
        super().__init__()
        _check("SinkhornKnopp", iterations, epsilon, ("iterations", "epsilon"))
        self.iterations, self.epsilon, self.gather = iterations, epsilon, gather

    @torch.no_grad()
    def forward(self, scores: Tensor, epsilon: float | Tensor | None = None) -> Tensor:
        """Assignments [B, K] of B samples to K prototypes, float32 (float64 for float64), no gradient.

        Each row sums to 1; over all rows, each column approaches B / K.

        Args:
            scores: products of samples and prototypes [B, K].
            epsilon: temperature of this call, where it follows a schedule.

        Raises:
            ValueError: scores has other than two dimensions, or epsilon is not positive.
            TypeError: scores is no floating tensor.
        """
        check.tensor("SinkhornKnopp", "scores", scores, "B K")
        check.floating("SinkhornKnopp", scores=scores)
        epsilon = self.epsilon if epsilon is None else epsilon
        _check("SinkhornKnopp", self.iterations, epsilon, ("iterations", "epsilon"))
        log_codes = scores.detach().to(acc_dtype(scores)) / epsilon
        for i in range(self.iterations):
            columns = log_codes.logsumexp(0)
            # after the first round the sums over ranks need no shift, see `_add_ranks`
            column = _add_ranks(columns, None if i == 0 else torch.zeros_like(columns)) if self.gather else -columns
            log_codes = log_codes + column
            log_codes = log_codes - log_codes.logsumexp(1, keepdim=True)
        return log_codes.exp()


def _check(name: str, rounds: int, tau: float | Tensor, arguments: tuple[str, str] = ("rounds", "tau")) -> None:
    check.integer(name, **{arguments[0]: rounds})
    if rounds < 1:
        raise ValueError(f"{name}: {arguments[0]} must be at least 1, got {rounds}")
    if not isinstance(tau, Tensor) and not tau > 0:  # a tensor may be on a device, for which the host need not wait
        raise ValueError(f"{name}: {arguments[1]} must be > 0, got {tau}")
