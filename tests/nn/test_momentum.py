import copy
import threading

import pytest
import timm
import torch
import torchvision
from timm.utils import ModelEmaV3
from torch import nn

from fastssl.nn.momentum import MomentumEncoder
from fastssl.nn.vit import ViT
from tests.support.contract import refused


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_update_is_the_formula_and_leaves_buffers_alone():
    module = net()
    ema = MomentumEncoder(module, 0.9)
    with torch.no_grad():
        module[0].weight.add_(1)
    module[1].running_mean.fill_(5)
    before = copy.deepcopy(ema.state_dict())
    ema.update(module)
    torch.testing.assert_close(ema.state_dict()["0.weight"], 0.9 * before["0.weight"] + 0.1 * module[0].weight.data)
    assert torch.equal(ema.state_dict()["1.running_mean"], before["1.running_mean"])
    ema.update(module, momentum=0.0)
    assert torch.equal(ema.state_dict()["0.weight"], module[0].weight)


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_buffers_may_follow(buffers):
    """Averaged they are timm's ModelEmaV3 with its defaults: floating ones too, and the count of batches duplicate."""
    module = net()
    ema, timm_ema = MomentumEncoder(module, 0.9, buffers), ModelEmaV3(module, 0.9)
    for _ in range(3):
        module(torch.randn(6, 3))
        with torch.no_grad():
            module[0].weight.add_(1)
        ema.update(module)
        timm_ema.update(module)
        if buffers == "average":
            torch.testing.assert_close(ema.state_dict(), timm_ema.module.state_dict())
        else:
            assert all(torch.equal(a, b) for a, b in zip(ema.buffers(), module.buffers(), strict=True))
    assert not torch.equal(ema.state_dict()["0.weight"], module[0].weight)
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
    ema = copy.deepcopy(MomentumEncoder(module))
    assert not any(p.requires_grad for p in ema.parameters())
    assert all(p.requires_grad for p in module.parameters())
    assert not ema(torch.randn(5, 3, requires_grad=True)).requires_grad
    assert not {p.data_ptr() for p in ema.parameters()} & {p.data_ptr() for p in module.parameters()}


