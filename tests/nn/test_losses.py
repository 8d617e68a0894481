"""InfoNCE with its queue and NT-Xent as modules: in one process, and over two and three ranks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.distributed import all_gather, rank, world_size
from fastssl.nn import InfoNCELoss, KeyQueue, NTXentLoss
from fastssl.nn.losses import _loss_over_shards
from tests.support.contract import refused
from tests.support.ranks import run_ranks

K, D, BATCH = 24, 8, 5


def official(q, k, queue, tau):
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / tau
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def test_forward_is_the_formula_and_enqueues_in_training_alone():
    criterion = InfoNCELoss(D, K, tau=0.2).double()
    queue = criterion.queue.clone()
    for step in range(6):  # the sixth batch of five wraps in the middle
        q, k = torch.randn(2, BATCH, D, dtype=torch.float64).unbind(0)
        q.requires_grad_()
        loss = criterion(q, k)
        torch.testing.assert_close(loss, official(q, k, queue, 0.2), rtol=1e-12, atol=0)
        loss.backward()
        queue[(step * BATCH + torch.arange(BATCH)) % K] = F.normalize(k.detach(), dim=1)
        torch.testing.assert_close(criterion.queue, queue, rtol=1e-12, atol=0)
    with torch.no_grad():
        criterion(q, k)
    criterion.eval()(q, k)
    criterion.train().contrast(q, k)
    assert criterion.queue_ptr.item() == 6 * BATCH % K


def test_keys_that_require_a_gradient_are_refused():
    """lightly's loss with a memory bank gives its second argument a gradient, InfoNCELoss none."""
    criterion, q = InfoNCELoss(D, K), torch.randn(BATCH, D, requires_grad=True)
    queue = criterion.queue.clone()
    for call in (criterion, criterion.contrast):
        refused(
            "InfoNCELoss: k must not require a gradient, since keys get none: pass k.detach(), or use "
            "fastssl.ops.batch_info_nce, which gives a gradient to queries and keys",
            ValueError,
            call,
            q,
            torch.randn(BATCH, D, requires_grad=True),
        )
    assert torch.equal(criterion.queue, queue)
    with torch.no_grad():
        criterion(q, torch.randn(BATCH, D, requires_grad=True))


def test_a_queue_that_is_called_names_enqueue():
    sentence = "KeyQueue: write keys by enqueue(keys) and read them as .queue [K, D]: no call"
    refused(sentence, TypeError, KeyQueue(D, K), torch.randn(BATCH, D))


def test_a_trained_temperature_gets_its_gradient():
    criterion = InfoNCELoss(D, K, tau=nn.Parameter(torch.tensor(0.3))).double()
    assert "tau" in criterion.state_dict()
    q, k = torch.randn(2, BATCH, D, dtype=torch.float64)
    queue, tau = criterion.queue.clone(), criterion.tau.detach().clone().requires_grad_()
    criterion(q, k).backward()
    official(q, k, queue, tau).backward()
    torch.testing.assert_close(criterion.tau.grad, tau.grad)


def test_the_queue_is_saved_in_the_official_layout_and_comes_back():
    criterion, other = InfoNCELoss(D, K, 0.2), InfoNCELoss(D, K, 0.2)
    criterion.enqueue(torch.randn(7, D))
    state = nn.ModuleDict({"criterion": criterion}).state_dict()
    assert {name: x.shape for name, x in state.items()} == {"criterion.queue": (D, K), "criterion.queue_ptr": (1,)}
    nn.ModuleDict({"criterion": other}).load_state_dict(state, strict=True)
    assert torch.equal(other.queue, criterion.queue)
    assert other.queue_ptr.item() == 7
    assert copy.deepcopy(criterion).queue.data_ptr() != criterion.queue.data_ptr()


def test_nt_xent_is_lightlys():
    from lightly.loss import NTXentLoss as LightlyNTXentLoss  # here: the processes of ranks import this file

    z1, z2 = torch.randn(2, 16, D, dtype=torch.float64)
    z1_ours, z1_lightly = (z1.clone().requires_grad_() for _ in range(2))
    loss, expected = NTXentLoss(0.5)(z1_ours, z2), LightlyNTXentLoss(0.5)(z1_lightly, z2)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # lightly's own float32 constants
    loss.backward()
    expected.backward()
    torch.testing.assert_close(z1_ours.grad, z1_lightly.grad, rtol=1e-5, atol=1e-8)


