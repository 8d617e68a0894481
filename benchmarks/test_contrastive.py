"""InfoNCE over a queue and in the batch, and NT-Xent: forward and backward.

Queries are unnormalised outputs of a projection head, and each contestant computes the mean loss and the gradient of
these outputs.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops import batch_info_nce, info_nce, nt_xent

from .harness import DTYPES, Case, compare, compiled, compiled_on_gpu, forward_backward
from .machine import DEVICE, GPU_SIZE
from .rivals import in_batch_losses, nt_xent_losses

TAU = 0.2


def projections(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, device=DEVICE)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def lightly_loss(queue: Tensor | None = None):
    """lightly's NTXentLoss, with a copy of the queue as its memory bank; None if lightly is not installed."""
    try:
        from lightly.loss import NTXentLoss
    except ImportError:
        return None
    loss = NTXentLoss(TAU, memory_bank_size=0 if queue is None else tuple(queue.shape)).to(DEVICE)
    if queue is not None:
        loss.memory_bank.bank.copy_(queue)
    return loss


def attention_and_lse(q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax-weighted mean of the keys [B, D] and log-sum-exp of the logits [B], by torch's fused attention with the
    keys as values. Only torch's internal ops return the log-sum-exp."""
    q, keys = q[None, None], keys[None, None]
    if DEVICE.type == "cuda":
        mean, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, keys, keys, None, True, scale=1 / TAU)
    else:
        mean, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, keys, scale=1 / TAU)
    return mean[0, 0], lse[0, 0, : q.shape[2]]


@pytest.mark.parametrize(
    "batch, length, dtype",
    [
        (256, 65536, "fp32"),
        (256, 65536, "bf16"),
        (256, 1024, "fp32"),
        (256, 4096, "fp32"),
        (256, 16384, "fp32"),
        (256, 262144, "fp32"),
        (256, 1048576, "fp32"),
        (128, 65536, "fp32"),
        (32, 65536, "fp32"),
        (8, 65536, "fp32"),
        (8, 1024, "fp32"),
    ],
)
def test_info_nce(benchmark, batch, length, dtype, width=128):
    raw = projections(batch, width).to(DTYPES[dtype]).requires_grad_()
    key = unit(raw.detach().float() + 2 * projections(batch, width)).to(DTYPES[dtype])
    queue = unit(projections(length, width)).to(DTYPES[dtype])
    raw_32, key_32, queue_32 = raw.detach().float().requires_grad_(), key.float(), queue.float()

    def official():
        """MoCo's code, which clones the queue in each step; in float32 also if ours takes bfloat16."""
        q, negatives = unit(raw_32), queue_32.clone()
        logits = torch.cat([(q * key_32).sum(1, keepdim=True), q @ negatives.T], dim=1) / TAU
        return F.cross_entropy(logits, torch.zeros(batch, dtype=torch.int64, device=DEVICE))

    def fused_attention():
        q = unit(raw)
        with torch.no_grad():
            positive = (q * key).sum(1).float() / TAU
            mean, lse = attention_and_lse(q, queue)
            total = torch.logaddexp(positive, lse.float())
            dq = (lse - total).exp().unsqueeze(1) * (mean - key).float() / (TAU * batch)
        return (total - positive).mean(), *torch.autograd.grad(q, raw, dq.to(raw.dtype))

    contestants = {
        "ours": forward_backward(lambda: info_nce(unit(raw), key, queue, TAU).loss.mean(), raw),
        "official": forward_backward(official, raw_32),
        "SDPA with lse": fused_attention,
    }
    if dtype == "fp32" and length <= 65536 and (loss := lightly_loss(queue)):
        contestants["lightly"] = forward_backward(lambda: loss(raw, key), raw)
    if (batch, length, dtype) == (256, 65536, "fp32") and DEVICE.type == "cpu":
        contestants["torch.compile"] = compiled(official, raw_32)
    points = {"queue length K": length} if batch == 256 and dtype == "fp32" else {}
    if length == 65536 and dtype == "fp32":
        points["batch B"] = batch
    case = Case(
        op="info_nce",
        size=f"B={batch}, D={width}, K={length:,}, {dtype}{' (official: fp32)' if dtype == 'bf16' else ''}"
        ", forward + backward",
        kernel="info_nce_fwd",
        contestants=contestants,
        rivals=compiled_on_gpu(official, raw_32),
        operations=4 * batch * length * width,  # logits and the gradient of q
        dtype=DTYPES[dtype],
        points=points,
    )
    compare(benchmark, case)


