import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.contract import Batch
from fastssl.distributed import all_gather, rank, world_size
from fastssl.methods import moco_v1, moco_v2
from fastssl.methods.moco_v1 import MoCo
from fastssl.ops import dispatch
from tests.support.close import FLOOR
from tests.support.contract import refused
from tests.support.golden import part, read
from tests.support.ranks import run_ranks


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(20, 16)

    def forward(self, x):
        return self.fc(x)


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2"])
def test_four_golden_steps(name):
    """Losses, gradients, queue, pointer and key encoder, while the queue of 24 wraps under batches of 8."""
    golden, meta = read(name)
    moco = MoCo(OneLayer(), meta["K"], meta["temperature"], meta["momentum"], mlp=meta["mlp"]).double()
    moco.load_state_dict(part(golden, "state."), strict=True)
    optimizer = torch.optim.SGD(moco.encoder_q.parameters(), lr=meta["sgd_lr"])
    moco.encoder_k.update(moco.encoder_q)  # the reference also updates before the first step
    for step in range(4):
        expected = part(golden, f"step{step}.")
        for key, value in part(expected, "encoder_k.").items():
            torch.testing.assert_close(moco.state_dict()[f"encoder_k.{key}"], value, rtol=1e-9, atol=1e-9)
        views = expected["im_q"].double(), expected["im_k"].double()
        loss, metrics = moco(Batch(views, None, None))
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected["loss"][0], rtol=1e-9, atol=1e-9)
        wins = (expected["logits"][:, 1:] < expected["logits"][:, :1]).all(1)
        assert metrics["top1"] == wins.float().mean()
        for key, value in part(expected, "grad.encoder_q.").items():
            torch.testing.assert_close(moco.encoder_q.get_parameter(key).grad, value, rtol=1e-9, atol=1e-9)
        optimizer.step()
        optimizer.zero_grad()
        moco.after_step(0.0)
    # The file holds the queue as it was after the last step under the name of every step (tests/golden/README.md).
    torch.testing.assert_close(moco.state_dict()["queue"], expected["queue"], rtol=1e-9, atol=1e-9)
    assert torch.equal(moco.state_dict()["queue_ptr"], expected["queue_ptr"])


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2"])
def test_float32_errors_do_not_exceed_those_of_plain_torch(name):
    """Each of the four golden steps starts from the exact weights, so that errors do not accumulate."""
    golden, meta = read(name)
    sizes = meta["K"], meta["temperature"], meta["momentum"], meta["mlp"]
    exact = MoCo(OneLayer(), *sizes).double()
    exact.load_state_dict(part(golden, "state."), strict=True)
    optimizer = torch.optim.SGD(exact.encoder_q.parameters(), lr=meta["sgd_lr"])
    exact.encoder_k.update(exact.encoder_q)
    errors, losses = {"kernel": [], "plain": []}, {"kernel": [], "plain": []}
    for step in range(4):
        expected = part(golden, f"step{step}.")
        views = expected["im_q"], expected["im_k"]
        for backend, context in (("kernel", contextlib.nullcontext), ("plain", dispatch.reference)):
            moco = MoCo(OneLayer(), *sizes)
            moco.load_state_dict(exact.state_dict())
            with context():
                loss, _ = moco(Batch(tuple(view.float() for view in views), None, None))
                loss.backward()
            losses[backend].append(loss.detach().double() - expected["loss"][0])
            for key, gradient in part(expected, "grad.encoder_q.").items():
                error = moco.encoder_q.get_parameter(key).grad.double() - gradient
                errors[backend].append((error / gradient.square().mean().sqrt()).flatten())
        exact(Batch(tuple(view.double() for view in views), None, None))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        exact.after_step(0.0)
    kernel, plain = (torch.cat(errors[backend]).square().mean().sqrt() for backend in ("kernel", "plain"))
    assert kernel <= plain + FLOOR[torch.float32]
    kernel, plain = (torch.stack(losses[backend]).square().mean().sqrt() for backend in ("kernel", "plain"))
    assert kernel <= plain + FLOOR[torch.float32] * expected["loss"][0]


