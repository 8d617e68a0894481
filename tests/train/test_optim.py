"""Optimizers and their parameter groups."""

import pytest
import torch

from fastssl.methods import mae
from fastssl.train.config import Training
from fastssl.train.optim import LARS, build_optimizer


def optimizer_of(**changes):
    model = mae.build(mae.Config.small())
    settings = {"epochs": 1, "batch_size": 1, "optimizer": "adamw", "lr": 0.1, "weight_decay": 0.05} | changes
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, Training(**settings))
    groups = [({names[id(p)] for p in g["params"]}, g["weight_decay"]) for g in optimizer.param_groups]
    return model, optimizer, groups


def test_mae_decays_tokens_and_matrices_but_not_biases_norms_and_positions():
    model, optimizer, ((decayed, rate), (undecayed, none)) = optimizer_of(betas=(0.9, 0.95))
    assert (rate, none) == (0.05, 0.0)
    assert {"cls_token", "mask_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= decayed
    assert {"patch_embed.proj.bias", "norm.weight", "blocks.0.norm1.bias"} <= undecayed
    assert decayed | undecayed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert "pos_embed" not in decayed | undecayed
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_moco_decays_everything():
    _, _, groups = optimizer_of(decay_all=True, optimizer="sgd")
    assert len(groups) == 1


@pytest.mark.parametrize(("name", "cls"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("lars", LARS)])
def test_optimizer_classes(name, cls):
    assert isinstance(optimizer_of(optimizer=name)[1], cls)
