"""MAE's masking: the choice of tokens, the kept tokens, and the full sequence with mask tokens.

Three quarters of the tokens are masked, and the positional embedding is fixed, as in MAE.
"""

import pytest
import torch

from fastssl.ops import keep_tokens, random_masking, restore_tokens

from .harness import Case, compare, compiled_on_gpu, forward_backward
from .machine import DEVICE

MAE = (196, 49)  # tokens and kept tokens: 224² pixels in patches of 16², a quarter is kept
TINY = (16, 4)


def distinct_noise(batch: int, length: int) -> torch.Tensor:
    """Noise without ties, whose order torch's argsort does not define."""
    return torch.rand(batch, length, device=DEVICE).argsort(1).float() / length


def rows_as_index(ids: torch.Tensor, width: int) -> torch.Tensor:
    """The index of the reference code, one int64 for every value: [B, M, D]."""
    return ids.unsqueeze(-1).repeat(1, 1, width)


@pytest.mark.parametrize("batch, tokens", [(256, MAE), (2, TINY)])
def test_random_masking(benchmark, batch, tokens):
    length, keep = tokens
    noise = distinct_noise(batch, length)

    def official():
        ids = noise.argsort(1)
        ids_restore = ids.argsort(1)
        mask = torch.ones(batch, length, device=DEVICE)
        mask[:, :keep] = 0
        return ids[:, :keep], ids[:, keep:], ids_restore, mask.gather(1, ids_restore)

    def one_sort():
        ids = noise.argsort(1)
        places = torch.arange(length, device=DEVICE).expand(batch, length)
        ids_restore = torch.empty_like(ids).scatter_(1, ids, places)
        return ids[:, :keep], ids[:, keep:], ids_restore, (ids_restore >= keep).float()

    case = Case(
        op="random_masking",
        size=f"B={batch}, L={length}, keep {keep}",
        kernel="random_masking",
        contestants={"ours": lambda: random_masking(noise, keep), "official": official, "argsort, scatter_": one_sort},
        rivals=compiled_on_gpu(official),
    )
    compare(benchmark, case)


@pytest.mark.parametrize("batch", [256, 1])
def test_random_masking_with_gather(benchmark, batch, width=768):
    """The function of that name in the reference code: it draws the mask and gathers the kept tokens."""
    length, keep = MAE
    x, noise = torch.randn(batch, length, width, device=DEVICE), distinct_noise(batch, length)

    def ours():
        masking = random_masking(noise, keep)
        return keep_tokens(x, masking.ids_keep), masking.mask, masking.ids_restore

    def mask_and_gather(gather):
        ids = noise.argsort(1)
        ids_restore = ids.argsort(1)
        mask = torch.ones(batch, length, device=DEVICE)
        mask[:, :keep] = 0
        return gather(ids[:, :keep]), mask.gather(1, ids_restore), ids_restore

    case = Case(
        op="random_masking, keep_tokens",
        size=f"B={batch}, {length} → {keep} tokens, D={width}, fp32, forward",
        kernel="keep_tokens_fwd",
        contestants={
            "ours": ours,
            "official": lambda: mask_and_gather(lambda ids: x.gather(1, rows_as_index(ids, width))),
            "gather, expand": lambda: mask_and_gather(lambda ids: x.gather(1, ids.unsqueeze(-1).expand(-1, -1, width))),
        },
        bytes_moved=0 if batch < 64 else 2 * batch * keep * width * 4,
    )
    compare(benchmark, case)


@pytest.mark.parametrize(
    "batch, tokens, width, gradient",
    [
        (256, MAE, 768, False),
        (256, MAE, 768, True),
        (64, MAE, 768, True),
        (1, MAE, 768, True),
        (2, TINY, 64, False),
        (2, TINY, 64, True),
    ],
)
def test_keep_tokens(benchmark, batch, tokens, width, gradient):
    length, keep = tokens
    x = torch.randn(batch, length, width, device=DEVICE, requires_grad=gradient)
    pos = torch.randn(1, length, width, device=DEVICE)
    ids = random_masking(torch.rand(batch, length, device=DEVICE), keep).ids_keep
    samples = torch.arange(batch, device=DEVICE).unsqueeze(1)

    def official():
        return (x + pos).gather(1, rows_as_index(ids, width))

    forwards = {
        "ours": lambda: keep_tokens(x, ids, pos),
        "official": official,
        "gather, expand": lambda: (x + pos).gather(1, ids.unsqueeze(-1).expand(-1, -1, width)),
        "indexing": lambda: x[samples, ids] + pos[0][ids],
    }
    if batch == 64 or DEVICE.type == "cuda":
        forwards["torch.compile"] = torch.compile(official, dynamic=False)
    upstream = torch.randn(batch, keep, width, device=DEVICE)
    case = Case(
        op="keep_tokens",
        size=f"B={batch}, {length} → {keep} tokens, D={width}, fp32" + _direction(gradient),
        kernel="keep_tokens_fwd",
        contestants=_contestants(forwards, gradient, x, upstream=upstream),
        bytes_moved=0 if batch < 64 else 2 * upstream.nbytes + gradient * (upstream.nbytes + x.nbytes),
    )
    compare(benchmark, case)


@pytest.mark.parametrize(
    "batch, tokens, width, gradient",
    [
        (256, MAE, 512, False),
        (256, MAE, 512, True),
        (64, MAE, 512, True),
        (1, MAE, 512, True),
        (2, TINY, 64, False),
        (2, TINY, 64, True),
    ],
)
def test_restore_tokens(benchmark, batch, tokens, width, gradient):
    length, keep = tokens
    x = torch.randn(batch, 1 + keep, width, device=DEVICE, requires_grad=gradient)
    mask_token = torch.randn(1, 1, width, device=DEVICE, requires_grad=gradient)
    pos = torch.randn(1, 1 + length, width, device=DEVICE)
    ids = random_masking(torch.rand(batch, length, device=DEVICE), keep).ids_restore

    def official():
        tokens = torch.cat([x[:, 1:], mask_token.repeat(batch, length - keep, 1)], dim=1)
        return torch.cat([x[:, :1], tokens.gather(1, rows_as_index(ids, width))], dim=1) + pos

    def gather_expand():
        tokens = torch.cat([x[:, 1:], mask_token.expand(batch, length - keep, width)], dim=1)
        tokens = tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, width))
        return torch.cat([x[:, :1], tokens], dim=1) + pos

    def gather_where():
        ranks = ids.unsqueeze(-1)
        tokens = x[:, 1:].gather(1, ranks.clamp(max=keep - 1).expand(-1, -1, width))
        return torch.cat([x[:, :1], torch.where(ranks < keep, tokens, mask_token)], dim=1) + pos

    forwards = {
        "ours": lambda: restore_tokens(x, mask_token, ids, pos),
        "official": official,
        "gather, expand": gather_expand,
        "gather, where": gather_where,
    }
    if batch == 64 or DEVICE.type == "cuda":
        forwards["torch.compile"] = torch.compile(official, dynamic=False)
    upstream = torch.randn(batch, 1 + length, width, device=DEVICE)
    case = Case(
        op="restore_tokens",
        size=f"B={batch}, {1 + keep} → {1 + length} tokens, D={width}, fp32" + _direction(gradient),
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
