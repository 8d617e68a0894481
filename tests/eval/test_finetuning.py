import dataclasses
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from fastssl.data.source import Subset, open_source
from fastssl.eval.finetuning import (
    Pictures,
    _collate,
    _transform,
    build_classifier,
    finetune,
    learning_rate_at,
    need_timm,
    parameter_groups,
)
from fastssl.eval.protocols import Finetune
from fastssl.evaluation import finetune_defaults
from fastssl.extras import MissingExtra
from fastssl.methods import beit, moco_v1, moco_v3
from fastssl.methods.mae import MAE
from fastssl.nn import Attention
from fastssl.nn.beit import Beit
from fastssl.nn.sharing import headless
from fastssl.nn.vit import ViT


def tiny_mae(size=(8, 8)):
    return MAE(size, 4, 3, 32, 2, 2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2).eval()


def tiny_moco_v3(backbone, size):
    return moco_v3.build(moco_v3.Config(backbone, size, dim=8, hidden=16)).eval()


def trained_norm(method_norm):
    torch.nn.init.normal_(method_norm.weight)
    torch.nn.init.normal_(method_norm.bias)


@pytest.mark.parametrize(
    ("method", "vit", "size"),
    [
        (tiny_mae((8, 12)), "", (8, 12)),
        (tiny_moco_v3("vit_mini", (8, 8)), "base_encoder", (8, 8)),
        (tiny_moco_v3("vit_conv_small", (32, 16)), "base_encoder", (32, 16)),
    ],
    ids=["mae", "moco_v3", "conv"],
)
def test_timms_model_computes_the_methods_features(method, vit, size):
    vit = method.get_submodule(vit)
    trained_norm(vit.norm)
    torch.nn.init.normal_(vit.cls_token)
    model = build_classifier(method, "", 7).eval()
    assert isinstance(model, VisionTransformer)
    assert all(isinstance(block.attn, Attention) for block in model.blocks)
    assert torch.nn.Linear not in set(map(type, model.modules()))  # the engine's
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        tokens = model.forward_features(images)  # before the last norm: the classifier has one of its own
        torch.testing.assert_close(vit.norm(tokens)[1][:, 0], method.features(images), atol=2e-5, rtol=2e-5)
        pooled = F.layer_norm(tokens[:, 1:].mean(1), tokens.shape[2:], eps=1e-6)
        logits = pooled @ model.head.weight.T
        torch.testing.assert_close(model(images), logits)
    assert logits.shape == (3, 7)
    assert 1e-5 < model.head.weight.std() < 3e-5
    assert all(p.requires_grad for p in model.parameters())  # also what pretraining had frozen


