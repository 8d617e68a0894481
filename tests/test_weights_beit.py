"""BEiT's weights: official checkpoints, timm's files, and grids of another size."""

import dataclasses

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fastssl.methods import beit
from fastssl.nn.beit import BEIT_SIZES, Beit
from fastssl.weights import export, load_initial_weights, load_weights
from tests.support.contract import refused


@pytest.fixture(autouse=True)
def small_vit(monkeypatch):
    monkeypatch.setitem(BEIT_SIZES, "vit_mini", (16, 2, 2, 4))


def tiny(**changes):
    """The small preset on a grid of 6 × 6 patches."""
    sizes = {"image_size": (24, 24), "mask_patches": 14, "mask_min": 4}
    return dataclasses.replace(beit.Config.small(), **{**sizes, **changes})


def method(**changes):
    built = beit.build(tiny(**changes)).eval()
    for p in built.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return built


def equal(ours, other):
    return ours.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in ours.items())


def timm_beit(kind, **options):
    flags = {"use_shared_rel_pos_bias": kind == "shared", "use_rel_pos_bias": kind == "block"}
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 0.1, "use_abs_pos_emb": False}
    return timm.models.Beit(24, 4, **flags, **sizes, **options).eval()


def test_official_checkpoints_have_their_names_and_come_back(tmp_path):
    source, other = method(), method()
    path = export(source, "beit", tmp_path / "beit")
    names = set(torch.load(path, weights_only=True)["model"])
    assert {"rel_pos_bias.relative_position_index", "mask_token", "lm_head.weight", "blocks.0.gamma_1"} <= names
    assert {"blocks.1.attn.q_bias", "blocks.1.attn.v_bias", "blocks.1.attn.qkv.weight"} <= names
    assert load_initial_weights(other, path) == []
    assert equal(other.state_dict(), source.state_dict())
    encoder = Beit(24, 4, 3, 16, 2, 2, fc_norm=False)
    load_weights(encoder, path, encoder_only=True)  # mask token and head are left out
    assert equal(encoder.state_dict(), source.encoder.state_dict())


@pytest.mark.parametrize("kind", ["shared", "block"])
def test_timm_takes_the_encoder(kind, tmp_path):
    source, images = method(relative_bias=kind).double(), torch.randn(2, 3, 24, 24, dtype=torch.float64)
    path = export(source, "timm", tmp_path / "beit")
    model = timm_beit(kind, num_classes=0, global_pool="token").double()
    model.load_state_dict(load_file(path), strict=True)
    tokens = model.forward_features(images)
    torch.testing.assert_close(tokens, source.forward_features(images), rtol=0, atol=1e-12)
    torch.testing.assert_close(tokens[:, 1:].mean(1), source.features(images), rtol=0, atol=1e-12)
    again = method(relative_bias=kind)
    note, _ = load_initial_weights(again, path)  # the file has no index of the tables
    assert "gives the encoder alone: lm_head and mask_token start at random" in note
    assert equal(again.encoder.state_dict(), source.float().encoder.state_dict())


def test_fine_tuned_weights_of_timm_load(tmp_path):
    """timm's named BEiTs are fine-tuned: a table for each block, the norm after pooling, a classifier."""
    model, path, images = (
        timm_beit("block", num_classes=7).double(),
        tmp_path / "timm.safetensors",
        torch.randn(2, 3, 24, 24),
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    save_file(model.state_dict(), path)
    ours = Beit(24, 4, 3, 16, 2, 2, num_classes=7, relative_bias="block").double()
    load_weights(ours, path)
    torch.testing.assert_close(ours(images.double()), model(images.double()), rtol=0, atol=1e-12)


def test_tables_of_another_grid_are_interpolated(tmp_path):
    small, large = method(), method(image_size=(40, 40))
    path = export(small, "beit", tmp_path / "beit")
    load_weights(large, path)
    table, index = large.rel_pos_bias.relative_position_bias_table, large.rel_pos_bias.relative_position_index
    assert table.shape == (19 * 19 + 3, 2) and index.shape == (101, 101)
    assert torch.equal(table[-3:], small.rel_pos_bias.relative_position_bias_table[-3:])


def test_weights_that_do_not_fit_are_refused(tmp_path):
    shared = export(method(), "beit", tmp_path / "shared")
    refused(
        f"weights: {shared} lacks blocks.0.attn.relative_position_bias_table and 1 more names",
        ValueError,
        load_weights,
        method(relative_bias="block"),
        shared,
    )
    refused(
        "export: torchvision's ViT has no blocks.0.attn.q_bias and 8 more names: use --format timm or safetensors",
        ValueError,
        export,
        method(),
        "torchvision",
        tmp_path / "x",
    )
