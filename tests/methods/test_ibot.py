import dataclasses

import pytest
import torch
from torch import nn

from fastssl.contract import Batch, Method
from fastssl.methods import ibot
from fastssl.nn.heads import FactoredLogits
from fastssl.nn.patch_masks import masked_rows
from fastssl.nn.patch_network import IBOTHead, PatchOutput
from fastssl.train.optim import parameters_to_freeze
from tests.support.contract import refused
from tests.support.golden import part, read

EXACT = {"rtol": 1e-9, "atol": 1e-10}


class Logits(nn.Module):
    """A network whose logits are given: features are the logits, prototypes the unit vectors."""

    def __init__(self, cls, patches):
        super().__init__()
        self.cls, self.patches = cls, patches

    def forward(self, large, small=None, mask=None, rows=None):
        patches = self.patches.flatten(0, 1)
        patches = patches if rows is None else patches[rows]
        pair = [FactoredLogits(x, torch.eye(x.shape[1], dtype=x.dtype)) for x in (self.cls, patches)]
        return PatchOutput(self.cls, *pair)


def tiny(epochs=None, **changes):
    config, sizes = ibot.Config.small(), {"patch_size": 4, "hidden": 24, "prototypes": 16, "bottleneck": 8}
    for name, value in {**sizes, "patch_weight": 1.0, **changes}.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    config.training.epochs = epochs or config.training.epochs
    return ibot.build(config)


def test_golden_losses_of_three_steps(monkeypatch):
    """Both losses with their gradients and centres, for unequal masks and images without any."""
    golden, meta = read("ibot")
    sizes = meta["loss"]
    temps = {"warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_patch_temp": 0.04}
    temps |= {"teacher_patch_temp": 0.06, "warmup_teacher_temp_epochs": 2, "shared_head_teacher": False}
    counts = {"prototypes": sizes["out_dim"], "patch_prototypes": sizes["patch_out_dim"], "shared_head": False}
    model = tiny(epochs=10, **temps, **counts).double()
    monkeypatch.setattr(model.teacher, "update", lambda *args: None)
    for step in range(3):
        case = part(golden, f"loss.step{step}.")
        given = {name: x.double().requires_grad_() for name, x in part(case, "input.student_").items()}
        model.student = Logits(torch.cat([given["cls"], given["local_cls"]]), given["patch"])
        model.teacher._modules["module"] = Logits(
            case["input.teacher_cls"].double(), case["input.teacher_patch"].double()
        )
        mask = torch.cat([case["input.mask0"].flatten(1), case["input.mask1"].flatten(1)])
        monkeypatch.setattr(model, "masked_rows", lambda batch, mask=mask: (masked_rows(mask, torch.float64, 0), mask))
        model.before_step(step / 10)
        loss, metrics = model(Batch((torch.zeros(3, 1),) * 6, None, None))
        loss.backward()
        torch.testing.assert_close(metrics["cls"], case["cls"], **EXACT)
        torch.testing.assert_close(metrics["patch"], case["patch"], **EXACT)
        torch.testing.assert_close(loss.detach(), case["loss"], **EXACT)
        for name, gradient in part(case, "grad.student_").items():
            torch.testing.assert_close(given[name].grad, gradient, **EXACT)
        model.after_step((step + 1) / 10)
        torch.testing.assert_close(model.dino_loss.center, case["center_after"], **EXACT)
        torch.testing.assert_close(model.ibot_patch_loss.center, case["center2_after"][0], **EXACT)


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_golden_heads(kind):
    golden, _ = read("ibot")
    case = part(golden, f"head.{kind}.")
    head = IBOTHead(8, 9, 7 if kind == "separate" else None, hidden_dim=12, bottleneck_dim=6)
    state = part(case, "state.")
    if kind == "shared":
        state = {name: x for name, x in state.items() if "last_layer2" not in name}
    head.load_state_dict(state, strict=True)
    tokens = case["input.tokens"].double()
    cls, patches = head.double().factored_pair(tokens[:, 0], tokens[:, 1:].flatten(0, 1))
    torch.testing.assert_close(cls.features @ cls.prototypes.T, case["output.cls"], **EXACT)
    torch.testing.assert_close((patches.features @ patches.prototypes.T).view(3, 4, -1), case["output.patch"], **EXACT)


def batch_of(images=4):
    views = (*torch.randn(2, images, 3, 32, 32), *torch.randn(4, images, 3, 16, 16))
    return Batch(views, torch.arange(images), torch.arange(images), torch.arange(images))


