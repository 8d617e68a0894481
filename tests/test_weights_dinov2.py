"""Checkpoints of iBOT and DINOv2: training checkpoints of the official code, its backbones, and timm's models."""

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from fastssl.methods import dinov2, ibot
from fastssl.nn.vit import ViT, dino_vit
from fastssl.train.config import Execution
from fastssl.train.trainer import Trainer
from fastssl.weight_names import rename
from fastssl.weights import export, load_initial_weights, load_weights
from tests.methods.test_dinov2 import batch_of
from tests.support.contract import refused
from tests.support.small_methods import SMALL
from tests.test_weights import equal, randomise

# ours → the official code's
DINOV2 = ((r"\.reg_token$", ".register_tokens"),)
CHUNKED = ((r"\.blocks\.([01])\.", r".blocks.0.\1."), (r"\.blocks\.([23])\.", r".blocks.1.\1."))
IBOT = ((r"\.mask_token$", ".masked_embed"),)


def small(module, **changes):
    config = module.Config.small()
    for name, value in {"patch_size": 4, **SMALL[module.__name__.rpartition(".")[2]], **changes}.items():
        setattr(config, name, value)
    return module.build(config)


def part(state, name, prefix=""):
    return {prefix + key.removeprefix(f"{name}."): x for key, x in state.items() if key.startswith(f"{name}.")}


def dinov2_file(method, path, chunked=True, teacher_alone=False):
    """As DINOv2's trainer saves it with its optimizer, or the teacher that its evaluation saves."""
    state = {rename(name, DINOV2): x for name, x in method.state_dict().items()}
    state = {rename(name, CHUNKED) if chunked else name: x for name, x in state.items()}
    state["ibot_patch_loss.center"] = state["ibot_patch_loss.center"][None]  # [1, 1, K]
    torch.save({"teacher": part(state, "teacher")} if teacher_alone else {"model": state, "iteration": 7}, path)
    return path


def ibot_file(method, path, **more):
    """As main_ibot.py saves it, without its arguments: a shared last layer is there twice."""
    state = {rename(name, IBOT): x for name, x in method.state_dict().items()}
    if method.config.shared_head:
        state |= {name.replace("last_layer.", "last_layer2."): x for name, x in state.items() if "last_layer." in name}
    centres = {"center": state["dino_loss.center"], "center2": state["ibot_patch_loss.center"][None]}
    student, teacher = part(state, "student", "module."), part(state, "teacher", "module.")
    torch.save({"student": student, "teacher": teacher, "ibot_loss": centres, "epoch": 800, **more}, path)
    return path


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("chunked", [False, True])
def test_dinov2s_training_checkpoints_load_and_continue(registers, chunked, tmp_path):
    source = randomise(small(dinov2, registers=registers))
    path = dinov2_file(source, tmp_path / "model_0007.pth", chunked)
    method = small(dinov2, registers=registers)
    load_weights(method, path)
    assert equal(method.state_dict(), source.state_dict())
    method = small(dinov2, registers=registers)
    assert load_initial_weights(method, path) == []
    assert equal(method.state_dict(), source.state_dict())
    load_weights(method, export(source, "safetensors", tmp_path / "own"))
    assert equal(method.state_dict(), source.state_dict())


def test_a_loaded_dinov2_trains_on(tmp_path):
    path = dinov2_file(small(dinov2, registers=2), tmp_path / "model.pth")
    method = small(dinov2, registers=2)
    load_initial_weights(method, path)
    config = method.config
    trainer = Trainer(method, config.training, Execution(), 4, parameter_groups=dinov2.parameter_groups)
    losses = [trainer.step(iter([batch_of()])).loss for _ in range(2)]
    assert all(loss.isfinite() for loss in losses)


def test_the_student_becomes_a_copy_of_a_teacher_alone(tmp_path):
    source, method = randomise(small(dinov2)), small(dinov2)
    path = dinov2_file(source, tmp_path / "teacher_checkpoint.pth", teacher_alone=True)
    (note,) = load_initial_weights(method, path)
    assert note.endswith("has no dino_loss and ibot_patch_loss: dino_loss and ibot_patch_loss start at 0")
    for network in ("student", "teacher"):
        assert equal(part(method.state_dict(), network), part(source.state_dict(), "teacher"))


