import copy

import pytest
import torch
from torch import nn

from fastssl.data.loader import Batch
from fastssl.methods import moco_v2
from fastssl.methods.moco_v2 import MoCo
from tests.golden.golden import part, read
from tests.ops.contract import refused


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
    moco.encoder_k.update(moco.encoder_q)  # the reference updates before the first step too
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
    assert torch.equal(moco.queue_ptr, expected["queue_ptr"])


def tiny():
    config = moco_v2.Config.small()
    config.queue_size, config.bn_splits, config.symmetric = 24, 4, False
    return moco_v2.build(config)


def batch(size=8):
    return Batch((torch.randn(size, 3, 32, 32), torch.randn(size, 3, 32, 32)), None, None)


def test_state_dict_round_trip_is_bit_equal_and_official():
    moco, other = tiny(), tiny()
    moco(batch())
    moco.after_step(0)
    state = moco.state_dict()
    assert state["queue"].shape == (128, 24)
    assert "encoder_k.conv1.weight" in state
    assert "encoder_k.fc.2.weight" in state
    other.load_state_dict(state, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), other.state_dict().values(), strict=True))
    assert other.queue.shape == (24, 128)


def test_forward_reads_and_after_step_writes():
    moco = tiny()
    before = copy.deepcopy(moco.state_dict())
    loss, _ = moco(batch())
    loss.backward()
    changed = [k for k, v in moco.state_dict().items() if not torch.equal(v, before[k])]
    assert all("running_" in key or "num_batches" in key for key in changed)
    torch.optim.SGD(moco.encoder_q.parameters(), lr=0.1).step()
    moco.after_step(0)
    assert moco.queue_ptr.item() == 8
    assert not torch.equal(moco.state_dict()["encoder_k.conv1.weight"], before["encoder_k.conv1.weight"])


def test_keys_carry_no_gradient_and_the_twin_is_not_trained():
    moco = tiny()
    assert not any(p.requires_grad for p in moco.encoder_k.parameters())
    assert not moco.keys(batch().views[1]).requires_grad


def test_shuffled_keys_come_back_in_their_places():
    moco = tiny().eval()  # in evaluation batch norm knows no company
    images = batch().views[1]
    shuffled = moco.keys(images)
    moco.shuffle = False
    torch.testing.assert_close(shuffled, moco.keys(images))


def test_features_are_what_goes_into_the_head():
    moco = tiny().eval()
    images = batch().views[0]
    features = moco.features(images)
    assert features.shape == (8, 256)
    torch.testing.assert_close(moco.encoder_q.fc(features), moco.encoder_q(images))


def test_error_sentences():
    refused("MoCo: tau must be > 0, got 0", ValueError, MoCo, OneLayer(), tau=0)
    refused("MoCo: queue_size must be at least 1, got 0", ValueError, MoCo, OneLayer(), queue_size=0)
    config = moco_v2.Config()
    config.training.batch_size = 30
    refused("moco_v2: batch_size must be divisible by bn_splits=8, got 30", ValueError, moco_v2.build, config)
    refused(
        "resnet: unknown backbone 'resnet5', there are resnet_mini, resnet18, resnet34, resnet50, resnet101, resnet152",
        ValueError, moco_v2.build, moco_v2.Config(backbone="resnet5"),
    )  # fmt: skip


def test_symmetric_loss_is_the_mean_of_both_directions():
    moco = tiny().eval()
    moco.symmetric = moco.shuffle = False
    one, two = batch().views
    losses = [moco(Batch(views, None, None))[0] for views in ((one, two), (two, one))]
    moco.symmetric = True
    loss, _ = moco(Batch((one, two), None, None))
    torch.testing.assert_close(loss, sum(losses) / 2)
    moco.after_step(0)
    assert moco.queue_ptr.item() == 16
