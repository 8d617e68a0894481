"""Scores of queries with rows of their own choice, forward and backward, at the size of CPC's drawn negatives."""

import pytest
import torch

from fastssl.ops import sampled_scores

from .harness import Case, compare, compiled_on_gpu, forward_backward
from .machine import DEVICE


@pytest.mark.parametrize("rows, count, width", [(1120, 16, 1024), (4096, 64, 128)])
def test_sampled_scores(benchmark, rows, count, width):
    q, keys = (torch.randn(rows, width, device=DEVICE).requires_grad_() for _ in range(2))
    index = torch.randint(rows, (rows, count), device=DEVICE)

    def official():
        """Greedy InfoMax's gather, whose index is repeated to the width of a row."""
        repeated = index.flatten()[:, None].repeat(1, width)
        return (keys.gather(0, repeated).view(rows, count, width) * q[:, None]).sum(2).square().mean()

    def indexed():
        return torch.einsum("bd,bkd->bk", q, keys[index]).square().mean()

    case = Case(
        op="sampled_scores",
        size=f"B=M={rows:,}, K={count}, D={width:,}, fp32, forward + backward",
        kernel="sampled_scores_fwd",
        contestants={
            "ours": forward_backward(lambda: sampled_scores(q, keys, index).square().mean(), q, keys),
            "official": forward_backward(official, q, keys),
            "einsum": forward_backward(indexed, q, keys),
        },
        rivals=compiled_on_gpu(official, q, keys),
        bytes_moved=2 * rows * count * width * 4,
        operations=6 * rows * count * width,
    )
    compare(benchmark, case)
