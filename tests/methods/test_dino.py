import copy

import pytest
import torch

from fastssl.contract import Batch
from fastssl.methods.dino import DINO
from fastssl.nn import DINOHead, DINOLoss
from fastssl.nn.crops import MultiCropNetwork
from fastssl.nn.vit import ViT
from fastssl.train.config import Execution, Training
from fastssl.train.trainer import Trainer
from tests.support.golden import part, read

EXACT = {"rtol": 1e-9, "atol": 1e-11}
POSITIONS = {"pos_embed": "learn", "dynamic_img_size": True, "pos_offset": 0.1, "pos_antialias": False}


def assert_equal(actual, expected, bounds=EXACT):
    assert expected and expected.keys() <= actual.keys()
    for name, x in expected.items():
        torch.testing.assert_close(actual[name].detach(), x, **bounds, msg=lambda m, name=name: f"{name}: {m}")


def golden_method():
    tensors, meta = read("dino_steps")
    vit, head = meta["vit"], meta["head"]
    encoder = ViT(
        vit["img_size"],
        vit["patch_size"],
        3,
        vit["embed_dim"],
        vit["depth"],
        vit["num_heads"],
        vit["mlp_ratio"],
        **POSITIONS,
    )
    sizes = {"hidden_dim": head["hidden"], "bottleneck_dim": head["bottleneck"]}
    projector = DINOHead(vit["embed_dim"], head["out"], norm_last_layer=head["norm_last_layer"], **sizes)
    network = MultiCropNetwork(encoder, projector)
    network.load_state_dict({name: x.double() for name, x in part(tensors, "state.").items()}, strict=True)
    criterion = DINOLoss(head["out"], 0.04, 0.07, 1)
    return DINO(network.double(), criterion, 0.9, 1.0, epochs=3).double()


def test_three_golden_steps():
    """Losses, gradients, AdamW with scheduled weight decay, clipping, freezing, teacher and centre."""
    tensors, meta = read("dino_steps")
    model = golden_method()
    training = Training(
        3,
        256,
        "adamw",
        lr=0.01,
        weight_decay=0.04,
        weight_decay_end=0.4,
        clip_parameter_norm=meta["clip_grad"],
        freeze=("student.head.last_layer",),
        freeze_epochs=1,
    )
    trainer = Trainer(model, training, Execution(), steps_per_epoch=1)
    rates = iter(meta["lr"])  # not those of our schedule: the whole warm-up is one step
    decays = {group["weight_decay_scale"]: group for group in trainer.optimizer.param_groups}
    schedules = trainer._set_schedules

    def set_recorded_rate():
        schedules()
        rate = next(rates)
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate

    trainer._set_schedules = set_recorded_rate
    gradients = {}
    for step in range(3):
        views = tuple(tensors[f"step{step}.input.crop{i}"].double() for i in range(6))
        batch = Batch(views, torch.arange(3), None)
        if step == 0:
            copied = copy.deepcopy(model)
            copied.before_step(0.0)
            copied(batch)[0].backward()
            gradients = {name: p.grad for name, p in copied.student.named_parameters()}
        result = trainer.step(iter((batch,)))
        assert decays[1.0]["weight_decay"] == pytest.approx(meta["wd"][step], rel=1e-12)
        torch.testing.assert_close(result.loss, tensors[f"step{step}.loss"], **EXACT)
        assert model.momentum_of_step == pytest.approx(meta["momentum"][step], rel=1e-12)
        torch.testing.assert_close(model.dino_loss.center, tensors[f"step{step}.center_after"], **EXACT)
    assert_equal(gradients, part(tensors, "step0.grad."))
    assert_equal(model.student.state_dict(), part(tensors, "step2.student."))
    assert_equal(model.teacher.state_dict(), part(tensors, "step2.teacher."))