def tiny():
    config = moco_v2.Config.small()
    config.queue_size, config.bn_splits, config.symmetric = 24, 4, False
    return moco_v2.build(config)


def batch(size=8):
    return Batch((torch.randn(size, 3, 32, 32), torch.randn(size, 3, 32, 32)), None, None)


def test_state_dict_round_trip_is_bit_equal_with_official_names():
    moco, restored = tiny(), tiny()
    moco(batch())
    moco.after_step(0)
    state = moco.state_dict()
    assert state["queue"].shape == (128, 24)
    assert "encoder_k.conv1.weight" in state
    assert "encoder_k.fc.2.weight" in state
    restored.load_state_dict(state, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), restored.state_dict().values(), strict=True))
    assert restored.criterion.queue.shape == (24, 128)


def test_forward_reads_and_after_step_writes():
    moco = tiny()
    before = copy.deepcopy(moco.state_dict())
    loss, _ = moco(batch())
    loss.backward()
    changed = [k for k, v in moco.state_dict().items() if not torch.equal(v, before[k])]
    assert all("running_" in key or "num_batches" in key for key in changed)
    torch.optim.SGD(moco.encoder_q.parameters(), lr=0.1).step()
    moco.after_step(0)
    assert moco.criterion.queue_ptr.item() == 8
    assert not torch.equal(moco.state_dict()["encoder_k.conv1.weight"], before["encoder_k.conv1.weight"])


def test_keys_have_no_gradient_and_the_key_encoder_is_not_trained():
    moco = tiny()
    assert not any(p.requires_grad for p in moco.encoder_k.parameters())
    assert not moco.keys(batch().views[1]).requires_grad


def test_shuffled_keys_return_to_their_order():
    moco = tiny().eval()  # batch norms in evaluation mode do not depend on the batch
    images = batch().views[1]
    shuffled = moco.keys(images)
    moco.shuffled = False
    torch.testing.assert_close(shuffled, moco.keys(images))


def test_features_are_the_inputs_of_the_head():
    moco = tiny().eval()
    images = batch().views[0]
    features = moco.features(images)
    assert features.shape == (8, 256)
    torch.testing.assert_close(moco.encoder_q.fc(features), moco.encoder_q(images))


def test_error_sentences():
    refused("InfoNCELoss: tau must be > 0, got 0", ValueError, MoCo, OneLayer(), tau=0)
    refused("InfoNCELoss: queue_size must be at least 1, got 0", ValueError, MoCo, OneLayer(), queue_size=0)
    config = moco_v2.Config()
    config.training.batch_size = 30
    refused("moco: batch_size must be divisible by bn_splits=8, got 30", ValueError, moco_v2.build, config)
    refused(
        "backbone: unknown name 'resnet5': there are resnet50, resnet152, resnet34, and timm:NAME or torchvision:NAME "
        "for the networks of these libraries",
        ValueError,
        moco_v2.build,
        moco_v2.Config(backbone="resnet5"),
    )


def test_symmetric_loss_is_the_mean_of_both_directions():
    moco = tiny().eval()
    moco.symmetric = moco.shuffled = False
    view1, view2 = batch().views
    with torch.no_grad():
        losses = [moco(Batch(views, None, None))[0] for views in ((view1, view2), (view2, view1))]
    moco.symmetric = True
    loss, _ = moco(Batch((view1, view2), None, None))
    torch.testing.assert_close(loss, sum(losses) / 2)
    moco.after_step(0)
    assert moco.criterion.queue_ptr.item() == 16