class Encoder(nn.Module):
    """Layers whose weights are duplicate in low precision, and one whose weights are not."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.offset = nn.Parameter(torch.randn(1, 5, 1))

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean((2, 3))) + self.offset[0, :, 0]


def weights_used(ema, images):
    """Parameters by name, as a call under autocast uses them."""
    with torch.autocast("cpu", torch.bfloat16):
        module = ema._module_to_run()
        ema(images)
    return dict(module.named_parameters())


def test_under_autocast_the_update_writes_the_low_precision_weights():
    """Results are bit-equal to those without copies; nothing is cast, and averaged weights and state stay float32."""
    module, images = Encoder().eval(), torch.randn(4, 3, 8, 8)
    ema, plain = MomentumEncoder(module, 0.9), MomentumEncoder(module, 0.9)
    used = weights_used(ema, images)
    assert {name for name, p in used.items() if p.dtype == torch.bfloat16} == {"conv.weight", "fc.weight"}
    for _ in range(3):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        ema.update(module)
        plain.update(module)
        assert all(a is b for a, b in zip(weights_used(ema, images).values(), used.values()))
        for name, master in plain.module.named_parameters():
            assert torch.equal(ema.state_dict()[name], master) and master.dtype == torch.float32
            assert torch.equal(used[name], master.to(used[name].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ema(images), plain.module(images))


def test_low_precision_copies_are_never_stale():
    module, images = Encoder(), torch.randn(4, 3, 8, 8)
    ema = MomentumEncoder(module)
    weights_used(ema, images)
    changes = [
        lambda: ema.load_state_dict({name: x + 1 for name, x in ema.state_dict().items()}),
        lambda: (ema.module.fc.weight.data.normal_(), ema.to("cpu")),
        lambda: ema.module.fc.weight.requires_grad_(False).mul_(2),
    ]
    for change in changes:
        change()
        used = weights_used(ema, images)
        assert torch.equal(used["fc.weight"], ema.module.fc.weight.bfloat16())
    duplicate = copy.deepcopy(ema)
    assert duplicate._low_precision is None and torch.equal(duplicate.module.fc.weight, ema.module.fc.weight)
    ema.eval()
    weights_used(ema, images)
    assert not any(m.training for m in ema._low_precision.module.modules())
    assert "0.weight" not in ema.state_dict() and len(ema.state_dict()) == len(module.state_dict())


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


def called_before(net):
    net(torch.ones(2, 3)).sum().backward()
    return net


def old_weight_norm():
    return nn.Sequential(nn.Linear(3, 3), torch.nn.utils.weight_norm(nn.Linear(3, 3, bias=False)))


UNUSUAL = {
    "old weight norm": old_weight_norm,
    "old weight norm after a call": lambda: called_before(old_weight_norm()),
    "weight norm": lambda: nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))),
    "orthogonal": lambda: nn.Sequential(torch.nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))),
    "tied": tied,
    "compiled": lambda: torch.compile(nn.Linear(3, 3), backend="eager"),
    "a compiled part": lambda: nn.Sequential(torch.compile(nn.Linear(3, 3), backend="eager"), nn.Linear(3, 3)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_modules_are_copied_and_follow(name):
    """DINO's last layer has old-style weight norm, whose weight torch's deepcopy refuses."""
    module, x = UNUSUAL[name](), torch.randn(4, 3)
    ema = MomentumEncoder(module, 0.5)
    assert list(ema.state_dict()) == list(module.state_dict())
    torch.testing.assert_close(ema(x), module(x))
    before = copy.deepcopy(ema.state_dict())
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.rand_like(p))
    ema.update(module)
    for key, value in module.named_parameters():
        torch.testing.assert_close(ema.state_dict()[key], 0.5 * (before[key] + value.data))
    ema.update(module, momentum=0.0)
    torch.testing.assert_close(ema(x), module(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ema(x), module(x), rtol=0.05, atol=0.05)
        kept = ema._low_precision
        ema(x)
        assert ema._low_precision is kept, "the copy of a call serves the next one"
    assert not any(p.requires_grad for p in ema.parameters()) and all(p.requires_grad for p in module.parameters())
    torch.testing.assert_close(copy.deepcopy(ema)(x), ema(x))


def test_modules_that_cannot_be_copied_or_do_not_fit_are_refused():
    module = net()
    module.lock = threading.Lock()
    reason = "TypeError: cannot pickle '_thread.lock' object"
    refused(f"MomentumEncoder: Sequential can't be copied ({reason})", ValueError, MomentumEncoder, module)
    sentence = "MomentumEncoder: module must be the one inside DataParallel, module.module"
    refused(sentence, ValueError, MomentumEncoder, nn.DataParallel(net()))
    ema = MomentumEncoder(net())
    sentence = "MomentumEncoder: update must get the module that was copied, with its 4 parameters and their shapes"
    refused(f"{sentence}, got one with 2", ValueError, ema.update, nn.Linear(3, 4))
    refused(f"{sentence}, got one with 4", ValueError, ema.update, nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)))


@pytest.mark.parametrize(
    "build",
    [
        lambda: ViT(8, 4, embed_dim=16, depth=3, num_heads=2, drop_path_rate=0.5),
        lambda: timm.models.VisionTransformer(8, 4, embed_dim=16, depth=3, num_heads=2, drop_path_rate=0.5),
        lambda: torchvision.models.swin_transformer.SwinTransformer([4, 4], 8, [1, 1], [1, 1], [2, 2], num_classes=3),
    ],
    ids=["ours", "timm", "torchvision"],
)
def test_a_copy_without_stochastic_depth(build):
    """DINO's teacher is in training mode and drops no paths; its student does."""
    module, images = build().train(), torch.randn(2, 3, 8, 8)
    teacher = MomentumEncoder(module, drop_path=False)
    assert torch.equal(teacher(images), teacher(images))
    assert any(not torch.equal(MomentumEncoder(module)(images), teacher(images)) for _ in range(8))
