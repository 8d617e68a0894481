"""The plain-torch transcription of iBOT and DINOv2 meets the golden numbers."""

from pathlib import Path

import pytest
import torch

from tests.methods import transcription_dinov2 as t
from tests.support.golden import part, read
from tests.test_layers import imports_of

CLOSE = {"rtol": 1e-11, "atol": 1e-12}
VIT = t.Vit(patch=4, heads=2)


def golden_of(name):
    tensors, meta = read(name)
    return {key: x.double() if x.is_floating_point() else x for key, x in tensors.items()}, meta


def assert_equal(actual, expected, msg=""):
    torch.testing.assert_close(actual.detach(), expected, **CLOSE, msg=lambda m: f"{msg}: {m}")


def test_it_uses_nothing_of_fastssl():
    assert {name.split(".")[0] for name in imports_of(Path(t.__file__))} == {"collections", "math", "torch", "typing"}


@pytest.mark.parametrize("step", range(3))
def test_ibot_losses(step):
    golden, _ = golden_of("ibot")
    case = part(golden, f"loss.step{step}.")
    before = part(golden, f"loss.step{step - 1}.") if step else {}
    centre, centre2 = before.get("center_after", torch.zeros(1)), before.get("center2_after", torch.zeros(1))
    temp = [0.04, 0.07][min(step, 1)], [0.04, 0.06][min(step, 1)]
    names = ["student_cls", "student_local_cls", "student_patch"]
    inputs = [case[f"input.{name}"].requires_grad_() for name in names]
    targets = ((case["input.teacher_cls"] - centre) / temp[0]).softmax(-1).chunk(2)
    patch_targets = ((case["input.teacher_patch"] - centre2) / temp[1]).softmax(-1).chunk(2)
    masks = [case["input.mask0"].flatten(1), case["input.mask1"].flatten(1)]
    cls = t.dino_pairs([*inputs[0].chunk(2), *inputs[1].chunk(4)], targets)
    patch = t.ibot_patches(inputs[2].chunk(2), patch_targets, masks)
    assert_equal(cls, case["cls"])
    assert_equal(patch, case["patch"])
    assert_equal(cls + patch, case["loss"])
    for name, x in zip(names, torch.autograd.grad(cls + patch, inputs)):
        if f"grad.{name}" in case:  # that of the patches was not recorded in the last step
            assert_equal(x, case[f"grad.{name}"], name)
    assert_equal(0.9 * centre + 0.1 * case["input.teacher_cls"].mean(0, keepdim=True), case["center_after"])
    assert_equal(0.9 * centre2 + 0.1 * case["input.teacher_patch"].mean((0, 1), keepdim=True), case["center2_after"])


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_ibot_heads(kind):
    case = part(golden_of("ibot")[0], f"head.{kind}.")
    state = {f"head.{name}": x for name, x in part(case, "state.").items()}
    tokens = case["input.tokens"]
    assert_equal(t.head(state, "head", tokens[:, 0]), case["output.cls"])
    last = "last_layer2" if kind == "separate" else "last_layer"
    assert_equal(t.head(state, "head", tokens[:, 1:], last), case["output.patch"])


@pytest.mark.parametrize("rows", [4, 12, 40])
def test_sinkhorn(rows):
    golden, _ = golden_of("dinov2_losses")
    assert_equal(t.sinkhorn(golden[f"sinkhorn.n{rows}.input"], 0.07), golden[f"sinkhorn.n{rows}.output"])


def test_koleo():
    case = part(golden_of("dinov2_losses")[0], "koleo.random.")
    x = case["input"].requires_grad_()
    loss = t.koleo(x)
    assert_equal(loss, case["loss"])
    assert_equal(*torch.autograd.grad(loss, x), case["grad"])


@pytest.mark.parametrize("mode", ["centering", "sinkhorn_knopp"])
def test_dinov2_step(mode):
    golden, meta = golden_of("dinov2_step")
    case = part(golden, f"{mode}.")
    shared = part(golden, "centering.state.")  # the backbones are the same in both cases
    tensors = shared if mode == "centering" else {n: x for n, x in shared.items() if ".backbone." in n}
    tensors = {**tensors, **part(case, "state.")}
    student, teacher = (t.trained(part(tensors, f"{name}.")) for name in ("student", "teacher"))
    mask, temp = golden["input.masks"], meta["teacher_temp"]
    patch_head = "dino_head" if mode == "centering" else "ibot_head"
    with torch.no_grad():
        cls, patches = t.vit_tokens(teacher, VIT, golden["input.global_crops"])
        scores = t.head(teacher, "dino_head", cls), t.head(teacher, patch_head, patches[mask])
        targets = [(x / temp).softmax(-1) if mode == "centering" else t.sinkhorn(x, temp) for x in scores]
    cls, patches = t.vit_tokens(student, VIT, golden["input.global_crops"], mask)
    local = t.head(student, "dino_head", t.vit_tokens(student, VIT, golden["input.local_crops"])[0]).chunk(3)
    masked = t.head(student, patch_head, patches[mask])
    terms = t.dinov2_terms(local, t.head(student, "dino_head", cls), targets[0], masked, targets[1], mask)
    koleo = 0.1 * sum(map(t.koleo, cls.chunk(2)))
    assert_equal(terms["local"], case["dino_local_crops_loss"])
    assert_equal(terms["global"], case["dino_global_crops_loss"])
    assert_equal(terms["patch"], 2 * case["ibot_loss"])
    assert_equal(koleo, 2 * case["koleo_loss"])
    loss = sum(terms.values()) + koleo
    assert_equal(loss, case["total"])
    expected = part(case, "grad.")
    for name, x in zip(expected, torch.autograd.grad(loss, [student[name] for name in expected])):
        assert_equal(x, expected[name], name)


def test_parameter_scales():
    table = golden_of("dinov2_misc")[1]["param_groups"]
    for name, (lr, decay, _) in table["table"].items():
        ours = t.dinov2_scales(name if "head" in name else f"backbone.{name}", table["depth"])
        assert ours == pytest.approx((lr, decay), rel=1e-12), name
