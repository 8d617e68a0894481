"""Encoders in the names of other libraries: Hugging Face's ViTMAE and torchvision's ViT."""

import json
import re

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from fastssl.methods.mae import MAE
from fastssl.nn.vit import ViT
from fastssl.weights import load_initial_weights, load_weights, read_weights

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
LAYER = {  # names of a layer in transformers 5: name in version 4
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def layer(dim):
    """Modules of a `ViTMAELayer` of transformers 5, by name."""
    parts = nn.ModuleDict({"layernorm_before": nn.LayerNorm(dim), "layernorm_after": nn.LayerNorm(dim)})
    parts["attention"] = nn.ModuleDict({name: nn.Linear(dim, dim) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    parts["mlp"] = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
    return parts


def hugging_face_mae():
    """State dict of a small `ViTMAEForPreTraining` of transformers 5, random.

    The first tokens hardly vary, so that features tell an eps of 1e-12 from one of 1e-6.
    """
    model = nn.ModuleDict({"vit": nn.Module(), "decoder": nn.Module()})
    vit, decoder = model["vit"], model["decoder"]
    vit.embeddings = nn.Module()
    vit.embeddings.cls_token = nn.Parameter(torch.empty(1, 1, 48))
    vit.embeddings.position_embeddings = nn.Parameter(torch.empty(1, 17, 48))
    vit.embeddings.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, 48, 8, 8)})
    vit.layers, vit.layernorm = nn.ModuleList(layer(48) for _ in range(2)), nn.LayerNorm(48)
    decoder.mask_token = nn.Parameter(torch.empty(1, 1, 32))
    decoder.decoder_pos_embed = nn.Parameter(torch.empty(1, 17, 32))
    decoder.decoder_embed, decoder.decoder_pred = nn.Linear(48, 32), nn.Linear(32, 192)
    decoder.decoder_layers, decoder.decoder_norm = nn.ModuleList([layer(32)]), nn.LayerNorm(32)
    state = {name: torch.randn(x.shape, dtype=torch.float64) * 0.3 for name, x in model.state_dict().items()}
    return {name: x * 1e-3 if "embeddings" in name else x for name, x in state.items()}


def in_version(state, version):
    """The state dict in the names of transformers 4, of 5 in memory, or of the files that 5 saves."""
    if version == "5":
        return state
    renamed = {}
    for name, x in state.items():
        for new, old in LAYER.items():
            name = name.replace(f".{new}.", f".{old}.")
        name = name.replace("vit.layers.", "vit.encoder.layer.")
        saved = version == "5 saved"
        renamed[name.replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer.") if saved else name] = x
    return renamed


def hugging_face_features(state, images, eps=1e-12):
    """Forward pass of `ViTMAEModel` on all patches: tokens [B, 17, 48]."""

    def part(name, x):
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return layer_norm(x, x.shape[2:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    embeddings = {name.removeprefix("vit.embeddings."): x for name, x in state.items() if "embeddings" in name}
    projection = "patch_embeddings.projection"
    x = nn.functional.conv2d(images, embeddings[f"{projection}.weight"], embeddings[f"{projection}.bias"], stride=8)
    positions = embeddings["position_embeddings"]
    x = x.flatten(2).mT + positions[:, 1:]
    x = torch.cat([(embeddings["cls_token"] + positions[:, :1]).expand(len(x), -1, -1), x], 1)
    for i in range(2):
        y = norm(f"vit.layers.{i}.layernorm_before", x)
        q, k, v = (part(f"vit.layers.{i}.attention.{name}_proj", y).unflatten(2, (4, 12)) for name in "qkv")
        y = scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v))).transpose(1, 2).flatten(2)
        x = x + part(f"vit.layers.{i}.attention.o_proj", y)
        y = norm(f"vit.layers.{i}.layernorm_after", x)
        x = x + part(f"vit.layers.{i}.mlp.fc2", gelu(part(f"vit.layers.{i}.mlp.fc1", y)))
    return norm("vit.layernorm", x)


