import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.contract import Batch, Method
from fastssl.distributed import all_gather, rank, world_size
from fastssl.methods import densecl
from fastssl.methods.densecl import DenseCL, DenseEncoder, DenseNeck
from fastssl.ops import dense_match
from tests.support.golden import part, read
from tests.support.memory import peak_memory
from tests.support.ranks import run_ranks


class OneConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(5, 8, 1)

    def feature_map(self, x):
        return self.conv(x).relu()


def golden_model(meta, **choices):
    neck = DenseNeck(8, 6)
    neck.mlp = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 6))
    neck.mlp2 = nn.Sequential(nn.Conv2d(8, 10, 1), nn.ReLU(), nn.Conv2d(10, 6, 1))
    queue = {
        "dim": 6,
        "queue_size": meta["queue_len"],
        "tau": meta["temperature"],
        "shard": choices.pop("shard", False),
    }
    encoder = DenseEncoder(OneConvolution(), neck)
    return DenseCL(encoder, queue, (meta["momentum"],) * 2, meta["loss_lambda"], **choices)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_four_golden_steps(dtype):
    """Matches, both losses, gradients, both queues and pointers, which wrap, and the key encoder."""
    golden, meta = read("densecl")
    model = golden_model(meta).to(dtype)
    model.load_state_dict(part(golden, "state."), strict=True)
    exact = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=meta["sgd_lr"])
    model.encoder_k.update(model.encoder_q)  # the reference also updates before the first step
    for step in range(4):
        expected = part(golden, f"step{step}.")
        for name, x in part(expected, "encoder_k.").items():
            torch.testing.assert_close(model.state_dict()[f"encoder_k.{name}"], x.to(dtype), **exact)
        views = expected["input.img"].to(dtype).unbind(1)
        assert torch.equal(dense_match(model.encoder_q(views[0])[0], model.keys(views[1])[0]), expected["match"])
        loss, metrics = model(Batch(views, None, None))
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected["loss"].to(dtype), **exact)
        share = meta["loss_lambda"]
        torch.testing.assert_close((1 - share) * metrics["loss_global"], expected["loss_single"].to(dtype), **exact)
        torch.testing.assert_close(share * metrics["loss_dense"], expected["loss_dense"].to(dtype), **exact)
        for name, gradient in part(expected, "grad.encoder_q.").items():
            torch.testing.assert_close(model.encoder_q.get_parameter(name).grad, gradient.to(dtype), **exact)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(0.0)
        state = model.state_dict()
        for name in ("queue", "queue2"):
            torch.testing.assert_close(state[name], expected[name].to(dtype), **exact)
        assert torch.equal(state["queue_ptr"], expected["queue_ptr"])
        assert torch.equal(state["queue2_ptr"], expected["queue_ptr"])


def tiny(**changes):
    config = densecl.Config.small()
    for name, value in {"dim": 16, "queue_size": 24, "symmetric": False, **changes}.items():
        setattr(config, name, value)
    return densecl.build(config)


def batch(size=8):
    return Batch(torch.randn(2, size, 3, 64, 64).unbind(), None, None)


def test_it_fulfils_the_contract_and_its_features_are_the_mean_of_the_map():
    model, images = tiny().eval(), torch.randn(4, 3, 64, 64)
    assert isinstance(model, Method)
    features = model.encoder_q[0].feature_map(images)
    assert features.shape == (4, 256, 4, 4)
    torch.testing.assert_close(model.features(images), features.mean((2, 3)))


def test_names_are_the_official_ones():
    with torch.device("meta"):
        state = densecl.build(densecl.Config()).state_dict()
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    assert shapes["encoder_q.0.layer4.2.conv3.weight"] == (2048, 512, 1, 1)
    assert shapes["encoder_k.1.mlp.0.weight"] == (2048, 2048)
    assert shapes["encoder_q.1.mlp2.2.weight"] == (128, 2048, 1, 1)
    assert shapes["queue"] == shapes["queue2"] == (128, 65536)
    parts = {name.split(".")[0] for name in state}
    assert parts == {"encoder_q", "encoder_k", "queue", "queue_ptr", "queue2", "queue2_ptr"}
    assert not any(".fc." in name for name in state)


