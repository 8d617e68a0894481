"""The plain-torch transcription of DINO meets the golden numbers."""

from pathlib import Path

import pytest
import torch

from tests.methods import transcription_prototypes as t
from tests.support.golden import part, read
from tests.test_layers import imports_of

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def double(tensors):
    return {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}


def assert_equal(actual, expected):
    assert expected
    for name, x in expected.items():
        torch.testing.assert_close(actual[name].detach(), x, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


def test_it_uses_nothing_of_fastssl():
    assert {name.split(".")[0] for name in imports_of(Path(t.__file__))} == {"collections", "math", "torch", "typing"}


def test_loss_gradient_and_centre_of_three_steps():
    tensors, meta = read("dino_loss_head")
    golden, settings = double(tensors), meta["loss"]
    centre = torch.zeros(1, settings["out_dim"]).double()
    for step in range(3):
        case = part(golden, f"loss.step{step}.")
        temperature = t.teacher_temperature(
            step, settings["warmup_teacher_temp"], settings["teacher_temp"], settings["warmup_teacher_temp_epochs"]
        )
        assert temperature == pytest.approx(golden["loss.teacher_temp_schedule"][step].item(), rel=1e-12)
        student = case["input.student"].requires_grad_()
        loss = t.dino_loss(student, case["input.teacher"], centre, temperature, settings["student_temp"])
        centre = t.moved_centre(centre, case["input.teacher"])
        (gradient,) = torch.autograd.grad(loss, student)
        expected = {"loss": case["loss"], "centre": case["center_after"], "gradient": case["grad.student"]}
        assert_equal({"loss": loss, "centre": centre, "gradient": gradient}, expected)


@pytest.mark.parametrize("kind", ["norm_last_layer", "free_last_layer"])
def test_head(kind):
    case = part(double(read("dino_loss_head")[0]), f"head.{kind}.")
    p = {f"head.{name}": x.requires_grad_() for name, x in part(case, "state.").items()}
    x = case["input.x"].requires_grad_()
    out = t.head(p, x)
    out.backward(case["input.cotangent"])
    gradients = {name.removeprefix("head."): tensor.grad for name, tensor in p.items()} | {"x": x.grad}
    assert_equal({"out": out}, {"out": case["output"]})
    assert_equal(gradients, part(case, "grad."))


def test_schedules_and_clipping():
    golden = double(read("dino_loss_head")[0])
    for step in range(70):
        lr = t.warmup_cosine(step, 0.001, 1e-6, 70, 21)
        assert lr == pytest.approx(golden["schedule.lr"][step].item(), rel=1e-9, abs=1e-15)
        assert t.warmup_cosine(step, 0.04, 0.4, 70) == pytest.approx(golden["schedule.wd"][step].item(), rel=1e-12)
        momentum = t.warmup_cosine(step, 0.996, 1.0, 70)
        assert momentum == pytest.approx(golden["schedule.momentum"][step].item(), rel=1e-12)
    for i in range(4):
        assert_equal({"": t.clipped(golden[f"clip.input.grad{i}"], 1.0)}, {"": golden[f"clip.output.grad{i}"]})


def test_interpolated_positions():
    golden = double(read("dino_steps")[0])
    table = golden["step2.student.backbone.pos_embed"]  # recorded after the last step, though `meta` says before
    assert_equal({"": t.positions(table, 2, 2)}, {"": golden["pos.encoding_8x8"]})
    assert_equal({"": t.positions(table, 2, 3)}, {"": golden["pos.encoding_8x12"]})


def golden_run(**changes):
    tensors, meta = read("dino_steps")
    options = t.Options(
        backbone=lambda p, images: t.vit(p, images, meta["vit"]["num_heads"]),
        lr=meta["lr"].__getitem__,
        decay=meta["wd"].__getitem__,
        momentum=meta["momentum"].__getitem__,
        teacher_temp=meta["teacher_temps"].__getitem__,
        clip=meta["clip_grad"],
        frozen_steps=meta["freeze_last_layer_epochs"],
    )._replace(**changes)
    batches = [[tensors[f"step{step}.input.crop{i}"] for i in range(6)] for step in range(3)]
    return t.run_dino(part(tensors, "state."), batches, options)


def assert_golden(run):
    golden, meta = read("dino_steps")
    assert_equal(dict(enumerate(run.losses)), {i: golden[f"step{i}.loss"] for i in range(3)})
    assert_equal(run.gradients[0], part(golden, "step0.grad."))
    assert_equal(run.student, part(golden, "step2.student."))
    assert_equal(run.teacher, part(golden, "step2.teacher."))
    assert_equal({"": run.centre}, {"": golden["step2.center_after"]})
    assert t.without_decay(run.student) == set(meta["not_decayed"])


def test_three_steps():
    assert_golden(golden_run())


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip": 0.0},
        {"frozen_steps": 0},
        {"momentum": lambda step: 0.9},
        {"decay": lambda step: 0.04},
        {"teacher_temp": lambda step: 0.04},
        {"fixed": ("head.last_layer.weight_g",)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_run_fails(wrong):
    with pytest.raises(AssertionError):
        assert_golden(golden_run(**wrong))