def test_info_nce_loss_is_lightlys_with_a_memory_bank():
    from lightly.loss import NTXentLoss as LightlyNTXentLoss

    lightly, criterion = LightlyNTXentLoss(0.2, memory_bank_size=(K, D)), InfoNCELoss(D, K, 0.2)
    criterion.queue.copy_(lightly.memory_bank.bank)
    for _ in range(3):  # a fourth batch of 8 would do too, but not of 7: lightly drops what goes past the end
        q, k = torch.randn(2, 8, D)
        expected = lightly(q.requires_grad_(), k)
        torch.testing.assert_close(criterion(q, k), expected)
        torch.testing.assert_close(criterion.queue, lightly.memory_bank.bank)


def test_shards_join_exactly_at_any_size_of_loss():
    """Beside the logarithm of sums in float64: losses of 1e-9 and of 1e3, where e^loss overflows."""
    negatives = torch.randn(4, 3, 50, dtype=torch.float64)
    for shift in (-25.0, -3.0, 0.0, 30.0, 1000.0):
        scores = negatives + shift  # of a negative, minus that of the positive
        zero = torch.zeros(4, 3, 1, dtype=torch.float64)
        parts = torch.cat([zero, scores], 2).logsumexp(2)
        if shift < 0:  # logsumexp itself would lose these digits
            parts = torch.log1p(scores.exp().sum(2))
        whole = torch.cat([zero[0], scores.transpose(0, 1).flatten(1)], 1).logsumexp(1)
        whole = torch.log1p(scores.exp().sum((0, 2))) if shift < 0 else whole
        torch.testing.assert_close(_loss_over_shards(parts), whole, rtol=1e-12, atol=1e-15)