def test_forward_reads_and_after_step_writes_both_queues():
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    model(batch())[0].backward()
    changed = [name for name, x in model.state_dict().items() if not torch.equal(x, before[name])]
    assert all("running_" in name or "num_batches" in name for name in changed)
    torch.optim.SGD(model.encoder_q.parameters(), lr=0.1).step()
    entries = model.pending[0][0]
    model.after_step(0.0)
    for name, keys in zip(("queue", "queue2"), entries):
        assert model.state_dict()[f"{name}_ptr"].item() == 8
        assert torch.equal(model.state_dict()[name][:, :8].T, keys)
    assert not model.pending


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_weight_divides_the_loss(weight):
    loss, metrics = tiny(dense_weight=weight)(batch())
    torch.testing.assert_close(loss.detach(), metrics["loss_dense" if weight else "loss_global"])


def test_the_dense_loss_at_batch_256_takes_7_mb_beyond_its_inputs_and_their_gradient():
    """The reference's peak at these sizes is 9,440 MiB: 12,544 queries with 65,536 negatives. Memory does not depend on
    the number of negatives, so a queue of 512 shows it."""
    criterion = densecl.InfoNCELoss(128, 512, 0.2, normalize=False)
    q = nn.functional.normalize(torch.randn(12544, 128), dim=1).requires_grad_()
    k = nn.functional.normalize(torch.randn(12544, 128), dim=1)

    def step():
        return torch.autograd.grad(criterion.contrast(q, k).loss.mean(), q)

    assert peak_memory(step) <= q.numel() * 4 + 7e6


def test_defaults_are_those_of_the_paper():
    config = densecl.Config.paper()
    t = config.training
    assert (t.optimizer, t.lr, t.weight_decay, t.decay_all, t.momentum) == ("sgd", 0.03, 1e-4, True, 0.9)
    assert (t.epochs, t.batch_size, t.lr_by_epoch) == (200, 256, True)
    assert (config.dim, config.queue_size, config.tau, config.ema_momentum) == (128, 65536, 0.2, 0.999)
    assert (config.dense_weight, config.symmetric) == (0.5, False)
    view = config.augmentation.views[0]
    assert (view.crop, view.jitter, view.jitter_p) == ((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8)
    assert (view.blur_p, view.grayscale_p, view.flip_p) == (0.5, 0.2, 0.5)


def four_steps(shard=False):
    """Mean losses and state of four SGD steps; with several ranks under DDP, on this rank's part of the batch."""
    golden, meta = read("densecl")
    model = golden_model(meta, shard=shard, shuffled=True, symmetric=True).double()
    model.load_state_dict(part(golden, "state."), strict=True)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if world_size() > 1 else model
    optimizer, losses = torch.optim.SGD(model.encoder_q.parameters(), lr=0.1), []
    for step in range(4):
        images = golden[f"step{step}.input.img"].double().chunk(world_size())[rank()]
        loss, metrics = wrapped(Batch(images.unbind(1), None, None))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(0.0)
        values = (loss.detach(), metrics["loss_global"], metrics["loss_dense"])
        losses.append(torch.stack([all_gather(x.view(1)).mean() for x in values]))
    return torch.stack(losses), model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_equal_one_process_with_the_whole_batch(shard):
    """Shuffled keys, features and places; order of both queues; mean of gradients by DDP; whole or sharded queues."""
    losses, state = four_steps()
    for rank_losses, rank_state in run_ranks(2, four_steps, shard):
        torch.testing.assert_close(rank_losses, losses, rtol=1e-11, atol=0)
        torch.testing.assert_close(rank_state, state, rtol=1e-10, atol=1e-12)