@pytest.mark.parametrize(
    "batch, keys_gradient, dtype",
    [
        (4096, False, "fp32"),
        (4096, True, "fp32"),
        (256, False, "fp32"),
        (8, True, "fp32"),
        (4096, True, "bf16"),
        pytest.param(32768, True, "bf16", marks=pytest.mark.skipif(**GPU_SIZE)),
    ],
)
def test_batch_info_nce(benchmark, batch, keys_gradient, dtype, width=256):
    raw_q = projections(batch, width).to(DTYPES[dtype]).requires_grad_()
    raw_keys = (raw_q.detach() + 2 * projections(batch, width)).to(DTYPES[dtype]).requires_grad_(keys_gradient)
    inputs = (raw_q, raw_keys) if keys_gradient else (raw_q,)
    labels = torch.arange(batch, device=DEVICE)

    def official():
        return F.cross_entropy((unit(raw_q) @ unit(raw_keys).T).float() / TAU, labels)

    def ours():
        return batch_info_nce(unit(raw_q), unit(raw_keys), TAU).loss.mean()

    contestants = {"ours": forward_backward(ours, *inputs), "official": forward_backward(official, *inputs)}
    # On a CPU it rounds the loss itself to bfloat16, which is not accurate enough to be compared.
    if hasattr(F, "linear_cross_entropy") and (DEVICE == "cuda" or dtype == "fp32"):
        options = torch.nn.LinearCrossEntropyOptions()

        def linear_cross_entropy():
            return F.linear_cross_entropy(unit(raw_q) / TAU, unit(raw_keys), labels, options=options).float()

        contestants["linear_cross_entropy"] = forward_backward(linear_cross_entropy, *inputs)
    case = Case(
        op="batch_info_nce",
        size=f"B=M={batch:,}, D={width}, {dtype}, forward + backward"
        + (" of q and keys" if keys_gradient else " of q"),
        kernel="batch_info_nce_fwd",
        contestants=contestants,
        rivals=_in_batch_rivals(raw_q, raw_keys, inputs, symmetric=False) | compiled_on_gpu(official, *inputs),
        operations=(4 + 2 * keys_gradient) * batch * batch * width,
        dtype=DTYPES[dtype],
    )
    compare(benchmark, case)


@pytest.mark.parametrize(
    "batch, dtype",
    [(8, "fp32"), *(pytest.param(b, "bf16", marks=pytest.mark.skipif(**GPU_SIZE)) for b in (4096, 32768))],
)
def test_batch_info_nce_both_ways(benchmark, batch, dtype, width=256):
    """CLIP's loss: the mean of both directions, with gradients of both."""
    raw_a = projections(batch, width).to(DTYPES[dtype]).requires_grad_()
    raw_b = (raw_a.detach() + 2 * projections(batch, width)).to(DTYPES[dtype]).requires_grad_()
    labels = torch.arange(batch, device=DEVICE)

    def official():
        logits = (unit(raw_a) @ unit(raw_b).T).float() / TAU
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def ours():
        a, b = unit(raw_a), unit(raw_b)
        return (batch_info_nce(a, b, TAU).loss.mean() + batch_info_nce(b, a, TAU).loss.mean()) / 2

    case = Case(
        op="batch_info_nce, both ways",
        size=f"B={batch:,}, D={width}, {dtype}, forward + backward",
        kernel="batch_info_nce_fwd",
        contestants={
            "ours": forward_backward(ours, raw_a, raw_b),
            "official": forward_backward(official, raw_a, raw_b),
        },
        rivals=_in_batch_rivals(raw_a, raw_b, (raw_a, raw_b), symmetric=True) | compiled_on_gpu(official, raw_a, raw_b),
        operations=6 * batch * batch * width,  # the logits once, and their product with a and with b
        dtype=DTYPES[dtype],
    )
    compare(benchmark, case)


def _in_batch_rivals(raw_q: Tensor, raw_keys: Tensor, inputs: tuple[Tensor, ...], symmetric: bool) -> dict:
    return {
        name: forward_backward(lambda loss=loss: loss(unit(raw_q), unit(raw_keys)).float(), *inputs)
        for name, loss in in_batch_losses(TAU, symmetric).items()
    }


@pytest.mark.parametrize(
    "batch, dtype",
    [
        *((b, "fp32") for b in (2048, 4096, 128, 8)),
        (2048, "bf16"),
        *(pytest.param(b, "bf16", marks=pytest.mark.skipif(**GPU_SIZE)) for b in (4096, 16384)),
    ],
)
def test_nt_xent(benchmark, batch, dtype, width=256):
    raw1 = projections(batch, width).to(DTYPES[dtype]).requires_grad_()
    raw2 = (raw1.detach() + 2 * projections(batch, width)).to(DTYPES[dtype]).requires_grad_()
    labels = (torch.arange(2 * batch, device=DEVICE) + batch) % (2 * batch)
    diagonal = torch.eye(2 * batch, dtype=torch.bool, device=DEVICE)

    def official():
        z = unit(torch.cat([raw1, raw2]))
        return F.cross_entropy(((z @ z.T).float() / TAU).masked_fill(diagonal, float("-inf")), labels)

    contestants = {
        "ours": forward_backward(lambda: nt_xent(unit(raw1), unit(raw2), TAU).mean(), raw1, raw2),
        "official": forward_backward(official, raw1, raw2),
    }
    if dtype == "fp32" and (loss := lightly_loss()):
        contestants["lightly"] = forward_backward(lambda: loss(raw1, raw2), raw1, raw2)
    case = Case(
        op="nt_xent",
        size=f"2 × {batch:,}, D={width}, {dtype}, forward + backward",
        kernel="nt_xent_fwd",
        contestants=contestants,
        rivals={
            name: forward_backward(lambda loss=loss: loss(unit(raw1), unit(raw2)).float(), raw1, raw2)
            for name, loss in nt_xent_losses(TAU).items()
        }
        | compiled_on_gpu(official, raw1, raw2),
        operations=3 * (2 * batch) ** 2 * width,  # half of the symmetric logits, and their product with z
        dtype=DTYPES[dtype],
    )
    compare(benchmark, case)