@pytest.mark.parametrize("version", ["4", "5", "5 saved"])
def test_hugging_faces_vit_mae_has_the_same_features(version, tmp_path):
    """Queries, keys and values are joined, and the layer norms get Hugging Face's eps."""
    state, images = hugging_face_mae(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    path, expected = tmp_path / "model.safetensors", hugging_face_features(state, images)
    save_file(in_version(state, version), path)
    encoder, mae = ViT(**SIZES).double(), MAE(**SIZES, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4)
    load_weights(encoder, path, encoder_only=True)
    torch.testing.assert_close(encoder.forward_features(images), expected, rtol=1e-9, atol=1e-9)
    assert (hugging_face_features(state, images, 1e-6) - expected).abs().max() > 1e-2, "the eps matters here"
    load_weights(mae.double(), path)
    torch.testing.assert_close(mae.features(images), expected[:, 0], rtol=1e-9, atol=1e-9)
    decoder = {name for name in mae.state_dict() if name.startswith("decoder_")}
    assert torch.equal(
        mae.decoder_blocks[0].attn.qkv.weight[32:64], state["decoder.decoder_layers.0.attention.k_proj.weight"]
    )
    assert {module.eps for module in mae.modules() if isinstance(module, nn.LayerNorm)} == {1e-12} and len(decoder) > 15


def test_vit_mae_alone_and_the_eps_of_its_configuration(tmp_path):
    """`ViTMAEModel` has no prefix; a config.json beside the file says the eps."""
    state, images = hugging_face_mae(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    alone = {name.removeprefix("vit."): x for name, x in state.items() if name.startswith("vit.")}
    torch.save(alone | {"pooler.dense.weight": torch.zeros(2), "classifier.bias": torch.zeros(2)}, tmp_path / "x.bin")
    (tmp_path / "config.json").write_text(json.dumps({"layer_norm_eps": 1e-5}))
    encoder = ViT(**SIZES).double()
    load_weights(encoder, tmp_path / "x.bin", encoder_only=True)
    expected = hugging_face_features(state, images, 1e-5)
    torch.testing.assert_close(encoder.forward_features(images), expected, rtol=1e-9, atol=1e-9)


def test_a_run_keeps_its_eps_and_says_so(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: x.float() for name, x in hugging_face_mae().items()}, path)
    mae = MAE(**SIZES, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4)
    assert load_initial_weights(mae, path) == [
        f"{path} is of layer norms that add 1e-12 to the variance, and those of this method add 1e-06: its features "
        "differ by rounding, more where inputs hardly vary"
    ]
    assert torch.equal(mae.cls_token, read_weights(path)["cls_token"])
    assert mae.norm.eps == mae.decoder_norm.eps == 1e-6


def test_a_name_that_is_not_known_is_refused(tmp_path):
    state = hugging_face_mae() | {"vit.layers.0.layer_scale1.lambda1": torch.ones(48)}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"has beside the model blocks\.0\.layer_scale1\.lambda1 \(build the encoder"):
        load_weights(ViT(**SIZES), tmp_path / "x.pth", encoder_only=True)


@pytest.mark.parametrize("old", [False, True])
def test_torchvisions_vit_has_the_same_features(old, tmp_path):
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 48, 192, num_classes=7).eval()
    nn.init.normal_(model.heads.head.weight)
    state, path = model.state_dict(), tmp_path / "x.pth"
    if old:
        state = {
            re.sub(r"mlp\.(\d)", lambda m: f"mlp.linear_{1 + int(m[1]) // 3}", name): x for name, x in state.items()
        }
    torch.save(state, path)
    encoder = ViT(**SIZES, pos_embed="learn")
    load_weights(encoder, path, encoder_only=True)
    model.heads = nn.Identity()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(images), model(images), rtol=1e-4, atol=1e-5)
