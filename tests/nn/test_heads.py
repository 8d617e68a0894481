"""Heads against golden numbers and the layers of the official codes."""

import pytest
import torch
from torch import nn

from fastssl.nn.heads import DINOHead, mlp_head
from tests.support.golden import part, read


def names(head: nn.Module) -> set[str]:
    return {name for name, _ in head.named_parameters()}


def test_simclrs_head_in_training():
    """Output, the layer for fine-tuning, and running means; TensorFlow keeps biased variances, torch unbiased ones."""
    golden, _ = read("simclr_head")
    head = mlp_head(8, 8, 8, 6, last_norm="scale").double()
    for i in range(3):
        head[3 * i].weight.data = golden[f"state.{i}.linear.weight"].double()
        head[3 * i + 1].weight.data = golden[f"state.{i}.bn.weight"].double()
        if i < 2:
            head[3 * i + 1].bias.data = golden[f"state.{i}.bn.bias"].double()
    x = golden["input.x"].double()
    torch.testing.assert_close(head(x), golden["output.train"], rtol=1e-9, atol=1e-9)
    for i in range(3):
        norm, n = head[3 * i + 1], len(x)
        biased = 0.9 + (norm.running_var - 0.9) * (n - 1) / n
        torch.testing.assert_close(norm.running_mean, golden[f"after.{i}.bn.running_mean"].double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(biased, golden[f"after.{i}.bn.running_var"].double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(head[:3](x), golden["output.middle_layer_train"], rtol=1e-9, atol=1e-9)


def test_the_last_norms_bias_stays_zero():
    head = mlp_head(4, 3, last_norm="scale")
    assert not head[1].bias.requires_grad and head[1].bias.abs().max() == 0
    assert head[1].weight.requires_grad


def test_names_are_those_of_the_official_codes():
    """Projector of SimSiam before its bias is frozen, of VICReg, of Barlow Twins; predictor of SimSiam, of BYOL."""
    weights = {"0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias", "6.weight"}
    assert names(mlp_head(8, 8, 8, 4, last_bias=True, last_norm="plain")) == weights | {"6.bias"}
    assert names(mlp_head(8, 8, 8, 4, bias=True)) == weights | {"0.bias", "3.bias"}
    assert names(mlp_head(8, 8, 8, 4)) == weights
    assert names(mlp_head(8, 2, 8, last_bias=True)) == {"0.weight", "1.weight", "1.bias", "3.weight", "3.bias"}
    assert names(mlp_head(8, 2, 8, bias=True)) == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight"}


GOLDEN_HEADS = {
    "norm_last_layer": {},
    "free_last_layer": {"norm_last_layer": False},
    "bn": {"use_bn": True},
    "one_layer": {"nlayers": 1},
}


@pytest.mark.parametrize("kind", GOLDEN_HEADS)
def test_golden_heads_of_dino(kind):
    """Output and gradients, among them those of the lengths where they are trained, under the official names."""
    case = {name: x.double() for name, x in part(read("dino_loss_head")[0], f"head.{kind}.").items()}
    head = DINOHead(8, 11, hidden_dim=12, bottleneck_dim=6, **GOLDEN_HEADS[kind]).double()
    head.load_state_dict(part(case, "state."), strict=True)
    x = case["input.x"].requires_grad_()
    out = head(x)
    out.backward(case["input.cotangent"])
    torch.testing.assert_close(out.detach(), case["output"], rtol=1e-9, atol=1e-11)
    gradients = {name: p.grad for name, p in head.named_parameters() if p.grad is not None} | {"x": x.grad}
    expected = part(case, "grad.")
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-11)
    features, prototypes = head.factored(x)
    torch.testing.assert_close(features @ prototypes.T, out)


def test_initial_weights_of_dinos_head():
    torch.manual_seed(0)
    head = DINOHead(16, 500, hidden_dim=64, bottleneck_dim=32)
    assert head.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.1) and not head.mlp[2].bias.any()
    features, prototypes = head.factored(torch.randn(3, 16))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(500))
    assert not head.last_layer.weight_g.requires_grad and head.last_layer.weight_v.requires_grad
    with pytest.raises(ValueError, match=r"^DINOHead: nlayers must be at least 1, got 0$"):
        DINOHead(16, 500, nlayers=0)
