"""SwAV's loss of given scores: predict the assignment of one crop from the other crops."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.ops import check
from fastssl.ops.dispatch import acc_dtype

from .sinkhorn import SinkhornKnopp


class SwaVLoss(nn.Module):
    """``loss = criterion(high_resolution_outputs, low_resolution_outputs, queue_outputs)``. Replaces lightly's of the
    same name.

    The samples of each large crop, and of its queue if there is one, are assigned to prototypes by Sinkhorn–Knopp; the
    softmax of every other crop's scores predicts the assignments. The targets of a crop are added before the cross
    entropy, so that each crop's softmax is computed once, not once for each large crop.

    Args:
        temperature: of the softmax.
        sinkhorn_iterations: rounds of Sinkhorn–Knopp.
        sinkhorn_epsilon: its temperature.
        sinkhorn_gather_distributed: assign the samples of all ranks together.

    Raises:
        ValueError: a number is out of range.

    Source: Caron et al., 2020 (SwAV), equation 2 and section 3.2.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_gather_distributed: bool = False,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"SwaVLoss: temperature must be > 0, got {temperature}")
        self.temperature = temperature
        self.sinkhorn = SinkhornKnopp(sinkhorn_iterations, sinkhorn_epsilon, sinkhorn_gather_distributed)

    def forward(
        self,
        high_resolution_outputs: Sequence[Tensor],
        low_resolution_outputs: Sequence[Tensor],
        queue_outputs: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """A scalar, float32 (float64 for float64), of the scores [B, K] of each crop; gradient to all.

        Args:
            high_resolution_outputs: scores of the large crops, at least one.
            low_resolution_outputs: scores of the small crops; two crops at least in all.
            queue_outputs: for each large crop the scores of its queue [Q, K], which takes part in Sinkhorn–Knopp only.

        Raises:
            ValueError: there are too few crops, other queues than large crops, or shapes differ.
            TypeError: scores are no floating tensors.
        """
        large, crops = len(high_resolution_outputs), [*high_resolution_outputs, *low_resolution_outputs]
        _check(large, crops, queue_outputs)
        queues = [None] * large if queue_outputs is None else queue_outputs
        codes = [self._assign(scores, queue) for scores, queue in zip(high_resolution_outputs, queues)]
        losses = []
        for i, scores in enumerate(crops):
            if others := [code for j, code in enumerate(codes) if j != i]:
                targets = torch.stack(others).sum(0)
                losses.append(F.cross_entropy(scores.to(acc_dtype(scores)) / self.temperature, targets))
        return torch.stack(losses).sum() / (large * (len(crops) - 1))

    def _assign(self, scores: Tensor, queue: Tensor | None) -> Tensor:
        """Assignments [B, K] of a crop's samples."""
        together = scores.detach() if queue is None else torch.cat([scores.detach(), queue.detach().to(scores.dtype)])
        return self.sinkhorn(together)[: len(scores)]


def _check(large: int, crops: list[Tensor], queue_outputs: Sequence[Tensor] | None) -> None:
    if not large or len(crops) < 2:
        raise ValueError(
            f"SwaVLoss: there must be a large crop and two crops in all, got {large} large and {len(crops) - large} "
            "small"
        )
    if queue_outputs is not None and len(queue_outputs) != large:
        raise ValueError(
            f"SwaVLoss: queue_outputs must hold the scores of {large} queues, one for each large crop, got "
            f"{len(queue_outputs)}"
        )
    for i, scores in enumerate(crops):
        name = f"high_resolution_outputs[{i}]" if i < large else f"low_resolution_outputs[{i - large}]"
        sizes = dict(zip("BK", crops[0].shape)) if i else {}
        check.tensor("SwaVLoss", name, scores, "B K", **sizes)
        check.floating("SwaVLoss", **{name: scores})
    for i, scores in enumerate(() if queue_outputs is None else queue_outputs):
        check.tensor("SwaVLoss", f"queue_outputs[{i}]", scores, "Q K", K=crops[0].shape[1])
