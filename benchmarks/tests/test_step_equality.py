"""Twenty steps of the trainer equal twenty steps of the official code, from the same weights, on changing images.

The official side is `benchmarks/official.py`, in plain torch. In float64 both must have the same losses up to rounding:
a difference in a formula of a loss, an optimizer, a momentum encoder or a queue would show. In float32 and under
bfloat16 autocast the error of ours against that float64 run is bounded by the official code's in the same precision.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.step_cases import TOTAL, Ours, as_dtype, images, mae_case, moco_v2_case, moco_v3_case, plain
from benchmarks.step_equality import STEPS, draw_equality, losses_of
from fastssl.nn import resnet
from fastssl.nn.norm import SplitBatchNorm2d

SIZE, BATCH = (16, 16), 16

# Learning rates (per 256 images; a step has 16) at which the losses change in twenty steps, but rounding errors do not
# grow too large for a comparison.
CASES = {
    "mae": (
        lambda: mae_case(
            "vit_mini", SIZE, BATCH, decoder_dim=64, decoder_depth=1, decoder_heads=4, training={"lr": 0.02}
        ),
        1,
    ),
    "moco_v2": (lambda: moco_v2_case("resnet_mini", SIZE, BATCH, 64, ema_momentum=0.9, training={"lr": 0.03}), 2),
    "moco_v3-vit": (
        lambda: moco_v3_case("vit_mini", SIZE, BATCH, hidden=64, dim=32, ema_momentum=0.9, training={"lr": 0.002}),
        2,
    ),
    "moco_v3-resnet": (
        lambda: moco_v3_case("resnet_mini", SIZE, BATCH, hidden=64, dim=32, ema_momentum=0.9, training={"lr": 1.0}),
        2,
    ),
}

# Error of a loss in float32 whatever the weights: it is rounded once at its end, and sums before it a few times.
ROUNDING = 2.0**-21
# Relative error of a sum of n terms in float32, where the signs of n roundings are random: √n · ε / 2. Here n is 64.
SUM_ROUNDING = 4 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def smooth_blocks(monkeypatch):
    """Replace the ReLU that residual blocks compute together with the norm: see `case_of`."""

    def norm_gelu(norm, x, residual=None):
        out = norm(x, residual=residual) if isinstance(norm, SplitBatchNorm2d) else norm(x)
        return F.gelu(out if residual is None or isinstance(norm, SplitBatchNorm2d) else out + residual)

    monkeypatch.setattr(resnet, "norm_relu", norm_gelu)


def case_of(name):
    """The case and its batches, with GELU in place of ReLU. Rounding decides the sign of some inputs of ReLUs, which
    changes the gradient discontinuously: torch's float32 runs of the same ResNet in two memory layouts then differ by
    1e-4 at some step and by 1e-2 ten steps later. With smooth activations only rounding remains."""

    def smooth(model):
        for module in list(model.modules()):
            for child, layer in module.named_children():
                if isinstance(layer, nn.ReLU):
                    setattr(module, child, nn.GELU())
        return model

    make, views = CASES[name]
    case = make()
    case = dataclasses.replace(
        case, ours=lambda ours=case.ours: smooth(ours()), plain=lambda tuned, plain=case.plain: smooth(plain(tuned))
    )
    return case, [images(BATCH, SIZE, views, seed=step) for step in range(STEPS)]


@pytest.mark.parametrize(
    "name", ["mae", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "mae")]
)
def test_losses_equal_those_of_the_official_steps(name):
    case, batches = case_of(name)
    losses = {name: torch.tensor(x, dtype=torch.float64) for name, x in losses_of(case, batches).items()}
    exact = losses["official fp64"]
    ours = exact_losses(case, batches)
    # The measured difference is at most 1e-14; the bound allows for other orders of summation.
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=0)

    error = {name: x - exact for name, x in losses.items()}
    # Which of two float32 runs has the larger error depends on this processor's order of summation. Perturbed float64
    # steps show how far rounding can grow in any run; the factor 4 covers the spread of the largest of twenty errors.
    rounded = max((rounded_losses(case, batches, seed) - exact).abs().max() for seed in range(2))
    allowed = 4 * max(rounded, error["official fp32"].abs().max()) + ROUNDING * exact.abs().max()
    largest = error["ours fp32"].abs().max()
    assert largest <= allowed, f"fp32: error {largest:.2e}, allowed {allowed:.2e}"
    # bfloat16 has errors in the third digit. Which side has the larger single error is random, so compare the root mean
    # square over the twenty steps.
    rms, official_rms = (error[f"{side} bf16"].square().mean().sqrt() for side in ("ours", "official"))
    assert rms <= 2 * official_rms, f"bf16: error {rms:.2e}, official {official_rms:.2e}"


def rounded_losses(case, batches, seed):
    """Losses of the official steps in float64, where every step perturbs each weight by up to SUM_ROUNDING of it."""
    torch.manual_seed(0)
    loop = plain(case, case.ours().state_dict(), None, torch.float64)
    generator, losses = torch.Generator().manual_seed(seed), []
    for step, batch in enumerate(batches):
        with torch.no_grad():
            for weight in loop.model.parameters():
                weight *= 1 + SUM_ROUNDING * (2 * torch.rand(weight.shape, generator=generator) - 1)
        losses.append(float(loop(as_dtype(batch, torch.float64), step / TOTAL)))
    return torch.tensor(losses, dtype=torch.float64)


def exact_losses(case, batches):
    """Losses of the trainer's step in float64."""
    torch.manual_seed(0)
    ours = Ours(case, case.ours().double(), "fp32")
    return torch.stack([ours(as_dtype(batch, torch.float64), 0.0) for batch in batches])


@pytest.mark.parametrize("name", CASES)
def test_the_steps_change_the_losses(name):
    """Losses with constant weights differ by far more than the bounds, so that the comparison above can fail."""
    case, batches = case_of(name)
    batches = batches[:4]
    moving = exact_losses(case, batches)
    case.training.lr = 0.0
    still = exact_losses(case, batches)
    assert moving[0] == still[0]
    assert (moving[1:] - still[1:]).abs().max() > 1e-8 * still.abs().max()


def test_the_figure_is_drawn(tmp_path):
    case = mae_case("vit_mini", SIZE, 4, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    target = draw_equality(tmp_path / "losses.png", case, [images(4, SIZE, 1, seed=step) for step in range(3)])
    assert target.stat().st_size > 10_000
