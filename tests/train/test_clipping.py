"""Gradient clipping parameter by parameter."""

import pytest
import torch
from torch import nn

from fastssl.contract import Batch
from fastssl.methods import mae
from fastssl.train.clipping import clip_parameter_norms
from fastssl.train.config import Execution, Training
from fastssl.train.trainer import Trainer
from tests.support.golden import read
from tests.support.toy_method import Autoencoder


def with_gradients(gradients):
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(parameters, gradients):
        p.grad = g.clone()
    return parameters


def test_golden_clipping_of_dino():
    """Largest norm 1; some gradients are shorter and stay bit for bit."""
    golden, _ = read("dino_loss_head")
    gradients = [golden[f"clip.input.grad{i}"].double() for i in range(4)]
    parameters = with_gradients(gradients)
    clip_parameter_norms(parameters, 1.0)
    for i, p in enumerate(parameters):
        torch.testing.assert_close(p.grad, golden[f"clip.output.grad{i}"], rtol=1e-14, atol=0)
        assert torch.equal(p.grad, gradients[i]) == (golden["clip.norms"][i] < 1)
    assert {bool(norm < 1) for norm in golden["clip.norms"]} == {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_formula(dtype):
    torch.manual_seed(0)
    gradients = [torch.randn(shape).to(dtype) for shape in ((5, 3), (7,), (), (2, 3, 4))] + [
        torch.zeros(3, dtype=dtype)
    ]
    parameters = with_gradients(gradients)
    clip_parameter_norms([nn.Parameter(torch.zeros(2)), *parameters], 0.7)  # the first has no gradient
    for p, g in zip(parameters, gradients):
        factor = 0.7 / (g.double().norm() + 1e-6)
        expected = g.double() * factor if factor < 1 else g.double()
        torch.testing.assert_close(p.grad, expected.to(dtype))


def test_parts_are_clipped_by_their_joint_norm():
    """As torch clips each of DINOv2's submodules, a parameter without a part on its own."""
    parameters, expected = (with_gradients([torch.full((n,), 2.0 * n) for n in range(1, 6)]) for _ in range(2))
    clip_parameter_norms(parameters, 3.0, ["head", "backbone", "head", None, "backbone"])
    for part in ([0, 2], [1, 4], [3]):
        nn.utils.clip_grad_norm_([expected[i] for i in part], 3.0)
    for p, q in zip(parameters, expected):
        torch.testing.assert_close(p.grad, q.grad)


def test_without_gradients():
    clip_parameter_norms([nn.Parameter(torch.zeros(2))], 1.0)
    clip_parameter_norms([], 1.0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_step_has_the_clipped_norms(precision):
    """SGD without momentum moves each parameter by lr · clip; with fp16 gradients are unscaled before."""
    torch.manual_seed(0)
    method, clip, lr = Autoencoder(8), 1e-3, 0.5
    training = Training(1, 256, "sgd", lr, 0.0, momentum=0.0, lr_by_epoch=True, clip_parameter_norm=clip)
    trainer = Trainer(method, training, Execution(precision=precision), steps_per_epoch=2)
    initial = [p.detach().clone() for p in method.parameters()]
    images = 3 * torch.randn(256, 3, 16, 16)
    result = trainer.step(iter([Batch((images,), torch.arange(256), torch.arange(256))]))
    assert result.grad_norm > 10 * clip
    for p, before in zip(method.parameters(), initial):
        assert (p - before).norm().item() == pytest.approx(lr * clip, rel=2e-3)


def test_refused_together_with_clipping_of_the_whole_gradient():
    config = mae.Config.small()
    config.training.clip_parameter_norm = 3.0
    with pytest.raises(
        ValueError, match=r"^train: --clip-norm must be 0 with --clip-parameter-norm 3, got 1: choose one$"
    ):
        Trainer(mae.build(config), config.training, Execution(clip_norm=1.0), 10)
