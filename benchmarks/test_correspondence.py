"""The dense correspondence of two feature maps, without gradient."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import dense_match

from .harness import DTYPES, Case, compare, compiled_on_gpu
from .machine import DEVICE, GPU_SIZE


def lightly_index(q, k):
    """lightly's function as a contestant; none if lightly is not installed."""
    try:
        from lightly.models.utils import most_similar_index
    except ImportError:
        return {}
    return {"lightly": lambda: most_similar_index(q.mT, k.mT)}


@pytest.mark.parametrize(
    "batch, dtype", [(256, "fp32"), (32, "fp32"), pytest.param(256, "bf16", marks=pytest.mark.skipif(**GPU_SIZE))]
)
def test_dense_match(benchmark, batch, dtype, channels=2048, places=49):
    k = torch.randn(batch, channels, places, device=DEVICE)
    order = torch.rand(batch, places, device=DEVICE).argsort(1)
    # each place has one clear match, whatever the rounding
    q = (k.gather(2, order[:, None].expand_as(k)) + torch.randn_like(k)).to(DTYPES[dtype])
    k = k.to(DTYPES[dtype])

    def official():
        return (F.normalize(q, dim=1).mT @ F.normalize(k, dim=1)).argmax(2)

    case = Case(
        op="dense_match",
        size=f"B={batch}, C={channels:,}, {places} places, {dtype}",
        kernel="dense_match",
        contestants={"ours": lambda: dense_match(q, k), "official": official} | lightly_index(q, k),
        rivals=compiled_on_gpu(official),
        bytes_moved=2 * q.numel() * q.element_size(),
        operations=2 * batch * channels * places**2,
        dtype=DTYPES[dtype],
    )
    compare(benchmark, case)
