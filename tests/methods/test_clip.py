"""CLIP and SigLIP against their reference implementations, and their recipes."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from fastssl.contract import Batch, EmbedsText
from fastssl.methods import clip, siglip
from fastssl.nn.two_towers import CLIP_SIZES, SIGLIP_SIZES, Size, clip_towers, siglip_towers
from fastssl.tower_names import to_open_clip, to_towers
from fastssl.train.config import Training
from fastssl.train.schedule import learning_rate
from tests.support.contract import refused
from tests.support.golden import part, read

GOLDEN_SIZES = {"clip": Size(16, 2, 2, 8, 16, 2, 2, 12), "siglip": Size(16, 2, 2, 8, 16, 2, 2, 16, 2.0)}


def golden_method(name: str) -> nn.Module:
    if name == "clip":
        return clip.CLIP(clip_towers(GOLDEN_SIZES["clip"], (16, 16), 50, 10, True)).double()
    return siglip.SigLIP(siglip_towers(GOLDEN_SIZES["siglip"], (16, 24), 30, 6)).double()


def batch_of(images, tokens) -> Batch:
    empty = torch.zeros(len(images), dtype=torch.int64)
    return Batch((images,), empty, empty, empty, {"tokens": tokens})


def small(module, **changes):
    config = dataclasses.replace(module.Config.small(), patch_size=4, vocabulary=60, text_length=12, **changes)
    config.image_size = (8, 8)
    return module.build(config)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_golden_loss_and_gradients(name):
    golden, _ = read(name)
    method = golden_method(name)
    state = to_towers(part(golden, "state."))
    method.load_state_dict({key: x.double() for key, x in state.items()})
    images, tokens = golden["input.images"].double(), golden["input.text"].long()
    loss, _ = method(batch_of(images, tokens))
    # SigLIP's is stored as float32
    torch.testing.assert_close(loss, golden["loss"].double(), rtol=1e-9 if name == "clip" else 6e-8, atol=0)
    loss.backward()
    wanted = to_towers(part(golden, "grad."))
    assert wanted.keys() == dict(method.named_parameters()).keys()
    for key, p in method.named_parameters():
        # a bias of keys moves all scores of a query alike: its gradient is rounding
        torch.testing.assert_close(p.grad, wanted[key], rtol=1e-9, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
    wanted = [golden[key] for key in (("image_features", "text_features") if name == "clip" else ("zimg", "ztxt"))]
    with torch.no_grad():
        found = method.embed_images(images), method.embed_text(tokens)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs / theirs.norm(dim=1, keepdim=True), rtol=3e-8, atol=1e-9)
    assert isinstance(method, EmbedsText)


def test_open_clips_schedule():
    golden, _ = read("schedules_text")
    training = Training(10, 256, "adamw", 5e-4, 0.2, warmup_epochs=1.5, warmup_lr=5e-4 / 6, warmup_includes_peak=True)
    ours = [learning_rate(training, step / 4, 4) for step in range(40)]
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), golden["open_clip.cosine"], rtol=1e-9, atol=0)


def test_names_of_open_clip_return():
    golden, _ = read("clip")
    state = part(golden, "state.")
    returned = to_open_clip(to_towers(state))
    assert returned.keys() == state.keys() and all(torch.equal(x, state[key]) for key, x in returned.items())
    assert to_towers(to_open_clip(small(siglip).state_dict())).keys() == small(siglip).state_dict().keys()


def test_stacked_blocks_of_big_vision():
    golden, _ = read("siglip")
    state, blocks = {}, {}
    for key, x in part(golden, "state.").items():
        name, _, number = key.partition("encoderblock_")
        if number:
            blocks.setdefault(f"{name}encoderblock{number[1:]}", []).append(x)
        else:
            state[f"params/{key}"] = x
    state |= {f"params/{key}": torch.stack(x) for key, x in blocks.items()}
    ours, plain = to_towers(state), to_towers(part(golden, "state."))
    assert ours.keys() == plain.keys() and all(torch.equal(x, plain[key]) for key, x in ours.items())


@pytest.mark.parametrize("trimmed", [5, 8])
def test_what_is_cut_from_clips_captions_changes_nothing(trimmed):
    method, tokens = small(clip).double(), torch.randint(1, 58, (6, 12))
    for row, end in enumerate((4, 3, 2, 4, 1, 4)):
        tokens[row, end], tokens[row, end + 1 :] = 59, 0
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    found = []
    for ids in (tokens, tokens[:, :trimmed], torch.where(tokens == 0, 7, tokens)):
        method.zero_grad()
        loss, _ = method(batch_of(images, ids))
        loss.backward()
        found.append([loss.detach(), method.embed_text(ids).detach(), method.visual.blocks[0].attn.qkv.weight.grad])
    for others in found[1:]:
        for one, two in zip(found[0], others):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


def test_siglip_reads_the_last_position():
    method, tokens = small(siglip), torch.randint(60, (3, 12))
    sentence = "TextTower: tokens must have shape [B, L=12], got [3, 8]"
    refused(sentence, ValueError, method.embed_text, tokens[:, :8])
    refused(
        "TextTower: tokens must have shape [B, L] with L from 1 to 12, got [3, 13]",
        ValueError,
        small(clip).embed_text,
        torch.zeros(3, 13, dtype=torch.int64),
    )


def test_clip_clamps_its_scale_and_siglip_does_not():
    for module, largest in ((clip, math.log(100)), (siglip, 9.0)):
        method = small(module)
        for value, wanted in ((9.0, largest), (-1.0, 0.0 if module is clip else -1.0)):
            nn.init.constant_(method.logit_scale, value)
            method.after_step(0.5)
            assert method.logit_scale.item() == pytest.approx(wanted)


def test_weight_decay_spares_vectors_and_positions():
    decayed, spared = clip.parameter_groups(small(clip))
    names = {id(p): name for name, p in small(clip).named_parameters()}
    assert len(decayed["params"]) + len(spared["params"]) == len(names) and spared["weight_decay_scale"] == 0
    method = small(clip)
    names = {id(p): name for name, p in method.named_parameters()}
    exempt = {names[id(p)] for p in clip.parameter_groups(method)[1]["params"]}
    assert {"logit_scale", "visual.cls_token", "visual.pos_embed", "text.positional_embedding"} <= exempt
    assert not exempt & {"text.token_embedding.weight", "projection.weight", "text.projection.weight"}


def test_initial_weights():
    torch.manual_seed(0)
    size = Size(128, 2, 4, 4, 96, 3, 4, 64)
    visual, projection, text = clip_towers(size, (32, 32), 500, 40, False)
    stds = {
        text.token_embedding.weight: 0.02,
        text.positional_embedding: 0.01,
        text.blocks[0].attn.qkv.weight: 96**-0.5,
        text.blocks[1].attn.proj.weight: 96**-0.5 * 6**-0.5,
        text.blocks[1].mlp.fc2.weight: 96**-0.5 * 6**-0.5,
        text.blocks[1].mlp.fc1.weight: (2 * 96) ** -0.5,
        text.projection.weight: 96**-0.5,
        projection.weight: 128**-0.5,
        visual.pos_embed: 128**-0.5,
        visual.blocks[0].attn.qkv.weight: (2 / (4 * 128)) ** 0.5,  # Xavier, of the packed matrix
        visual.blocks[0].mlp.fc1.weight: (3 * 128) ** -0.5,  # torch's default
    }
    for x, std in stds.items():
        assert x.std().item() == pytest.approx(std, rel=0.06)
    visual, _, text = siglip_towers(size._replace(mlp_ratio=2.0), (32, 32), 500, 40)
    assert visual.blocks[0].attn.qkv.weight.std().item() == pytest.approx((1 / 128) ** 0.5, rel=0.05)
    assert text.token_embedding.weight.std().item() == pytest.approx(96**-0.5, rel=0.05)
    assert text.projection.weight.std().item() == pytest.approx(96**-0.5, rel=0.05)
    assert visual.patch_embed.proj.weight.std().item() == pytest.approx(48**-0.5, rel=0.05)


def test_numbers_of_parameters_of_the_papers_models():
    """Image and text tower of ViT-B/16 (the facts of open_clip's profile), and SigLIP's B/16 and So400m/14."""
    with torch.device("meta"):
        model = clip.build(clip.Config("vit_base", 16))
        assert round(sum(p.numel() for p in model.visual.parameters()) / 1e6 + 768 * 512 / 1e6, 1) == 86.2
        assert round(sum(p.numel() for p in model.text.parameters()) / 1e6, 1) == 63.4
        so400m = siglip.build(siglip.Config("vit_so400m", vocabulary=32000)).visual
        assert so400m.blocks[0].mlp.fc1.out_features == 4304
    assert CLIP_SIZES["vit_base"].patch == 32 and SIGLIP_SIZES["vit_base"].patch == 16


def test_refusals():
    for name, module in (("clip", clip), ("siglip", siglip)):
        method = small(module)
        batch = batch_of(torch.randn(2, 3, 8, 8), torch.ones(2, 12, dtype=torch.int64))._replace(extras={})
        sentence = f"{name}: a batch must have the tokens of captions, got none: use a source with captions"
        refused(sentence, ValueError, method, batch)
    refused(
        "clip: --backbone must be vit_mini, vit_base, vit_large, vit_huge, got 'resnet50'",
        ValueError,
        clip.build,
        clip.Config("resnet50"),
    )
