"""Checkpoints of DINO: the official layout in both directions, its backbone files, and names of newer torch."""

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from fastssl.methods import dino
from fastssl.nn import DINOHead
from fastssl.nn.vit import ViT, dino_vit
from fastssl.weights import export, load_initial_weights, load_weights
from tests.test_weights import equal, randomise, small_dino


def small(backbone="vit_mini"):
    return dino.build(small_dino(backbone))


def official_checkpoint(method, path, **more):
    """A file as main_dino.py saves it, without the arguments."""
    state = method.state_dict()

    def part(name, prefix):
        return {prefix + key.removeprefix(f"{name}."): x for key, x in state.items() if key.startswith(f"{name}.")}

    content = {"student": part("student", "module."), "teacher": part("teacher", ""), "epoch": 100}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({**content, "optimizer": optimizer, "dino_loss": part("dino_loss", ""), **more}, path)
    return path


@pytest.mark.parametrize("backbone", ["vit_mini", "resnet_mini"])
def test_official_checkpoints_load_and_continue(backbone, tmp_path):
    source = randomise(small(backbone))
    path = official_checkpoint(source, tmp_path / "checkpoint.pth")
    method = small(backbone)
    load_weights(method, path)
    assert equal(method.state_dict(), source.state_dict())
    method = small(backbone)
    assert load_initial_weights(method, path) == []
    assert equal(method.state_dict(), source.state_dict())


def test_our_checkpoints_have_the_official_layout(tmp_path):
    method = randomise(small())
    path = export(method, "dino", tmp_path / "dino")
    exported = torch.load(path, weights_only=True)
    official = torch.load(official_checkpoint(method, tmp_path / "official.pth"), weights_only=True)
    assert exported.keys() == {"student", "teacher", "dino_loss"}
    for part, state in exported.items():
        assert equal(state, official[part])
    assert "module.head.last_layer.weight_g" in exported["student"] and "backbone.cls_token" in exported["teacher"]


def test_a_checkpoint_gives_the_teacher_to_a_vit(tmp_path):
    """The official evaluation takes the teacher's backbone too."""
    source = randomise(small())
    for path in (official_checkpoint(source, tmp_path / "c.pth"), export(source, "safetensors", tmp_path / "own")):
        vit = dino_vit("vit_mini", 32, 4)
        load_weights(vit, path, encoder_only=True)
        assert equal(vit.state_dict(), source.encoder.state_dict())


def test_backbone_files_give_student_and_teacher_their_encoder(tmp_path):
    source, path = randomise(small()), tmp_path / "dino_deitsmall16_pretrain.pth"
    torch.save(source.encoder.state_dict(), path)
    method = small()
    head = method.student.head.mlp[0].weight.clone()
    note, *_ = load_initial_weights(method, path)
    assert "gives the encoder alone" in note and "student is a copy of teacher" in note
    for network in (method.student, method.teacher.module):
        assert equal(network.backbone.state_dict(), source.encoder.state_dict())
    assert torch.equal(method.student.head.mlp[0].weight, head)


def test_timm_takes_the_teacher(tmp_path):
    method = randomise(small()).eval()
    path = export(method, "timm", tmp_path / "vit")
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}
    reference = timm.models.VisionTransformer(**sizes, num_classes=0).eval()
    reference.load_state_dict(load_file(path), strict=True)
    for p in method.teacher.parameters():
        p.mul_(0.05)
    for p in reference.parameters():
        p.data.mul_(0.05)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(reference(images), method.features(images), rtol=1e-4, atol=1e-5)


def test_names_of_parametrized_weight_norm(tmp_path):
    """torch's newer weight_norm saves other names for the same two tensors."""
    head, path = randomise(DINOHead(6, 9, hidden_dim=8, bottleneck_dim=5)), tmp_path / "head.pth"
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(5, 9, bias=False))
    layer.load_state_dict(
        {
            "parametrizations.weight.original0": head.last_layer.weight_g,
            "parametrizations.weight.original1": head.last_layer.weight_v,
        }
    )
    state = {f"mlp.{name}": x for name, x in head.mlp.state_dict().items()}
    torch.save(state | {f"last_layer.{name}": x for name, x in layer.state_dict().items()}, path)
    other = DINOHead(6, 9, hidden_dim=8, bottleneck_dim=5)
    load_weights(other, path)
    assert equal(other.state_dict(), head.state_dict())
    torch.testing.assert_close(other.last_layer.prototypes(), layer.weight)


def test_another_resolution_gets_interpolated_positions(tmp_path):
    path = official_checkpoint(randomise(small()), tmp_path / "checkpoint.pth")
    config = small_dino("vit_mini")
    config.image_size = (48, 32)
    method = dino.build(config)
    load_weights(method, path)
    assert isinstance(method.encoder, ViT) and method.encoder.pos_embed.shape == (1, 1 + 12 * 8, 128)
