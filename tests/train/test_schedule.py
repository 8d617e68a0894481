"""Schedules and LARS against formulas and golden numbers."""

import pytest
import torch

from fastssl.train.config import Training
from fastssl.train.optim import LARS
from fastssl.train.schedule import cosine_schedule, learning_rate, weight_decay
from tests.support.golden import read


def test_golden_schedules():
    golden, meta = read("schedules")
    mae = meta["mae"]
    training = Training(mae["epochs"], 256, "adamw", mae["lr"], 0.0, warmup_epochs=mae["warmup"])
    for epoch, lr, momentum in zip(*(golden[k].tolist() for k in ("epoch", "mae_lr", "moco_v3_momentum"))):
        assert learning_rate(training, epoch) == pytest.approx(lr, rel=1e-9, abs=1e-15)
        ours = cosine_schedule(meta["moco_v3"]["m"], 1.0, epoch / meta["moco_v3"]["epochs"])
        assert ours == pytest.approx(momentum, rel=1e-12)


def test_golden_weight_decay_and_momentum_of_other_methods():
    """DINO: 20 epochs of 7 steps, weight decay 0.04 → 0.4, momentum 0.996 → 1. BYOL: 100 steps, momentum 0.996 → 1."""
    golden, _ = read("schedules_family")
    training = Training(20, 64, "adamw", 0.0, weight_decay=0.04, weight_decay_end=0.4)
    for step, (decay, momentum) in enumerate(zip(golden["dino.wd"].tolist(), golden["dino.momentum"].tolist())):
        assert weight_decay(training, step / 140) == pytest.approx(decay, rel=1e-13)
        assert cosine_schedule(0.996, 1.0, step / 140) == pytest.approx(momentum, rel=1e-13)
    for step, momentum in enumerate(golden["byol.tau"].tolist()):
        assert cosine_schedule(0.996, 1.0, step / 100) == pytest.approx(momentum, rel=1e-13)


LEARNING_RATES = {  # by the golden file's name: settings, steps per epoch, accuracy of the file
    "byol.lr": (Training(100, 4096, "lars", 0.2, 0.0, warmup_epochs=10), 1, 1e-6),
    "vicreg.lr": (Training(20, 2048, "lars", 0.2, 0.0, warmup_epochs=10, lr_end=0.0002), 7, 1e-12),
    "barlow.lr": (Training(20, 2048, "lars", 0.2, 0.0, warmup_epochs=10, lr_end=0.0002), 7, 1e-12),
    "simsiam.lr": (Training(100, 512, "sgd", 0.05, 0.0, lr_by_epoch=True), 1, 1e-12),
    "swav.lr": (
        Training(
            20, 4096, "larc", 0.3, 0.0, warmup_epochs=10, warmup_lr=0.01875, warmup_includes_peak=True, lr_end=0.0003
        ),
        7,
        1e-12,
    ),
    "simclr.lr": (Training(313, 64, "lars_simclr", 1.2, 0.0, warmup_epochs=78, lr_scaling="sqrt"), 1, 1e-6),
}


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_golden_learning_rates_of_other_methods(name):
    """A cosine to 0, to a thousandth of the peak, by epoch, and a peak by the root of the batch, whose warm-up the
    reference rounds to 78 steps. BYOL's and SimCLR's files hold float32."""
    training, steps_per_epoch, accuracy = LEARNING_RATES[name]
    golden = read("schedules_family")[0][name]
    for step, expected in enumerate(golden.view(len(golden), -1)[:, 0].tolist()):
        assert learning_rate(training, step / steps_per_epoch, steps_per_epoch) == pytest.approx(
            expected, rel=accuracy, abs=accuracy
        )


def test_golden_learning_rates_of_albef():
    """Epochs of 2,350 steps: 20 stairs of 100 steps, each from the step after every 100th, then a cosine by epoch."""
    golden, _ = read("schedules_text")
    training = Training(30, 512, "adamw", 5e-5, 0.02, warmup_lr=5e-6, lr_end=5e-6, warmup_stair=100)
    rates = [learning_rate(training, step / 2350, 2350) for step in range(2350)]
    assert rates[:3] == pytest.approx(golden["albef.epoch0_first_steps"].tolist(), rel=1e-12)
    assert rates[::50] == pytest.approx(golden["albef.epoch0_lr_every50"].tolist(), rel=1e-12)
    assert [step for step in range(1, 2350) if rates[step] != rates[step - 1]] == list(range(101, 2002, 100))
    by_epoch = [learning_rate(training, epoch + 0.3, 2350) for epoch in range(1, 30)]
    assert by_epoch == pytest.approx(golden["albef.epoch_lr"].tolist(), rel=1e-12)
    assert learning_rate(training, 0.5) == 1e-4  # of endless epochs


def test_a_warmup_that_includes_the_peak_may_have_one_step():
    training = Training(10, 256, "larc", 0.3, 0.0, warmup_epochs=1, warmup_lr=0.1, warmup_includes_peak=True)
    assert learning_rate(training, 0.0, 1) == learning_rate(training, 1.0, 1) == 0.3
    assert learning_rate(training, 0.0, 2) == 0.1
    assert learning_rate(training, 0.5, 2) == 0.3
    assert learning_rate(training, 0.5) == pytest.approx(0.2)  # without a number of steps the last one is at the end


def test_weight_decay_is_constant_without_an_end():
    training = Training(10, 256, "adamw", 0.0, weight_decay=0.05)
    assert [weight_decay(training, progress) for progress in (0, 0.3, 1)] == [0.05] * 3
    training.weight_decay_end = 0.0
    assert [weight_decay(training, progress) for progress in (0, 0.5, 1)] == pytest.approx([0.05, 0.025, 0])


def test_a_cosine_reaches_both_ends():
    for start, end in ((0.04, 0.4), (0.996, 1.0), (0.3, 0.3), (1.0, 0.0)):
        assert cosine_schedule(start, end, 0) == pytest.approx(start, rel=1e-14)
        assert cosine_schedule(start, end, 1) == end


def test_learning_rate_scales_with_the_batch_and_may_change_by_epoch():
    training = Training(10, 1024, "sgd", 0.03, 0.0, lr_by_epoch=True)
    assert learning_rate(training, 0.9) == learning_rate(training, 0) == pytest.approx(0.12)
    assert learning_rate(training, 1.0) < 0.12
    assert learning_rate(training, 10) == pytest.approx(0)


def test_learning_rate_drops_to_a_tenth_at_moco_v1s_epochs():
    training = Training(200, 256, "sgd", 0.03, 0.0, lr_drops=(120, 160))
    lrs = [learning_rate(training, epoch) for epoch in (0, 119.99, 120, 159, 160, 200)]
    assert lrs == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])


def test_golden_lars():
    golden, meta = read("lars")
    names = {"W": "gW", "b": "gb", "z": "gz"}
    params = {name: golden[f"{name}0"].clone().requires_grad_() for name in names}
    settings = {"lr": meta["lr"], "weight_decay": meta["weight_decay"], "momentum": meta["momentum"]}
    optimizer = LARS(params.values(), **settings, trust=meta["trust_coefficient"])
    for step in range(4):
        for name, gradient in names.items():
            params[name].grad = golden[f"{gradient}{step}"]
        optimizer.step()
        for name in names:
            torch.testing.assert_close(params[name].data, golden[f"{name}{step + 1}"], rtol=1e-12, atol=1e-12)
