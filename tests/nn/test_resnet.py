import pytest
import torch
from torch import nn
from torchvision.models import resnet as torchvisions

from fastssl.nn import resnet as engine_resnet
from fastssl.nn.norm import SplitBatchNorm2d, SyncBatchNorm
from fastssl.nn.resnet import build_resnet


def test_split_batch_norm_is_a_batch_norm_on_each_part():
    split, plain = SplitBatchNorm2d(3, splits=4), nn.BatchNorm2d(3)
    nn.init.normal_(split.weight)
    plain.load_state_dict(split.state_dict())
    x = torch.randn(8, 3, 5, 5, requires_grad=True)
    out = split(x)
    for part in range(4):
        torch.testing.assert_close(out[part::4], plain(x[part::4]))
        plain.load_state_dict(nn.BatchNorm2d(3).state_dict() | {"weight": split.weight, "bias": split.bias})
    parts = [x[part::4].detach() for part in range(4)]
    mean = torch.stack([p.mean((0, 2, 3)) for p in parts]).mean(0)
    var = torch.stack([p.var((0, 2, 3)) for p in parts]).mean(0)
    torch.testing.assert_close(split.running_mean, 0.1 * mean)
    torch.testing.assert_close(split.running_var, 0.9 + 0.1 * var)
    plain.load_state_dict(split.state_dict())
    torch.testing.assert_close(split.eval()(x), plain.eval()(x))


def test_split_batch_norm_refuses_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match=r"^SplitBatchNorm2d: the batch must be divisible by splits=4, got 6$"):
        SplitBatchNorm2d(3, splits=4)(torch.randn(6, 3, 2, 2))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("small", [False, True])
def test_state_dict_is_torchvisions(splits, small):
    from torchvision.models import resnet18

    state, expected = build_resnet("resnet18", 16, small, splits).state_dict(), resnet18(num_classes=16).state_dict()
    assert set(state) == set(expected)
    assert {k for k in state if state[k].shape != expected[k].shape} == ({"conv1.weight"} if small else set())


def test_mini():
    model = build_resnet("resnet_mini", 16)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.23e6, rel=0.02)


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_is_torchvisions(block):
    """Values, gradients and running statistics, then values in eval mode."""
    model = engine_resnet.ResNet(getattr(engine_resnet, block), [2, 1, 1, 1], 16, norm_layer=SplitBatchNorm2d).double()
    reference = torchvisions.ResNet(getattr(torchvisions, block), [2, 1, 1, 1], 16).double()
    reference.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for network in (model, reference):
        network(x).square().sum().backward()
    for one, two in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x))


def test_works_with_other_batch_norms():
    """With the batch norms that `sync_batch_norms` makes."""
    model = engine_resnet.BasicBlock(3, 3, norm_layer=SplitBatchNorm2d)
    other = engine_resnet.BasicBlock(3, 3, norm_layer=SyncBatchNorm)
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("splits", [1, 2])
def test_compiles_in_one_graph(splits):
    model, x = build_resnet("resnet_mini", 16, bn_splits=splits), torch.randn(4, 3, 32, 32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model.conv1.weight.grad.any()