def test_defaults_are_those_of_the_papers():
    """Section 4 of MoCo; section 3 and table 1 of MoCo v2. In v1 jitter is applied after grayscale."""
    v1, v2 = moco_v1.Config.paper(), moco_v2.Config.paper("resnet101")
    assert (v1.tau, v2.tau, v1.queue_size, v1.ema_momentum, v1.dim) == (0.07, 0.2, 65536, 0.999, 128)
    assert (v1.training.lr_drops, v2.training.lr_drops) == ((120, 160), ())
    for config in (v1, v2):
        t = config.training
        assert (t.optimizer, t.lr, t.momentum, t.weight_decay, t.decay_all) == ("sgd", 0.03, 0.9, 1e-4, True)
        assert (t.epochs, t.batch_size, config.augmentation.views[0]) == (200, 256, config.augmentation.views[1])
    view1, view2 = v1.augmentation.views[0], v2.augmentation.views[0]
    assert (view1.jitter, view1.jitter_p, view1.grayscale_first, view1.blur_p) == ((0.4, 0.4, 0.4, 0.4), 1.0, True, 0.0)
    assert (view2.jitter, view2.jitter_p, view2.grayscale_first, view2.blur_p) == (
        (0.4, 0.4, 0.4, 0.1),
        0.8,
        False,
        0.5,
    )
    assert v2.backbone == "resnet101"


def test_v1_has_a_linear_head_and_v2_an_mlp():
    heads = [module.build(module.Config.small()).encoder_q.fc for module in (moco_v1, moco_v2)]
    assert [type(head) for head in heads] == [nn.Linear, nn.Sequential]
    kinds = nn.Linear, nn.ReLU, nn.Linear
    assert all(isinstance(layer, kind) for layer, kind in zip(heads[1], kinds, strict=True))


def four_steps(shard=False, world=1, rank=0):
    """Mean losses and state of four SGD steps; with several ranks under DDP, on this rank's part of the batch."""
    torch.manual_seed(0)
    moco = MoCo(OneLayer(), 24, 0.2, 0.9, mlp=True, shuffled=True, shard_queue=shard).double()
    wrapped = DistributedDataParallel(moco, broadcast_buffers=False) if world > 1 else moco
    optimizer = torch.optim.SGD(moco.encoder_q.parameters(), lr=0.1)
    losses = []
    for step in range(4):  # 10 keys per step wrap around in the queue of 24
        generator = torch.Generator().manual_seed(step)
        views = torch.randn(2, 10, 20, dtype=torch.float64, generator=generator)
        loss, metrics = wrapped(Batch(tuple(view.chunk(world)[rank] for view in views), None, None))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moco.after_step(0)
        losses.append(torch.stack([all_gather(x.detach().double().view(1)).mean() for x in (loss, metrics["top1"])]))
    return torch.stack(losses), moco.state_dict()


def four_steps_on_this_rank(shard):
    return four_steps(shard, world_size(), rank())


@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_equal_one_process_with_the_whole_batch(shard):
    """Shuffled and unshuffled keys, order of the queue, mean of gradients by DDP; whole or sharded queues."""
    losses, state = four_steps()
    for rank_losses, rank_state in run_ranks(2, four_steps_on_this_rank, shard):
        torch.testing.assert_close(rank_losses, losses, rtol=1e-11, atol=0)
        torch.testing.assert_close(rank_state, state, rtol=1e-10, atol=1e-12)


def splits_on_this_rank():
    config = moco_v1.Config("resnet_mini", queue_size=24)
    config.training.batch_size = 16
    unsplit = moco_v1.Config("resnet_mini", queue_size=24, bn_splits=1)
    return moco_v1.build(config).encoder_q.bn1.splits, moco_v1.build(unsplit).shuffled


def test_ranks_share_the_splits_of_batch_norm():
    """8 parts of the whole batch, as on the paper's 8 GPUs, are 4 parts on each of two ranks. Several ranks always
    shuffle, since each rank has separate batch-norm statistics."""
    assert splits_on_this_rank() == (8, False)
    assert run_ranks(2, splits_on_this_rank) == [(4, True)] * 2