@pytest.mark.parametrize("heads", [{}, {"shared_head": False, "shared_head_teacher": False, "patch_prototypes": 24}])
def test_ibots_training_checkpoints_load(heads, tmp_path):
    source, method = randomise(small(ibot, **heads)), small(ibot, **heads)
    path = ibot_file(source, tmp_path / "checkpoint.pth")
    assert load_initial_weights(method, path) == []
    assert equal(method.state_dict(), source.state_dict())
    vit = dino_vit("vit_mini", 32, 4)
    load_weights(vit, path, encoder_only=True)
    assert equal(vit.state_dict(), source.encoder.state_dict())


def test_a_backbone_gives_student_and_teacher_their_encoder(tmp_path):
    """The files with which DINOv2 is published, in its names; the mask token is one of them."""
    source, method = randomise(small(dinov2)), small(dinov2)
    state = {rename(name, DINOV2): x for name, x in part(source.state_dict(), "teacher.backbone").items()}
    torch.save(state, path := tmp_path / "dinov2_vitl14_pretrain.pth")
    note, *_ = load_initial_weights(method, path)
    assert "gives the encoder alone" in note and "student is a copy of teacher" in note
    assert "student.dino_head and student.ibot_head" in note and "start at random" in note
    for network in (method.student, method.teacher.module):
        assert equal(
            {name: x for name, x in network.backbone.state_dict().items() if name != "mask_token"},
            source.encoder.state_dict(),
        )


def test_a_checkpoint_of_another_depth_is_refused(tmp_path):
    path = dinov2_file(small(dinov2), tmp_path / "model.pth", chunked=False)
    content = torch.load(path)["model"]
    lacking = {"model": {name: x for name, x in content.items() if ".blocks.3." not in name}}
    torch.save(lacking, path)
    name = "blocks.3.attn.proj.bias and 13 more names"
    remedy = "build the encoder with the options of the one in the file"
    refused(f"weights: {path} lacks {name} ({remedy})", ValueError, load_initial_weights, small(dinov2), path)


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_timms_dinov2_takes_the_teacher_and_gives_it_back(registers, tmp_path):
    """`vit_small_patch14_dinov2` and its variant with registers, of a smaller width; features are equal."""
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    sizes = {"image_size": (56, 56), "local_size": (28, 28), "patch_size": 14}
    method = small(dinov2, registers=registers, **sizes)
    for p in method.teacher.parameters():
        p.normal_(std=0.05) if p.ndim > 1 else p.normal_(1.0, 0.1)
    method.eval()
    path = export(method, "timm", tmp_path / "vit")
    reference = timm.create_model(name, pretrained=False, img_size=56, embed_dim=128, depth=4, num_heads=4)
    reference.load_state_dict(load_file(path), strict=True)
    images = torch.randn(2, 3, 56, 56)
    features = reference.eval().forward_head(reference.forward_features(images), pre_logits=True)
    torch.testing.assert_close(method.features(images), features, rtol=1e-4, atol=1e-4)
    other = small(dinov2, registers=registers, **sizes).eval()
    load_initial_weights(other, path)
    torch.testing.assert_close(other.features(images), method.features(images), rtol=1e-5, atol=1e-5)
    options = {"reg_tokens": registers, "no_embed_class": registers > 0, "init_values": 1.0, "pos_embed": "learn"}
    vit = ViT(56, 14, 3, 128, 4, 4, **options)
    load_weights(vit, dinov2_file(method, tmp_path / "model.pth", teacher_alone=True), encoder_only=True)
    torch.testing.assert_close(vit(images), features, rtol=1e-4, atol=1e-4)


