"""The collectives in one process, where they do nothing, and in two and three over gloo."""

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
    """Every rank holds numbers that say where they come from: 100·rank + row."""
    world, here = world_size(), rank()
    x = (100.0 * here + torch.arange(3)).unsqueeze(1).requires_grad_()
    everyone = torch.cat([100.0 * r + torch.arange(3) for r in range(world)]).unsqueeze(1)
    assert torch.equal(all_gather(x), everyone)
    assert not all_gather(x).requires_grad
    gathered = all_gather_with_grad(x)
    assert torch.equal(gathered, everyone)
    (gathered.squeeze(1) * torch.arange(1.0, 3 * world + 1) * (here + 1)).sum().backward()
    ranks = sum(r + 1 for r in range(world))  # the gradient of the sum of all ranks' losses
    assert torch.equal(x.grad.squeeze(1), (torch.arange(1.0, 4) + 3 * here) * ranks)

    rows = (10.0 * here + torch.arange(world)).requires_grad_()
    came = all_to_all(rows)
    assert came.tolist() == [10.0 * r + here for r in range(world)]
    (came * torch.arange(1.0, world + 1)).sum().backward()
    assert rows.grad.tolist() == [here + 1.0] * world
    assert all_to_all(torch.full((world,), here)).tolist() == list(range(world))

    y = torch.ones(2, requires_grad=True)
    total = all_sum(y * (here + 1))
    assert total.tolist() == [ranks, ranks]
    total.sum().backward()
    assert y.grad.tolist() == [world * (here + 1.0)] * 2
    return True


def shuffled(batch):
    world, here = world_size(), rank()
    torch.manual_seed(here)
    mine = 100 * here + torch.arange(batch).unsqueeze(1).expand(batch, 2)
    dealt, order = shuffle(mine)
    assert torch.equal(unshuffle(dealt, order), mine)
    assert sorted(all_gather(dealt)[:, 0].tolist()) == sorted(all_gather(mine)[:, 0].tolist())
    per_rank = torch.bincount(dealt[:, 0] // 100, minlength=world)
    assert per_rank.max() - per_rank.min() <= 1, "every rank's company is mixed evenly"
    return dealt[:, 0].tolist()


def test_in_one_process_nothing_happens():
    assert (world_size(), rank()) == (1, 0)
    x = torch.randn(4, 2, requires_grad=True)
    assert all(torch.equal(f(x), x) for f in (all_gather, all_gather_with_grad, all_sum))
    assert torch.equal(all_to_all(x[:1]), x[:1])
    assert len(set(map(tuple, (shuffled(6) for _ in range(3))))) == 1  # the same seed, the same order
    assert shuffled(6) != list(range(6))


@pytest.mark.parametrize("world", [2, 3])
def test_collectives(world):
    assert all(run_ranks(world, collectives))


@pytest.mark.parametrize(("world", "batch"), [(2, 5), (3, 4), (3, 1)])
def test_shuffle_deals_every_sample_once_and_finds_it_again(world, batch):
    dealt = run_ranks(world, shuffled, batch)
    assert sorted(itertools.chain(*dealt)) == sorted(100 * r + i for r in range(world) for i in range(batch))


BATCH_NORM_INPUTS = {"1d": (6, 3), "2d": (6, 3, 4, 5)}


def batch_norm(shape, affine, dtype):
    norm = torch.nn.BatchNorm1d(3, affine=affine) if len(shape) == 2 else torch.nn.BatchNorm2d(3, affine=affine)
    if affine:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    x = torch.randn(shape, dtype=dtype) * 3 + 50  # a mean that one-pass variance would cancel against
    return norm.to(dtype), x, torch.randn(shape, dtype=dtype)


def batch_norm_of_a_part(shape, affine, dtype, sizes):
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
    outs, dxs, parameters, states = zip(*run_ranks(2, batch_norm_of_a_part, shape, affine, torch.float64, sizes))
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
    alone = SyncBatchNorm(3)
    torch.testing.assert_close(alone(x), module(x))
    torch.testing.assert_close(alone.state_dict(), module[0].state_dict())
