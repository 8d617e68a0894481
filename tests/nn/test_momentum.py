import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from fastssl.nn.momentum import MomentumEncoder


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_update_is_the_formula_and_leaves_buffers_alone():
    module = net()
    twin = MomentumEncoder(module, 0.9)
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
    twin, theirs = MomentumEncoder(module, 0.9, buffers), ModelEmaV3(module, 0.9)
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
    with pytest.raises(ValueError, match="MomentumEncoder: buffers must be 'keep', 'average' or 'copy', got 'mean'"):
        MomentumEncoder(module, buffers="mean")


def test_names_are_those_of_the_module():
    holder = nn.Module()
    holder.encoder_k = MomentumEncoder(net())
    assert list(holder.state_dict()) == [f"encoder_k.{name}" for name in net().state_dict()]
    holder.load_state_dict(holder.state_dict(), strict=True)
    MomentumEncoder(net()).load_state_dict(net().state_dict(), strict=True)


def test_momentum_is_copied_and_gives_no_gradient():
    module = net()
    twin = copy.deepcopy(MomentumEncoder(module))
    assert not any(p.requires_grad for p in twin.parameters())
    assert all(p.requires_grad for p in module.parameters())
    assert not twin(torch.randn(5, 3, requires_grad=True)).requires_grad
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in module.parameters()}


class Encoder(nn.Module):
    """Every kind of layer that a shadow must tell apart."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.offset = nn.Parameter(torch.randn(1, 5, 1))

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean((2, 3))) + self.offset[0, :, 0]


def weights_seen(twin, images):
    """The weights that a call computed with."""
    seen = {}
    with torch.autocast("cpu", torch.bfloat16):
        computing = twin._module_to_run()
        twin(images)
    for name, p in computing.named_parameters():
        seen[name] = p
    return seen


def test_under_autocast_the_update_writes_what_calls_compute_with():
    """Equal to a twin without shadows to the last bit, while nothing is cast and masters and state stay float32."""
    module, images = Encoder().eval(), torch.randn(4, 3, 8, 8)
    twin, plain = MomentumEncoder(module, 0.9), MomentumEncoder(module, 0.9)
    seen = weights_seen(twin, images)
    assert {name for name, p in seen.items() if p.dtype == torch.bfloat16} == {"conv.weight", "fc.weight"}
    for _ in range(3):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        twin.update(module)
        plain.update(module)
        assert all(a is b for a, b in zip(weights_seen(twin, images).values(), seen.values()))
        for name, master in plain.module.named_parameters():
            assert torch.equal(twin.state_dict()[name], master) and master.dtype == torch.float32
            assert torch.equal(seen[name], master.to(seen[name].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(twin(images), plain.module(images))


def test_a_shadow_never_outlives_its_original():
    module, images = Encoder(), torch.randn(4, 3, 8, 8)
    twin = MomentumEncoder(module)
    weights_seen(twin, images)
    changes = [
        lambda: twin.load_state_dict({name: x + 1 for name, x in twin.state_dict().items()}),
        lambda: (twin.module.fc.weight.data.normal_(), twin.to("cpu")),
        lambda: twin.module.fc.weight.requires_grad_(False).mul_(2),
    ]
    for change in changes:
        change()
        seen = weights_seen(twin, images)
        assert torch.equal(seen["fc.weight"], twin.module.fc.weight.bfloat16())
    copied = copy.deepcopy(twin)
    assert copied._low_precision is None and torch.equal(copied.module.fc.weight, twin.module.fc.weight)
    twin.eval()
    weights_seen(twin, images)
    assert not any(m.training for m in twin._low_precision.module.modules())
    assert "0.weight" not in twin.state_dict() and len(twin.state_dict()) == len(module.state_dict())
