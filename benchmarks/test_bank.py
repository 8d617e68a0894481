"""Contrast with sampled rows of a memory bank, forward and backward, at InstDisc's sizes; and the bank's update."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import sampled_info_nce, sampled_nce, update_bank_

from .harness import DTYPES, Case, compare, compiled, compiled_on_gpu, forward_backward
from .machine import DEVICE

TAU, EPS, IMAGES = 0.07, 1e-7, 1_281_167


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=1)


def sampled(dtype: str, batch: int, count: int, width: int):
    """(raw queries, bank, indices, Z)"""
    raw = torch.randn(batch, width, device=DEVICE).requires_grad_()
    bank = torch.randn(IMAGES, width, device=DEVICE).div_(math.sqrt(width)).to(DTYPES[dtype])
    indices = torch.randint(IMAGES, (batch, 1 + count), device=DEVICE)
    return raw, bank, indices, torch.tensor(2.5e6, device=DEVICE)


@pytest.mark.parametrize("form", ["sampled_info_nce", "sampled_nce"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sampled_rows(benchmark, form, dtype, batch=256, count=4096, width=128):
    raw, bank, indices, z = sampled(dtype, batch, count, width)

    def scores():
        rows = bank.index_select(0, indices.view(-1)).view(batch, 1 + count, width)  # [B, 1+m, D], as in the codes
        return torch.bmm(rows.float(), unit(raw)[:, :, None])[:, :, 0]

    def softmax():
        return F.cross_entropy(scores() / TAU, torch.zeros(batch, dtype=torch.int64, device=DEVICE))

    def nce():
        p, noise = (scores() / TAU).exp() / z, count / IMAGES
        positive = (p[:, 0] / (p[:, 0] + noise + EPS)).log().sum()
        return -(positive + (noise / (p[:, 1:] + noise + EPS)).log().sum()) / batch

    ours = {
        "sampled_info_nce": lambda: sampled_info_nce(unit(raw), bank, indices, TAU).loss.mean(),
        "sampled_nce": lambda: sampled_nce(unit(raw), bank, indices, TAU, z).loss.mean(),
    }[form]
    official = {"sampled_info_nce": softmax, "sampled_nce": nce}[form]
    contestants = {"ours": forward_backward(ours, raw), "official": forward_backward(official, raw)}
    if dtype == "fp32" and DEVICE.type == "cpu":
        contestants["torch.compile"] = compiled(official, raw)
    case = Case(
        op=form,
        size=f"B={batch}, m={count:,}, D={width}, N={IMAGES:,}, {dtype} bank, forward + backward",
        kernel=f"{form}_fwd",
        contestants=contestants,
        rivals=compiled_on_gpu(official, raw),
        bytes_moved=batch * (1 + count) * (width * bank.element_size() + 8),
        operations=4 * batch * count * width,
    )
    compare(benchmark, case)


def test_update(benchmark, batch=256, width=128):
    start = torch.randn(IMAGES, width, device=DEVICE)
    features, indices = unit(torch.randn(batch, width, device=DEVICE)), torch.randperm(IMAGES, device=DEVICE)[:batch]

    def contestant(update):
        bank = start.clone()

        def run():
            update(bank)
            return bank[indices]

        return run

    def official(bank):
        rows = bank.index_select(0, indices).mul_(0.5).add_(features * 0.5)
        bank.index_copy_(0, indices, rows.div(rows.pow(2).sum(1, keepdim=True).pow(0.5)))

    case = Case(
        op="update_bank_",
        size=f"B={batch}, D={width}, N={IMAGES:,}, fp32",
        kernel="update_bank_",
        contestants={
            "ours": contestant(lambda bank: update_bank_(bank, indices, features, 0.5)),
            "official": contestant(official),
        },
    )
    compare(benchmark, case)