class OfficialDinoV2(nn.Module):
    """The forward pass of DINOv2's code, from its state dict: registers after the positions were added."""

    def __init__(self, state, heads):
        super().__init__()
        self.state, self.heads = state, heads

    def forward(self, images):
        state, norm = self.state, nn.functional.layer_norm
        x = nn.functional.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
        x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + state["pos_embed"]
        if "register_tokens" in state:
            x = torch.cat([x[:, :1], state["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
        names = dict.fromkeys(name.rpartition(".norm1")[0] for name in state if ".norm1.weight" in name)
        for block in names:
            part = {
                name.removeprefix(f"{block}."): value for name, value in state.items() if name.startswith(f"{block}.")
            }
            y = norm(x, x.shape[2:], part["norm1.weight"], part["norm1.bias"], 1e-6)
            q, k, v = (
                (y @ part["attn.qkv.weight"].T + part["attn.qkv.bias"]).unflatten(2, (3, self.heads, -1)).unbind(2)
            )
            y = nn.functional.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)))
            y = y.transpose(1, 2).flatten(2) @ part["attn.proj.weight"].T + part["attn.proj.bias"]
            x = x + y * part["ls1.gamma"]
            y = norm(x, x.shape[2:], part["norm2.weight"], part["norm2.bias"], 1e-6)
            if "mlp.w12.weight" in part:
                a, b = (y @ part["mlp.w12.weight"].T + part["mlp.w12.bias"]).chunk(2, -1)
                y = (nn.functional.silu(a) * b) @ part["mlp.w3.weight"].T + part["mlp.w3.bias"]
            else:
                y = nn.functional.gelu(y @ part["mlp.fc1.weight"].T + part["mlp.fc1.bias"])
                y = y @ part["mlp.fc2.weight"].T + part["mlp.fc2.bias"]
            x = x + y * part["ls2.gamma"]
        return norm(x, x.shape[2:], state["norm.weight"], state["norm.bias"], 1e-6)


def official_dinov2(registers, swiglu, chunked, dim=48, depth=3, hidden=96):
    """A state dict with the names and shapes of DINOv2's code, random."""
    state = {"cls_token": (1, 1, dim), "pos_embed": (1, 17, dim), "mask_token": (1, dim)}
    state |= {"register_tokens": (1, 4, dim)} if registers else {}
    state |= {"patch_embed.proj.weight": (dim, 3, 8, 8), "patch_embed.proj.bias": (dim,)}
    mlp = (("w12", 2 * hidden, dim), ("w3", dim, hidden)) if swiglu else (("fc1", hidden, dim), ("fc2", dim, hidden))
    for i in range(depth):
        block = f"blocks.{i // 2}.{i}" if chunked else f"blocks.{i}"
        for name, rows, columns in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            *((f"mlp.{name}", *shape) for name, *shape in mlp),
        ):
            state |= {f"{block}.{name}.weight": (rows, columns), f"{block}.{name}.bias": (rows,)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            state[f"{block}.{name}"] = (dim,)
    state |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    return {name: torch.randn(shape, dtype=torch.float64) * 0.3 for name, shape in state.items()}


@pytest.mark.parametrize(
    "registers, swiglu, chunked",
    [(False, False, False), (True, False, False), (True, True, True), (False, False, True)],
)
def test_official_dinov2_files_load(registers, swiglu, chunked, tmp_path):
    """Names of the released backbones, and of a training run's teacher with chunked blocks."""
    state, path = official_dinov2(registers, swiglu, chunked), tmp_path / "dinov2.pth"
    if chunked:
        heads = {"dino_head.last_layer.weight": torch.zeros(2), "ibot_head.mlp.0.bias": torch.zeros(2)}
        torch.save({"teacher": {f"backbone.{name}": x for name, x in state.items()} | heads}, path)
    else:
        torch.save(state, path)
    options = {"reg_tokens": 4, "no_embed_class": True} if registers else {}
    options |= {"mlp": "swiglu", "mlp_ratio": 4.0} if swiglu else {"mlp_ratio": 2.0}
    vit = ViT(32, 8, 3, 48, 3, 4, pos_embed="learn", init_values=1e-5, **options).double()
    load_weights(vit, path, encoder_only=True)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = OfficialDinoV2(state, 4)(images)
    torch.testing.assert_close(vit.forward_features(images), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(vit(images), expected[:, 0], rtol=1e-10, atol=1e-10)
