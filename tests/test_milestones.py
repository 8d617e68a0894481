"""Milestones of presets follow shorter runs; inconsistent ones are refused."""

import dataclasses

import pytest

from fastssl.eval.protocols import Finetune, Official, check_protocol
from fastssl.methods import mae, moco_v1, moco_v3
from fastssl.milestones import adopt, check_milestones, describe_scaled, milestone_epochs, shorten
from fastssl.train.schedule import learning_rate


@pytest.mark.parametrize(
    ("preset", "epochs", "expected"),
    [
        (mae.Config.paper(), 5, {"warmup_epochs": (0.25,)}),  # 40 of 800
        (mae.Config.paper(), 800, {"warmup_epochs": (40,)}),
        (mae.Config.paper(), 1600, {"warmup_epochs": (40,)}),
        (moco_v3.Config.small(), 7, {"warmup_epochs": (0.35,)}),  # half an epoch of 10
        (moco_v1.Config.paper(), 100, {"lr_drops": (60, 80)}),
        (Official(), 9, {"warmup_epochs": (1,)}),
        (Finetune.paper("resnet50"), 10, {"lr_drops": (6, 8)}),
        (Finetune.paper("vit_base"), 10, {"warmup_epochs": (0.5,)}),
    ],
)
def test_they_follow_a_shorter_run_in_proportion(preset, epochs, expected):
    before = dataclasses.asdict(preset)
    config = shorten(preset, epochs)
    found = milestone_epochs(config)
    assert {name: found[name] for name in expected} == {name: pytest.approx(v) for name, v in expected.items()}
    assert dataclasses.asdict(preset) == before
    training = config.training if hasattr(config, "training") else config
    assert training.epochs == epochs
    rates = [learning_rate(training, epochs * i / 1000) for i in range(1000)]
    assert max(rates) == pytest.approx(training.lr * training.batch_size / 256, rel=1e-3)  # the warm-up ends


@pytest.mark.parametrize("epochs", [None, "5", 0, -3, 2.5, True])
def test_what_is_no_number_of_epochs_is_left_for_a_later_check(epochs):
    assert shorten(mae.Config.paper(), epochs) == mae.Config.paper()


def test_one_at_the_last_epoch_or_after_it_is_refused():
    config = mae.Config.paper()
    config.training.epochs = 40
    with pytest.raises(ValueError) as error:
        check_milestones(config, "pretrain")
    assert str(error.value) == (
        "pretrain: --warmup-epochs must lie before --epochs 40, got 40: lower it or raise --epochs (without "
        "--warmup-epochs the preset's value follows --epochs in proportion)"
    )
    with pytest.raises(ValueError, match=r"^train: --freeze-epochs must lie before --epochs 2, got 2: "):
        dataclasses.replace(moco_v1.Config.small().training, epochs=2, freeze=("fc",), freeze_epochs=2).check()
    with pytest.raises(ValueError, match=r"^eval: --warmup-epochs must lie before --epochs 90, got 90: "):
        check_protocol(Official(warmup_epochs=90))


def test_what_was_scaled_is_said():
    preset = mae.Config.paper()
    assert describe_scaled(preset, shorten(preset, 5)) == (
        "--warmup-epochs 40 → 0.25: in proportion to --epochs 5 of the preset's 800; a value that you give is not "
        "scaled"
    )
    assert describe_scaled(preset, shorten(preset, 900)) == ""
    given = shorten(preset, 5)
    given.training.warmup_epochs = 1
    assert describe_scaled(preset, given) == ""


def test_the_same_command_with_more_epochs_keeps_the_milestones_of_the_run():
    preset = moco_v1.Config.paper()
    stored, now = shorten(preset, 10), shorten(preset, 20)
    assert milestone_epochs(adopt(now, preset, stored))["lr_drops"] == (6, 8)
    now.training.lr_drops = (1.0, 2.0)  # given: not replaced, so that the change is refused
    assert milestone_epochs(adopt(now, preset, stored))["lr_drops"] == (1, 2)
