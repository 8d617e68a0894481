"""The collectives in one process, where they return their argument, and in two and three over gloo."""

import itertools

import pytest
import torch

from fastssl.distributed import (
    all_gather,
    all_gather_with_grad,
    all_sum,
    all_to_all,
    rank,
    shuffle,
    unshuffle,
    world_size,
)
from fastssl.nn.norm import SyncBatchNorm, sync_batch_norms
from tests.support.ranks import run_ranks


def collectives():
    """Every rank has the numbers 100·rank + row."""
    world, this_rank = world_size(), rank()
    x = (100.0 * this_rank + torch.arange(3)).unsqueeze(1).requires_grad_()
    rows_of_all = torch.cat([100.0 * r + torch.arange(3) for r in range(world)]).unsqueeze(1)
    assert torch.equal(all_gather(x), rows_of_all)
    assert not all_gather(x).requires_grad
    gathered = all_gather_with_grad(x)
    assert torch.equal(gathered, rows_of_all)
    (gathered.squeeze(1) * torch.arange(1.0, 3 * world + 1) * (this_rank + 1)).sum().backward()
    ranks = sum(r + 1 for r in range(world))  # the gradient of the sum of all ranks' losses
    assert torch.equal(x.grad.squeeze(1), (torch.arange(1.0, 4) + 3 * this_rank) * ranks)

    rows = (10.0 * this_rank + torch.arange(world)).requires_grad_()
    received = all_to_all(rows)
    assert received.tolist() == [10.0 * r + this_rank for r in range(world)]
    (received * torch.arange(1.0, world + 1)).sum().backward()
    assert rows.grad.tolist() == [this_rank + 1.0] * world
    assert all_to_all(torch.full((world,), this_rank)).tolist() == list(range(world))

    y = torch.ones(2, requires_grad=True)
    total = all_sum(y * (this_rank + 1))
    assert total.tolist() == [ranks, ranks]
    total.sum().backward()
    assert y.grad.tolist() == [world * (this_rank + 1.0)] * 2
    return True


def shuffle_and_unshuffle(batch):
    world, this_rank = world_size(), rank()
    torch.manual_seed(this_rank)
    samples = 100 * this_rank + torch.arange(batch).unsqueeze(1).expand(batch, 2)
    shuffled, order = shuffle(samples)
    assert torch.equal(unshuffle(shuffled, order), samples)
    assert sorted(all_gather(shuffled)[:, 0].tolist()) == sorted(all_gather(samples)[:, 0].tolist())
    per_rank = torch.bincount(shuffled[:, 0] // 100, minlength=world)
    assert per_rank.max() - per_rank.min() <= 1, "every rank has equal shares of all batches"
    return shuffled[:, 0].tolist()


def test_in_one_process_collectives_return_their_argument():
    assert (world_size(), rank()) == (1, 0)
    x = torch.randn(4, 2, requires_grad=True)
    assert all(torch.equal(f(x), x) for f in (all_gather, all_gather_with_grad, all_sum))
    assert torch.equal(all_to_all(x[:1]), x[:1])
    assert len(set(map(tuple, (shuffle_and_unshuffle(6) for _ in range(3))))) == 1  # the same seed, the same order
    assert shuffle_and_unshuffle(6) != list(range(6))


@pytest.mark.parametrize("world", [2, 3])
def test_collectives(world):
    assert all(run_ranks(world, collectives))


@pytest.mark.parametrize(("world", "batch"), [(2, 5), (3, 4), (3, 1)])
def test_shuffle_sends_every_sample_once_and_unshuffle_returns_it(world, batch):
    shuffled = run_ranks(world, shuffle_and_unshuffle, batch)
    assert sorted(itertools.chain(*shuffled)) == sorted(100 * r + i for r in range(world) for i in range(batch))


BATCH_NORM_INPUTS = {"1d": (6, 3), "2d": (6, 3, 4, 5)}


def batch_norm(shape, affine, dtype):
    norm = torch.nn.BatchNorm1d(3, affine=affine) if len(shape) == 2 else torch.nn.BatchNorm2d(3, affine=affine)
    if affine:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    x = torch.randn(shape, dtype=dtype) * 3 + 50  # a mean that one-pass variance would cancel against
    return norm.to(dtype), x, torch.randn(shape, dtype=dtype)


def sync_batch_norm(shape, affine, dtype, sizes):
    norm, x, upstream = batch_norm(shape, affine, dtype)
    holder = sync_batch_norms(torch.nn.Sequential(norm))
    assert isinstance(holder[0], SyncBatchNorm)
    x, upstream = (t.split(sizes)[rank()].clone() for t in (x, upstream))
    x.requires_grad_()
    out = holder(x)
    (out * upstream).sum().backward()
    parameters = [all_sum(p.grad) for p in holder.parameters()]
    holder.eval()(x)
    return out.detach(), x.grad, parameters, holder.state_dict()


@pytest.mark.parametrize("shape", BATCH_NORM_INPUTS.values(), ids=BATCH_NORM_INPUTS)
@pytest.mark.parametrize(("affine", "sizes"), [(True, [3, 3]), (False, [4, 2])])
def test_sync_batch_norm_on_cpus_is_a_batch_norm_of_the_whole_batch(shape, affine, sizes):
    torch.manual_seed(0)
    norm, x, upstream = batch_norm(shape, affine, torch.float64)
    x.requires_grad_()
    out = norm(x)
    (out * upstream).sum().backward()
    outs, dxs, parameters, states = zip(*run_ranks(2, sync_batch_norm, shape, affine, torch.float64, sizes))
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.cat(outs), out.detach(), **close)
    torch.testing.assert_close(torch.cat(dxs), x.grad, **close)
    for gradients, state in zip(parameters, states):
        torch.testing.assert_close(gradients, [p.grad for p in norm.parameters()], **close)
        expected = {f"0.{name}": value for name, value in norm.state_dict().items()}
        torch.testing.assert_close(state, type(state)(expected), **close)


def test_sync_batch_norms_changes_nothing_in_one_process():
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    assert type(sync_batch_norms(module)[0]) is torch.nn.BatchNorm1d
    x = torch.randn(4, 3)
    norm = SyncBatchNorm(3)
    torch.testing.assert_close(norm(x), module(x))
    torch.testing.assert_close(norm.state_dict(), module[0].state_dict())
