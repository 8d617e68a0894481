"""Batch norm in training with the addition and the ReLU after it: layers of a ResNet-50 at 8 images, on a GPU at 64.

With one split the result of torch's batch norm is not reshaped: an operation in place on a view makes autograd copy
whole gradients in another memory format, which takes 4 to 6 times as long as the batch norm itself. The official code
has that view for several splits, so its row has it, beside a contestant without operations in place.
"""

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import Running, batch_norm

from .harness import DTYPES, Case, compare, compiled_on_gpu, forward_backward
from .machine import DEVICE

STEM, THIRD, LAST = (64, 112), (512, 28), (2048, 7)  # channels, height and width


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layer, with_residual", [(STEM, False), (THIRD, True), (LAST, True)])
def test_batch_norm(benchmark, layer, with_residual, dtype, splits, batch=64 if DEVICE.type == "cuda" else 8):
    channels, side = layer

    def images(requires_grad=True):
        x = torch.randn(batch, channels, side, side, device=DEVICE).to(DTYPES[dtype], memory_format=torch.channels_last)
        return x.requires_grad_(requires_grad)

    x, upstream = images(), images(requires_grad=False)
    weight, bias = (torch.rand(channels, device=DEVICE, requires_grad=True) for _ in range(2))
    running = Running(torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE), 0.1)
    residual = [images()] if with_residual else []
    leaves = (x, weight, bias, *residual)

    def norm():
        """Batch norm with the splits as channels."""
        if splits == 1:
            return F.batch_norm(x, running.mean.clone(), running.var.clone(), weight, bias, True, running.momentum)
        parts = x.reshape(batch // splits, splits * channels, side, side)
        repeated = [t.repeat(splits) for t in (running.mean, running.var, weight, bias)]
        return F.batch_norm(parts, *repeated, True, running.momentum).view(x.shape)

    def official():
        y = norm()
        return F.relu_(y.add_(residual[0]) if residual else y)

    def out_of_place():
        y = norm()
        return F.relu(y + residual[0] if residual else y)

    with torch.no_grad():  # no gradient where rounding decides that of the ReLU
        upstream[(norm() + residual[0] if residual else norm()).abs() < 0.05] = 0

    tensors = 3 + 5 + 2 * with_residual  # forward x, x, y; backward (x, dy) twice, dx; the residual and its gradient
    case = Case(
        op="batch_norm",
        size=f"B={batch}, C={channels}, {side}², {dtype}, splits={splits}"
        + f"{', residual' if with_residual else ''}, forward and backward",
        kernel="batch_norm_fwd",
        contestants={
            "ours": forward_backward(
                lambda: batch_norm(x, weight, bias, running, 1e-5, splits, True, *residual), *leaves, upstream=upstream
            ),
            "official": forward_backward(official, *leaves, upstream=upstream),
            "out of place": forward_backward(out_of_place, *leaves, upstream=upstream),
        },
        rivals=compiled_on_gpu(official, *leaves, upstream=upstream),
        bytes_moved=tensors * x.numel() * x.element_size(),
        dtype=DTYPES[dtype],
    )
    compare(benchmark, case)
