"""Files from which a run starts: encoders of other libraries and methods in every method."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from fastssl.methods import mae, moco_v1, moco_v2, moco_v3
from fastssl.methods.mae import MAE
from fastssl.nn import MomentumEncoder
from fastssl.nn.vit import ViT
from fastssl.preparation import _build_method
from fastssl.weights import load_initial_weights, load_weights
from tests.support.contract import refused
from tests.support.runs import make_run

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}  # those of vit_mini

METHODS = {
    "mae": lambda: mae.build(mae.Config("vit_mini", (32, 32), decoder_dim=32, decoder_depth=1, decoder_heads=2)),
    "moco_v1": lambda: moco_v1.build(moco_v1.Config("resnet_mini", queue_size=20)),
    "moco_v2": lambda: moco_v2.build(moco_v2.Config("resnet_mini", queue_size=20)),
    "moco_v2 resnet18": lambda: moco_v2.build(moco_v2.Config("resnet18", queue_size=20)),
    "moco_v3 resnet": lambda: moco_v3.build(moco_v3.Config("resnet_mini", (32, 32), 16, 32)),
    "moco_v3 vit": lambda: moco_v3.build(moco_v3.Config("vit_mini", (32, 32), 16, 32)),
}


def randomised(module):
    with torch.no_grad():
        for x in module.state_dict().values():
            x.copy_(torch.rand_like(x) + 0.5) if x.is_floating_point() else x.fill_(3)
    return module


def random_state(name, prefix=""):
    """State of a method with random weights; with a prefix, the part of it without that prefix."""
    return {
        n.removeprefix(prefix): x for n, x in randomised(METHODS[name]()).state_dict().items() if n.startswith(prefix)
    }


def timm_vit():
    return randomised(timm.models.VisionTransformer(**SIZES, num_classes=7)).state_dict()


def torchvision_vit():
    return randomised(torchvision.models.VisionTransformer(32, 4, 4, 4, 128, 512, num_classes=7)).state_dict()


DECODER = "gives the encoder alone: decoder starts at random"
MOCO = "gives the encoder alone: encoder_q.fc and queue start at random, encoder_k is a copy of encoder_q"
V3_VIT = "base_encoder.head and predictor start at random, momentum_encoder is a copy of base_encoder"
V3_RESNET = V3_VIT.replace("head", "fc")
HEADS = "does not tell its number of heads: this encoder has 4 of 32 channels"
CASES = {  # (file, method): the file's state dict, sentences
    ("our encoder", "mae"): (lambda: randomised(ViT(**SIZES)).state_dict(), [DECODER, HEADS]),
    ("timm's ViT", "mae"): (timm_vit, [DECODER, "also has head: left out", HEADS]),
    ("timm's ViT", "moco_v3 vit"): (timm_vit, [f"gives the encoder alone: {V3_VIT}", "also has head: left out", HEADS]),
    ("torchvision's ViT", "mae"): (torchvision_vit, [DECODER, "also has heads: left out", HEADS]),
    ("a MAE", "moco_v3 vit"): (
        lambda: random_state("mae"),
        [f"gives the encoder alone: {V3_VIT}", "also has decoder: left out", HEADS],
    ),
    ("torchvision's ResNet", "moco_v2 resnet18"): (
        lambda: randomised(torchvision.models.resnet18()).state_dict(),
        [MOCO, "also has fc: left out"],
    ),
    ("timm's ResNet", "moco_v2 resnet18"): (
        lambda: randomised(timm.create_model("resnet18", pretrained=False, num_classes=0)).state_dict(),
        [MOCO],
    ),
    ("encoder_q without its head", "moco_v1"): (
        lambda: {n: x for n, x in random_state("moco_v1").items() if n.startswith("encoder_q.") and ".fc." not in n},
        [MOCO],
    ),
    ("a MoCo v2", "moco_v1"): (
        lambda: random_state("moco_v2"),
        [MOCO, "also has encoder_k, encoder_q.fc and queue: left out"],
    ),
    ("a MoCo v2", "moco_v3 resnet"): (
        lambda: random_state("moco_v2"),
        [f"gives the encoder alone: {V3_RESNET}", "also has encoder_k, encoder_q.fc and queue: left out"],
    ),
    ("a MoCo v3", "moco_v2"): (
        lambda: random_state("moco_v3 resnet"),
        [MOCO, "also has base_encoder.fc, momentum_encoder and predictor: left out"],
    ),
    ("encoder_q in wrappers", "moco_v1"): (
        lambda: {f"_orig_mod.module.{n}": x for n, x in random_state("moco_v1").items() if n.startswith("encoder_q.")},
        ["has no encoder_k and queue: queue starts at random, encoder_k is a copy of encoder_q"],
    ),
    ("all but the momentum encoder", "moco_v3 vit"): (
        lambda: {n: x for n, x in random_state("moco_v3 vit").items() if not n.startswith("momentum_encoder.")},
        ["has no momentum_encoder: momentum_encoder is a copy of base_encoder"],
    ),
}


@pytest.mark.parametrize("case", CASES, ids=" in ".join)
def test_encoders_load_into_every_method(case, tmp_path):
    """Encoders are those of the file, momentum encoders equal what they follow, other parts stay; all is said."""
    (build, notes), path, name = CASES[case], tmp_path / "x.pth", case[1]
    torch.save(build(), path)
    method = METHODS[name]()
    before = {n: x.clone() for n, x in method.state_dict().items()}
    assert load_initial_weights(method, path) == [f"{path} {note}" for note in notes]
    after = method.state_dict()
    assert all(x.min() >= 0.5 for x in method.encoder.state_dict().values()), (
        "every weight of the encoder is the file's"
    )
    for momentum, trained in (("encoder_k", "encoder_q"), ("momentum_encoder", "base_encoder")):
        assert all(torch.equal(x, after[n.replace(momentum, trained, 1)]) for n, x in after.items() if momentum in n)
    for part in ("queue", "predictor", "decoder_", "encoder_q.fc"):
        if f"{part.strip('_')} " in notes[0].partition("start")[0]:
            assert all(torch.equal(x, before[n]) for n, x in after.items() if n.startswith(part)), part


def test_encoder_only_loads_into_every_method(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(random_state("moco_v2"), path)
    method = METHODS["moco_v3 resnet"]()
    load_weights(method, path, encoder_only=True)
    assert all(x.min() >= 0.5 for x in method.encoder.state_dict().values())
    assert torch.equal(method.momentum_encoder.module.conv1.weight, method.base_encoder.conv1.weight)


def test_whole_methods_need_no_sentence(tmp_path):
    path = tmp_path / "x.pth"
    for name in METHODS:
        torch.save(random_state(name), path)
        assert load_initial_weights(METHODS[name](), path) == []


def test_files_that_fit_no_part_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(timm_vit(), path)
    sentence = f"weights: {path} has no weights of a ResNetMini, but blocks.0.attn.proj.bias and 55 more names"
    refused(sentence, ValueError, load_initial_weights, METHODS["moco_v1"](), path)
    torch.save(random_state("mae") | {"norm_pre.weight": torch.ones(128)}, path)
    sentence = f"weights: {path} has beside the model norm_pre.weight"
    refused(sentence, ValueError, load_initial_weights, METHODS["mae"](), path)
    torch.save(random_state("mae"), path)
    deeper = MAE(**SIZES, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)
    with pytest.raises(ValueError, match=r"lacks decoder_blocks\.1\.attn\.proj\.bias and 11 more names"):
        load_initial_weights(deeper, path)
    torch.save(random_state("moco_v1") | {"encoder_q.layer5.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"has beside the model encoder_q\.layer5\.weight|beside the model layer5"):
        load_initial_weights(METHODS["moco_v1"](), path)


def test_a_run_prints_what_does_not_come_from_the_file(tmp_path, capsys):
    path, run = tmp_path / "encoder.pth", make_run(tmp_path / "run", mae, "shapes:count=8", trained=False)
    torch.save(randomised(run.build().encoder).state_dict(), path)
    run.options.weights = path
    method = _build_method(run, None, torch.device("cpu"))
    assert capsys.readouterr().out.splitlines() == [f"{path} {DECODER}", f"{path} {HEADS}"]
    assert all(x.min() >= 0.5 for x in method.encoder.state_dict().values())
    run.options.weights = tmp_path / "nan.pth"
    torch.save(method.state_dict() | {"norm.bias": torch.full((128,), float("nan"))}, run.options.weights)
    sentence = f"weights: {run.options.weights} has NaN or infinity in norm.bias"
    refused(sentence, ValueError, _build_method, run, None, torch.device("cpu"))


class Student(nn.Module):
    """A method of somebody else, whose momentum encoder follows one of two modules with the same names."""

    def __init__(self):
        super().__init__()
        self.encoder, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.teacher = MomentumEncoder(self.encoder)


def test_a_momentum_encoder_that_may_follow_two_modules_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(nn.Linear(3, 3).state_dict(), path)
    student = Student()
    before = student.encoder.weight.clone()
    sentence = "weights: teacher of Student follows a module with the same names of weights, of which 2 are beside it"
    refused(f"{sentence}: load the weights yourself", ValueError, load_initial_weights, student, path)
    assert torch.equal(student.encoder.weight, before)
    torch.save(student.state_dict(), path)
    assert load_initial_weights(student, path) == [], "a whole file needs no copy"