@pytest.mark.parametrize("heads", [{}, {"shared_head": False, "patch_prototypes": 16, "shared_head_teacher": False}])
def test_it_fulfils_the_contract(heads):
    model, batch = tiny(**heads, drop_path=0.2), batch_of()
    assert isinstance(model, Method)
    model.before_step(0.0)
    loss, metrics = model(batch)
    loss.backward()
    assert all(p.grad is not None for p in model.student.parameters() if p.requires_grad)
    assert all(x.isfinite() for x in metrics.values())
    before = model.ibot_patch_loss.center.clone()
    model.after_step(0.1)
    assert not torch.equal(model.ibot_patch_loss.center, before) and not model.pending
    assert model.features(batch.views[0]).shape == (4, 128)
    assert "mask_token" not in model.encoder.state_dict()


def test_a_shared_teacher_starts_at_the_patch_layer_of_its_student():
    """Loading the student into it writes last_layer and then last_layer2 into one tensor; the average then follows
    last_layer, whose name the student has too."""
    model = tiny(shared_head=False, patch_prototypes=16)
    student, teacher = model.student.head, model.teacher.module.head
    assert torch.equal(teacher.last_layer.weight_v, student.last_layer2.weight_v)
    output = model.teacher(torch.randn(2, 3, 32, 32))
    assert torch.equal(output.patches.prototypes, output.cls.prototypes)
    expected = teacher.last_layer.weight_v.lerp(student.last_layer.weight_v.detach(), 0.5)
    model.momentum_of_step = 0.5
    model.after_step(0.1)
    torch.testing.assert_close(teacher.last_layer.weight_v, expected)


def test_both_layers_of_prototypes_are_frozen_at_first():
    config = dataclasses.replace(ibot.Config.paper(), shared_head=False)
    assert config.training.freeze == ("student.head.last_layer", "student.head.last_layer2")
    assert ibot.Config.paper().training.freeze == ("student.head.last_layer",)
    model = tiny(shared_head=False, patch_prototypes=16, norm_last_layer=False)
    frozen = {id(p) for p in parameters_to_freeze(model, config.training.freeze)}
    assert frozen == {id(p) for name, p in model.student.named_parameters() if "last_layer" in name}


def test_ratios_of_masks():
    """Half of the crops are whole; the others have up to 1.5 times the mean share, in blocks a little less."""
    batch = batch_of(200)
    (rows, mask), (_, single) = tiny().masked_rows(batch), tiny(mask_shape="rand").masked_rows(batch)
    assert len(rows.rows) == mask.sum() and mask.shape == (400, 64)
    for drawn in (mask, single):
        counts = drawn.sum(1)
        assert 0.4 < (counts == 0).float().mean() < 0.6 and counts.max() <= 32
    assert 0.26 < single.sum(1)[single.sum(1) > 0].float().mean() / 64 < 0.34
    assert mask.sum() <= single.sum()


def test_bad_settings_get_a_sentence():
    refused(
        "ibot: --mask-ratio and --mask-ratio-var must have as many numbers, got 1 and 2 numbers",
        ValueError,
        tiny,
        mask_ratio=(0.3,),
    )
    sentence = "ibot: --mask-ratio ± --mask-ratio-var must be at least 0 and below 1, got (0.1, 0.9) ± (0.0, 0.2)"
    refused(sentence, ValueError, tiny, mask_ratio=(0.1, 0.9))
    sentence = "ibot: --prototypes must be --patch-prototypes with --shared-head-teacher, got 16 and 8"
    refused(sentence, ValueError, tiny, shared_head=False, patch_prototypes=8)


def test_defaults_are_those_of_the_recipe():
    config = ibot.Config.paper()
    t = config.training
    assert (t.epochs, t.batch_size, t.lr, t.weight_decay, t.weight_decay_end) == (800, 1024, 5e-4, 0.04, 0.4)
    assert (t.warmup_epochs, t.lr_end * 4, t.clip_parameter_norm) == (10, 1e-6, 3.0)
    assert (config.prototypes, config.shared_head, config.norm_last_layer) == (8192, True, False)
    assert (config.mask_ratio, config.mask_ratio_var) == ((0.0, 0.3), (0.0, 0.2))
    first, _, *small = config.augmentation.views
    assert (first.crop, small[0].crop, len(small)) == ((0.25, 1.0), (0.05, 0.25), 10)
    assert ibot.Config.paper("vit_base").norm_last_layer
