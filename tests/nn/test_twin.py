import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from fastssl.nn.twin import MomentumTwin


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_update_is_the_formula_and_leaves_buffers_alone():
    module = net()
    twin = MomentumTwin(module, 0.9)
    with torch.no_grad():
        module[0].weight.add_(1)
    module[1].running_mean.fill_(5)
    before = copy.deepcopy(twin.state_dict())
    twin.update(module)
    torch.testing.assert_close(twin.state_dict()["0.weight"], 0.9 * before["0.weight"] + 0.1 * module[0].weight.data)
    assert torch.equal(twin.state_dict()["1.running_mean"], before["1.running_mean"])
    twin.update(module, momentum=0.0)
    assert torch.equal(twin.state_dict()["0.weight"], module[0].weight)


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_buffers_may_follow(buffers):
    """Averaged they are timm's ModelEmaV3 with its defaults: floating ones too, and the count of batches copied."""
    module = net()
    twin, theirs = MomentumTwin(module, 0.9, buffers), ModelEmaV3(module, 0.9)
    for _ in range(3):
        module(torch.randn(6, 3))
        with torch.no_grad():
            module[0].weight.add_(1)
        twin.update(module)
        theirs.update(module)
        if buffers == "average":
            torch.testing.assert_close(twin.state_dict(), theirs.module.state_dict())
        else:
            assert all(torch.equal(a, b) for a, b in zip(twin.buffers(), module.buffers(), strict=True))
    assert not torch.equal(twin.state_dict()["0.weight"], module[0].weight)
    with pytest.raises(ValueError, match="MomentumTwin: buffers must be 'own', 'average' or 'copy', got 'mean'"):
        MomentumTwin(module, buffers="mean")


def test_names_are_those_of_the_module():
    holder = nn.Module()
    holder.encoder_k = MomentumTwin(net())
    assert list(holder.state_dict()) == [f"encoder_k.{name}" for name in net().state_dict()]
    holder.load_state_dict(holder.state_dict(), strict=True)
    MomentumTwin(net()).load_state_dict(net().state_dict(), strict=True)


def test_twin_is_copied_and_gives_no_gradient():
    module = net()
    twin = copy.deepcopy(MomentumTwin(module))
    assert not any(p.requires_grad for p in twin.parameters())
    assert all(p.requires_grad for p in module.parameters())
    assert not twin(torch.randn(5, 3, requires_grad=True)).requires_grad
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in module.parameters()}