class Outsider(torch.nn.Module):
    """A method of another package."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder


VARIANTS = {
    "DINOv2": {"init_values": 0.5, "reg_tokens": 2, "no_embed_class": True, "pos_embed": "learn"},
    "registers with positions": {"reg_tokens": 2, "pos_embed": "learn"},
    "norms of queries and keys": {"qk_norm": True, "qkv_bias": False},
    "SwiGLU and another eps": {"mlp": "swiglu", "norm_eps": 0.1},
    "CLIP": {"pre_norm": True, "pos_embed": "learn"},
    "OpenAI's CLIP": {"pre_norm": True, "pos_embed": "learn", "mlp": "quick_gelu"},
    "SigLIP": {"class_token": False, "pos_embed": "learn", "mlp": "gelu_tanh"},
    "no class token, no positions": {"class_token": False, "pos_embed": "none"},
    "any size": {"dynamic_img_size": True},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_vit_is_fine_tuned_as_it_is(options):
    """timm's model computes the features of our `ViT` with pooled patches, whatever its options are."""
    vit = ViT((8, 12), 4, 3, 32, 2, 2, global_pool="avg", num_classes=3, **options).eval()
    for name, x in vit.named_parameters():
        if not name.startswith(("fc_norm", "head")):
            torch.nn.init.normal_(x, std=0.3)
    model = build_classifier(Outsider(vit), "", 7, drop_path=0.1).double().eval()
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)
    images = torch.randn(3, 3, 8, 12, dtype=torch.float64)
    expected = vit.double().features(images) @ model.head.weight.T
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["shared", "block", "none"])
def test_beit_is_fine_tuned_as_timms(kind):
    """Each block gets a copy of a shared table; a new layer normalises pooled patches; the classifier is small."""
    vit = Beit((8, 12), 4, 3, 32, 2, 2, fc_norm=False, relative_bias=kind, abs_pos=kind == "none").eval()
    for x in vit.parameters():
        torch.nn.init.normal_(x, std=0.3)
    model = build_classifier(Outsider(vit), "", 7, drop_path=0.1).double().eval()
    assert isinstance(model, timm.models.Beit)
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)
    assert 1e-5 < model.head.weight.std() < 3e-5
    images = torch.randn(3, 3, 8, 12, dtype=torch.float64)
    vit.double().norm = None  # the tokens before the last norm
    pooled = F.layer_norm(vit.forward_features(images)[:, 1:].mean(1), (32,), eps=1e-6)
    torch.testing.assert_close(model(images), pooled @ model.head.weight.T, rtol=1e-9, atol=1e-12)
    tables = {name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")}
    assert len(tables) == (0 if kind == "none" else 2)
    names, scales, decays = {id(p): name for name, p in model.named_parameters()}, {}, {}
    for group in parameter_groups(model, Finetune()):
        scales |= {names[id(p)]: group["lr_scale"] for p in group["params"]}
        decays |= {names[id(p)]: group["weight_decay"] for p in group["params"]}
    assert scales["head.weight"] == scales["fc_norm.weight"] == 1 and scales["cls_token"] == pytest.approx(0.65**3)
    for i in range(2):
        assert scales[f"blocks.{i}.attn.q_bias"] == pytest.approx(0.65 ** (2 - i))
    assert all(decays[name] == 0.05 for name in tables)
    assert decays["cls_token"] == decays["blocks.0.gamma_1"] == decays["blocks.0.attn.q_bias"] == 0


def test_every_methods_own_numbers():
    """BEiT's code has twice MAE's learning rate; other methods have MAE's numbers."""
    assert (beit.finetuning("vit_base").lr, beit.finetuning("vit_base").layer_decay) == (1e-3, 0.65)
    assert beit.finetuning("vit_large").layer_decay == 0.75
    config = beit.Config(tokenizer="runs/tokenizer")
    run = SimpleNamespace(image_size=config.image_size, backbone=config.backbone, method_name="beit")
    assert finetune_defaults(run) == beit.finetuning("vit_base")
    run.method_name = "mae"
    assert finetune_defaults(run) == Finetune.paper("vit_base")


def test_a_vit_that_pools_by_attention_is_fine_tuned_without_its_pooling():
    vit = ViT((8, 12), 4, 3, 32, 2, 2, global_pool="map", class_token=False, mlp="gelu_tanh").eval()
    model = build_classifier(Outsider(vit), "", 7).eval()
    assert not [name for name in model.state_dict() if "attn_pool" in name]
    images = torch.randn(3, 3, 8, 12)
    with torch.no_grad():
        tokens = vit.norm(model.forward_features(images))[1]
        torch.testing.assert_close(vit.attn_pool(tokens), vit.features(images), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("splits", [1, 2])
def test_our_resnet_computes_the_methods_features(splits):
    config = moco_v1.Config.small()
    config.bn_splits = splits
    method = moco_v1.build(config)
    images = torch.randn(4, 3, 32, 32)
    method.encoder_q(images)  # running statistics of its own
    model = build_classifier(method.eval(), "resnet_mini", 5).eval()
    with torch.no_grad():
        torch.testing.assert_close(headless(model, "fc")(images), method.features(images))
        assert model(images).shape == (4, 5)


def test_layer_decay_is_that_of_the_papers_code():
    """12 blocks: 0.65^13 for the embedding, 0.65^(12 − i) for block i from 0, 1 for norm and classifier."""
    torch.manual_seed(0)
    model = VisionTransformer(16, 16, num_classes=3, embed_dim=8, depth=12, num_heads=2, global_pool="avg")
    names = {id(p): name for name, p in model.named_parameters()}
    scales, decays = {}, {}
    for group in parameter_groups(model, Finetune(head_lr=3.0)):
        scales |= {names[id(p)]: group["lr_scale"] for p in group["params"]}
        decays |= {names[id(p)]: group["weight_decay"] for p in group["params"]}
    assert scales.keys() == set(names.values())
    for name, scale in {
        "cls_token": 0.65**13,
        "pos_embed": 0.65**13,
        "patch_embed.proj.weight": 0.65**13,
        "blocks.0.attn.qkv.weight": 0.65**12,
        "blocks.5.norm1.bias": 0.65**7,
        "blocks.11.mlp.fc2.weight": 0.65,
        "fc_norm.weight": 1.0,
        "head.weight": 3.0,
        "head.bias": 3.0,
    }.items():
        assert scales[name] == pytest.approx(scale), name
    undecayed = {name for name, decay in decays.items() if decay == 0}
    vectors = {name for name, p in model.named_parameters() if p.ndim <= 1}
    assert undecayed == vectors | {"cls_token", "pos_embed"}
    assert decays["head.weight"] == 0.05


def test_groups_of_a_resnet():
    model = build_classifier(moco_v1.build(moco_v1.Config.small()), "resnet_mini", 5)
    groups = parameter_groups(model, dataclasses.replace(Finetune.paper("resnet50"), weight_decay=1e-4))
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {(group["lr_scale"], group["weight_decay"]) for group in groups} == {
        (s, d) for s in (1, 20) for d in (0, 1e-4)
    }
    assert {p.shape for g in groups if g["lr_scale"] == 20 for p in g["params"]} == {(5, 256), (5,)}


def test_the_papers_numbers():
    base, large, huge = (Finetune.paper(name) for name in ("vit_base", "vit_large", "vit_huge"))
    assert (base.epochs, base.lr, base.layer_decay, base.drop_path) == (100, 5e-4, 0.65, 0.1)
    assert (large.epochs, large.lr, large.layer_decay, large.drop_path) == (50, 1e-3, 0.75, 0.2)
    assert (huge.epochs, huge.lr, huge.layer_decay, huge.drop_path) == (50, 1e-3, 0.75, 0.3)
    for config in (base, large, huge):
        assert (config.batch_size, config.warmup_epochs, config.weight_decay, config.min_lr) == (1024, 5, 0.05, 1e-6)
        assert (config.mixup, config.cutmix, config.label_smoothing, config.erasing) == (0.8, 1.0, 0.1, 0.25)
        assert config.randaugment == "rand-m9-mstd0.5-inc1"


def test_the_learning_rate_ends_at_min_lr():
    config = Finetune(epochs=20, min_lr=1e-4)  # peak 5e-4 · 4
    rates = [learning_rate_at(config, epoch) for epoch in (0, 2.5, 5, 12.5, 20)]
    assert rates == pytest.approx([0, 1e-3, 2e-3, 1.05e-3, 1e-4])
    drops = Finetune.paper("resnet50")
    assert [learning_rate_at(drops, epoch) for epoch in (0, 11.9, 12, 19)] == pytest.approx([0.01, 0.01, 1e-3, 1e-4])


def config(**changes):
    light = {"epochs": 4, "batch_size": 32, "lr": 2e-2, "warmup_epochs": 0.5}
    return dataclasses.replace(Finetune.small("vit_mini"), **{**light, **changes})


def digits(count=480):
    return tuple(Subset(open_source("digits", split), range(min(count, 350))) for split in ("train", "test"))


def test_fine_tuning_learns_and_repeats_with_the_same_seed():
    train, test = digits()
    method, results = tiny_mae(), []
    torch.manual_seed(5)
    models = [build_classifier(method, "", 10, drop_path=0.1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()  # noqa: NPY002
    for model in models:
        results.append(finetune(model, train, test, config(), (8, 8), seed=3))
    assert results[0] == results[1]
    assert results[0].top1 > 0.3
    assert results[0].top5 > results[0].top1
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), states[2])
    for name, x in build_classifier(method, "", 10).named_parameters():  # all of it learned
        assert not torch.equal(models[0].get_parameter(name), x), name


def test_all_options_together_and_a_resnet():
    """The paper's augmentations, SGD with drops, micro-batches, bf16 and workers run to the end."""
    train, test = digits(64)
    heavy = Finetune(epochs=1, batch_size=32, accumulate=2, warmup_epochs=0, precision="bf16")
    assert 0 <= finetune(build_classifier(tiny_mae((32, 32)), "", 10), train, test, heavy, (32, 32)).top1 <= 1
    resnet = build_classifier(moco_v1.build(moco_v1.Config.small()).eval(), "resnet_mini", 10)
    before = resnet.bn1.running_mean.clone()
    sgd = dataclasses.replace(Finetune.paper("resnet50"), epochs=1, batch_size=16, lr_drops=())
    assert finetune(resnet, train, test, sgd, (16, 16), workers=1).top1 > 0
    assert not torch.equal(resnet.bn1.running_mean, before)  # trained in training mode


def pictures(folder, count, bad):
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        if i in bad:
            path.write_bytes(b"broken")
        else:
            Image.new("RGB", (20, 16), (255 * (i % 2), 99, i)).save(path)
    return tuple(open_source(f"folder:{folder}", split) for split in ("train", "test"))


def test_undecodable_images_do_not_stop_fine_tuning(tmp_path, capsys):
    train, test = pictures(tmp_path, 50, bad=range(3, 50, 10))
    method = tiny_mae()
    found = finetune(build_classifier(method, "", 2), train, test, config(batch_size=8), (8, 8))
    assert found == (1.0, None)  # red or not
    broken = sum(not isinstance(sample, tuple) for sample in Pictures(train, _transform(config(), (8, 8))))
    assert 0 < broken < 10
    assert f"{broken} of 40 images could not be decoded and were replaced by others" in capsys.readouterr().out
    only_bad = Subset(train, [i for i in range(40) if train.name(i)[-7:] in {f"{i:03}.png" for i in range(3, 50, 10)}])
    with pytest.raises(ValueError, match=r"^eval: none of the labelled images can be decoded$"):
        finetune(build_classifier(method, "", 2), only_bad, test, config(batch_size=2), (8, 8))


def test_other_images_of_the_batch_replace_undecodable_ones():
    samples = [(torch.full((1,), 7.0), 1), 5, (torch.full((1,), 8.0), 0), 9]
    batch = _collate(samples)
    assert batch.images.flatten().tolist() == [7, 8, 7, 8]
    assert batch.labels.tolist() == [1, 0, 1, 0]
    assert batch.bad == [5, 9]


def test_refusals(monkeypatch):
    train, test = digits(20)
    for changes, sentence in {
        (("batch_size", 22),): "eval: --batch-size must be at most the 20 labelled images, got 22",
        (("batch_size", 9),): "eval: mixup and cutmix take pairs: --batch-size over --accumulate must be even, got 9",
    }.items():
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            finetune(build_classifier(tiny_mae(), "", 10), train, test, config(**dict(changes)), (8, 8))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"^eval finetune needs timm: pip install 'fastssl-engine\[finetune\]'$"):
        need_timm()
