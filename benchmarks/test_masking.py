"""MAE's masking: choosing tokens, taking them out, putting them back.

Three quarters are removed, and the positional embedding is fixed, as in MAE.
"""

import pytest
import torch

from fastssl.ops import keep_tokens, random_masking, restore_tokens

from .harness import Case, compare, forward_backward
from .machine import DEVICE

LENGTH, KEEP = 196, 49  # 224² pixels in patches of 16²; a quarter is kept


def distinct_noise(batch: int) -> torch.Tensor:
    """Noise without ties: their order is the one thing that torch's argsort leaves open."""
    return torch.rand(batch, LENGTH, device=DEVICE).argsort(1).float() / LENGTH


def rows_as_index(ids: torch.Tensor, width: int) -> torch.Tensor:
    """The reference's index, written out for every value: [B, M, D] int64."""
    return ids.unsqueeze(-1).repeat(1, 1, width)


@pytest.mark.parametrize("batch", [256, 16])
def test_random_masking(benchmark, batch):
    noise = distinct_noise(batch)

    def official():
        ids = noise.argsort(1)
        ids_restore = ids.argsort(1)
        mask = torch.ones(batch, LENGTH, device=DEVICE)
        mask[:, :KEEP] = 0
        return ids[:, :KEEP], ids[:, KEEP:], ids_restore, mask.gather(1, ids_restore)

    def one_sort():
        ids = noise.argsort(1)
        places = torch.arange(LENGTH, device=DEVICE).expand(batch, LENGTH)
        ids_restore = torch.empty_like(ids).scatter_(1, ids, places)
        return ids[:, :KEEP], ids[:, KEEP:], ids_restore, (ids_restore >= KEEP).float()

    case = Case(
        op="random_masking",
        size=f"B={batch}, L={LENGTH}, keep {KEEP}",
        kernel="random_masking",
        contestants={"ours": lambda: random_masking(noise, KEEP), "official": official, "argsort, scatter_": one_sort},
    )
    compare(benchmark, case)


@pytest.mark.parametrize("batch, width, gradient", [(64, 768, False), (64, 768, True), (4, 192, True)])
def test_keep_tokens(benchmark, batch, width, gradient):
    x = torch.randn(batch, LENGTH, width, device=DEVICE, requires_grad=gradient)
    pos = torch.randn(1, LENGTH, width, device=DEVICE)
    ids = random_masking(torch.rand(batch, LENGTH, device=DEVICE), KEEP).ids_keep
    samples = torch.arange(batch, device=DEVICE).unsqueeze(1)
    forwards = {
        "ours": lambda: keep_tokens(x, ids, pos),
        "official": lambda: (x + pos).gather(1, rows_as_index(ids, width)),
        "gather, expand": lambda: (x + pos).gather(1, ids.unsqueeze(-1).expand(-1, -1, width)),
        "indexing": lambda: x[samples, ids] + pos[0][ids],
    }
    upstream = torch.randn(batch, KEEP, width, device=DEVICE)
    kept, whole = upstream.nbytes, x.nbytes
    case = Case(
        op="keep_tokens",
        size=f"B={batch}, {LENGTH} → {KEEP} tokens, D={width}, fp32" + _direction(gradient),
        kernel="keep_tokens_fwd",
        contestants=_contestants(forwards, gradient, x, upstream=upstream),
        bytes_moved=0 if batch < 64 else 2 * kept + gradient * (kept + whole),
    )
    compare(benchmark, case)


@pytest.mark.parametrize("batch, width, gradient", [(64, 512, False), (64, 512, True), (4, 192, True)])
def test_restore_tokens(benchmark, batch, width, gradient):
    x = torch.randn(batch, 1 + KEEP, width, device=DEVICE, requires_grad=gradient)
    mask_token = torch.randn(1, 1, width, device=DEVICE, requires_grad=gradient)
    pos = torch.randn(1, 1 + LENGTH, width, device=DEVICE)
    ids = random_masking(torch.rand(batch, LENGTH, device=DEVICE), KEEP).ids_restore

    def official():
        tokens = torch.cat([x[:, 1:], mask_token.repeat(batch, LENGTH - KEEP, 1)], dim=1)
        return torch.cat([x[:, :1], tokens.gather(1, rows_as_index(ids, width))], dim=1) + pos

    def expanded():
        tokens = torch.cat([x[:, 1:], mask_token.expand(batch, LENGTH - KEEP, width)], dim=1)
        tokens = tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, width))
        return torch.cat([x[:, :1], tokens], dim=1) + pos

    def chosen():
        ranks = ids.unsqueeze(-1)
        tokens = x[:, 1:].gather(1, ranks.clamp(max=KEEP - 1).expand(-1, -1, width))
        return torch.cat([x[:, :1], torch.where(ranks < KEEP, tokens, mask_token)], dim=1) + pos

    forwards = {
        "ours": lambda: restore_tokens(x, mask_token, ids, pos),
        "official": official,
        "gather, expand": expanded,
        "gather, where": chosen,
    }
    upstream = torch.randn(batch, 1 + LENGTH, width, device=DEVICE)
    case = Case(
        op="restore_tokens",
        size=f"B={batch}, {1 + KEEP} → {1 + LENGTH} tokens, D={width}, fp32" + _direction(gradient),
        kernel="restore_tokens_fwd",
        contestants=_contestants(forwards, gradient, x, mask_token, upstream=upstream),
        bytes_moved=0 if batch < 64 else (1 + gradient) * (x.nbytes + upstream.nbytes),
    )
    compare(benchmark, case)


def _contestants(forwards: dict, gradient: bool, *inputs: torch.Tensor, upstream: torch.Tensor) -> dict:
    if not gradient:
        return forwards
    return {name: forward_backward(forward, *inputs, upstream=upstream) for name, forward in forwards.items()}


def _direction(gradient: bool) -> str:
    return ", forward + backward" if gradient else ", forward"