def steps(dtype, tau):
    """Four steps of a rank with the sharded queue beside one big one that saw the same keys."""
    tau = nn.Parameter(torch.tensor(tau))
    big = InfoNCELoss(D, K, tau).to(dtype)
    torch.manual_seed(0)  # both queues begin with the same keys
    big.queue.copy_(F.normalize(torch.randn(K, D), dim=1))
    torch.manual_seed(0)
    shard = InfoNCELoss(D, K, copy.deepcopy(tau), shard=True).to(dtype)
    assert shard.queue.shape == (K // world_size(), D)
    assert shard.queue.dtype == dtype
    assert not list(shard.buffers())
    torch.manual_seed(10 + rank())
    close = {torch.float64: {"rtol": 1e-12, "atol": 1e-13}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}[dtype]
    for _ in range(4):
        q, k = torch.randn(2, BATCH, D, dtype=dtype)
        q_shard, q_big = (q.clone().requires_grad_() for _ in range(2))
        result, expected = shard.contrast(q_shard, k), big.contrast(q_big, k)
        torch.testing.assert_close(result.loss, expected.loss, **close)
        assert torch.equal(result.rank, expected.rank)
        shard(q_shard, k).backward()
        big(q_big, k).backward()
        torch.testing.assert_close(q_shard.grad, q_big.grad, **close)
        dtau_shards, dtau_big = all_gather(shard.tau.grad.view(1)).sum(), all_gather(big.tau.grad.view(1)).sum()
        torch.testing.assert_close(dtau_shards, dtau_big, **close)
        assert torch.equal(shard.full_queue(), big.queue)
    return resumed(shard, big) and big.state_dict()


def resumed(shard, big):
    """The whole queue in the state dict; one with any pointer is sharded again, oldest key first."""
    state = shard.state_dict()
    assert {name: x.shape for name, x in state.items()} == {name: x.shape for name, x in big.state_dict().items()}
    assert torch.equal(state["queue"], big.state_dict()["queue"])
    assert torch.equal(state["queue_ptr"], big.queue_ptr)
    state["queue_ptr"] = state["queue_ptr"] + 1
    state["queue"] = state["queue"].roll(1, 1)
    other = InfoNCELoss(D, K, copy.deepcopy(shard.tau), shard=True).to(shard.queue.dtype)
    other.load_state_dict(state, strict=True)
    keys = torch.randn(BATCH, D, dtype=shard.queue.dtype)
    other.enqueue(keys)
    big.enqueue(keys)
    oldest_first = [
        queue.roll(-int(ptr), 0)
        for queue, ptr in ((other.full_queue(), other.queue_ptr * world_size()), (big.queue, big.queue_ptr))
    ]
    assert torch.equal(*oldest_first)
    return True


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("world", [2, 3])
def test_sharded_queue_is_one_big_queue(world, dtype):
    first, *others = run_ranks(world, steps, dtype, 0.2)
    assert all(torch.equal(first["queue"], other["queue"]) for other in others)


class Contrasting(nn.Module):
    def __init__(self, shard):
        super().__init__()
        self.encoder, self.criterion = nn.Linear(4, D), InfoNCELoss(D, K, 0.2, shard=shard)

    def forward(self, one, two):
        return self.criterion(self.encoder(one), self.encoder(two).detach())


def under_ddp(shard):
    """DistributedDataParallel broadcasts the buffers of rank 0, at the start and at every step."""
    torch.manual_seed(rank())  # ranks that begin apart
    model = Contrasting(shard).double()
    before = model.criterion.queue.clone()
    parallel = DistributedDataParallel(model)
    if shard:
        assert torch.equal(model.criterion.queue, before)
    torch.manual_seed(0)
    model.criterion.load_state_dict({"queue": F.normalize(torch.randn(D, K), dim=0), "queue_ptr": torch.tensor([0])})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for views in data():
        one, two = (view.view(world_size(), BATCH, 4)[rank()] for view in views)
        loss = parallel(one, two)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(all_gather(loss.detach().view(1)).mean())
    return torch.stack(losses), model.state_dict()


def data():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 2 * BATCH, 4, dtype=torch.float64, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_under_ddp_are_one_process_with_their_batch(shard):
    model = Contrasting(False).double()
    results = run_ranks(2, under_ddp, shard)
    state = {"encoder.weight": None, "encoder.bias": None}
    torch.manual_seed(0)  # what rank 0 began with
    model = Contrasting(False).double()
    torch.manual_seed(0)
    model.criterion.load_state_dict({"queue": F.normalize(torch.randn(D, K), dim=0), "queue_ptr": torch.tensor([0])})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for one, two in data():
        loss = model(one, two)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    state = model.state_dict()
    for losses_of_rank, state_of_rank in results:
        torch.testing.assert_close(losses_of_rank, torch.stack(losses), rtol=1e-12, atol=0)
        torch.testing.assert_close(state_of_rank, state, rtol=1e-11, atol=1e-13)


def gathered_nt_xent():
    torch.manual_seed(0)
    z = torch.randn(2, world_size() * BATCH, D, dtype=torch.float64)
    one, two = (part.view(world_size(), BATCH, D)[rank()].clone().requires_grad_() for part in z)
    loss = NTXentLoss(0.3, gather=True)(one, two)
    loss.backward()
    return loss.detach(), one.grad, two.grad


def test_nt_xent_over_ranks_is_that_of_the_whole_batch():
    torch.manual_seed(0)
    z = torch.randn(2, 3 * BATCH, D, dtype=torch.float64)
    one, two = (part.clone().requires_grad_() for part in z)
    loss = NTXentLoss(0.3)(one, two)
    loss.backward()
    losses, ones, twos = zip(*run_ranks(3, gathered_nt_xent))
    torch.testing.assert_close(torch.stack(losses).mean(), loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat(ones) / 3, one.grad, rtol=1e-11, atol=1e-13)  # DDP divides by the ranks
    torch.testing.assert_close(torch.cat(twos) / 3, two.grad, rtol=1e-11, atol=1e-13)


def refused_shards():
    refused("KeyQueue: queue_size must be divisible by the 2 ranks, got 7", ValueError, KeyQueue, D, 7, shard=True)
    queue = KeyQueue(D, 8, shard=True)
    wrong = {"queue": torch.randn(D, 4), "queue_ptr": torch.zeros(1, dtype=torch.int64)}
    refused(
        f"KeyQueue: the queue to load must have shape [D, K] of this one, got [{D}, 4]",
        ValueError,
        queue.load_state_dict,
        wrong,
    )
    with pytest.raises(RuntimeError, match="Missing key"):
        queue.load_state_dict({})
    return True


def queue_of_another_world_size():
    ranks = KeyQueue(D, 8, shard=True)
    ranks._ranks = 1  # as if it had been built before the ranks met
    with pytest.raises(RuntimeError, match="sharded over 1 ranks, and there are 2: build it after init_process_group"):
        ranks.enqueue(torch.randn(2, D))
    return True


def test_a_queue_sharded_before_the_ranks_met_is_refused():
    assert all(run_ranks(2, queue_of_another_world_size))


def test_error_sentences():
    refused("InfoNCELoss: tau must be > 0, got 0", ValueError, InfoNCELoss, D, K, 0)
    refused("InfoNCELoss: queue_size must be at least 1, got 0", ValueError, InfoNCELoss, D, 0)
    refused("NTXentLoss: tau must be > 0, got -1", ValueError, NTXentLoss, -1)
    assert all(run_ranks(2, refused_shards))
