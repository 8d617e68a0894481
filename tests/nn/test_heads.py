"""Heads against golden numbers and the layers of the official codes."""

import torch
from torch import nn

from fastssl.nn.heads import mlp_head
from tests.support.golden import read


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
