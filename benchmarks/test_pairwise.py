"""Losses of images and texts: SigLIP's of all pairs, and CLIP's in both directions, forward and backward.

*official* is open_clip's formula, whole: all logits in memory, for CLIP twice. *chunked* computes them a part of the
images at a time, and again in the backward pass.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastssl.nn import CLIPLoss
from fastssl.ops import pairwise_sigmoid

from .harness import DTYPES, Case, compare, compiled_on_gpu, forward_backward
from .machine import DEVICE, GPU_SIZE
from .rivals import in_batch_losses

CHUNK = 512  # images at a time
SIZES = [
    (4096, 512, "fp32"),
    (4096, 768, "fp32"),
    (4096, 512, "bf16"),
    (512, 512, "fp32"),
    *(pytest.param(b, 768, "bf16", marks=pytest.mark.skipif(**GPU_SIZE)) for b in (8192, 32768)),
]


def unit_rows(batch: int, width: int, dtype: str) -> list[Tensor]:
    """Unit rows of images, and of texts that are near them."""
    images = torch.randn(batch, width, device=DEVICE)
    texts = images + 2 * torch.randn(batch, width, device=DEVICE)
    return [F.normalize(x, dim=1).to(DTYPES[dtype]).requires_grad_() for x in (images, texts)]


@pytest.mark.parametrize("batch, width, dtype", SIZES)
def test_pairwise_sigmoid(benchmark, batch, width, dtype):
    images, texts = unit_rows(batch, width, dtype)
    scale, bias = (torch.tensor(x, device=DEVICE, requires_grad=True) for x in (10.0, -10.0))
    inputs = (images, texts, scale, bias)

    def part(rows: Tensor, first: int) -> Tensor:
        logits = (scale * (rows @ texts.T).float() + bias).to(torch.float32)
        z = -torch.ones_like(logits)
        z.diagonal(first).fill_(1)
        return -F.logsigmoid(z * logits).sum()

    def official() -> Tensor:
        return part(images, 0) / batch

    def chunked() -> Tensor:
        parts = enumerate(images.split(CHUNK))
        return sum(checkpoint(part, rows, i * CHUNK, use_reentrant=False) for i, rows in parts) / batch

    case = Case(
        op="pairwise_sigmoid",
        size=f"B=M={batch:,}, D={width}, {dtype}, forward + backward",
        kernel="pairwise_sigmoid_fwd",
        contestants={
            "ours": forward_backward(lambda: pairwise_sigmoid(*inputs), *inputs),
            "official": forward_backward(official, *inputs),
            "chunked": forward_backward(chunked, *inputs),
        },
        rivals=compiled_on_gpu(official, *inputs),
        operations=6 * batch * batch * width,  # the logits, and their product with images and with texts
        dtype=DTYPES[dtype],
    )
    compare(benchmark, case)


@pytest.mark.parametrize("batch, width, dtype", SIZES)
def test_clip_loss(benchmark, batch, width, dtype):
    images, texts = unit_rows(batch, width, dtype)
    scale = torch.tensor(1 / 0.07, device=DEVICE, requires_grad=True)
    inputs, labels, criterion = (images, texts, scale), torch.arange(batch, device=DEVICE), CLIPLoss()

    def official() -> Tensor:
        rows, columns = ((a @ b.T).float() * scale for a, b in ((images, texts), (texts, images)))
        return (F.cross_entropy(rows, labels) + F.cross_entropy(columns, labels)) / 2

    def one_matrix() -> Tensor:
        logits = (images @ texts.T).float() * scale
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def part(rows: Tensor, others: Tensor, first: int) -> Tensor:
        logits = (rows @ others.T).float() * scale
        return F.cross_entropy(logits, labels[first : first + len(rows)], reduction="sum")

    def chunked() -> Tensor:
        pairs = [(a, b, i) for a, b in ((images, texts), (texts, images)) for i in range(0, batch, CHUNK)]
        parts = (checkpoint(part, a[i : i + CHUNK], b, i, use_reentrant=False) for a, b, i in pairs)
        return sum(parts) / (2 * batch)

    case = Case(
        op="CLIPLoss",
        size=f"B={batch:,}, D={width}, {dtype}, forward + backward",
        kernel="batch_info_nce_fwd",
        contestants={
            "ours": forward_backward(lambda: criterion(*inputs), *inputs),
            "official": forward_backward(official, *inputs),
            "one matrix": forward_backward(one_matrix, *inputs),
            "chunked": forward_backward(chunked, *inputs),
        },
        rivals={
            name: forward_backward(lambda loss=loss: loss(images, texts).float(), images, texts)
            for name, loss in in_batch_losses(0.07, symmetric=True).items()
        }
        | compiled_on_gpu(official, *inputs),
        operations=6 * batch * batch * width,  # the logits once, and their product with images and with texts
        dtype=DTYPES[dtype],
    )
    compare(benchmark, case)
