"""Weights of CLIP and SigLIP: files of OpenAI, open_clip, timm and big_vision, and exports that these read."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from fastssl.methods import clip, siglip
from fastssl.nn.vit import ViT
from fastssl.tower_names import to_open_clip
from fastssl.weights import export, load_initial_weights, load_weights
from tests.methods.test_clip import batch_of, golden_method, small
from tests.support.contract import refused
from tests.support.golden import part, read

MODULES = {"clip": clip, "siglip": siglip}


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(x, two[name]) for name, x in one.items())


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("layout", ["open_clip", "safetensors"])
def test_an_export_loads_again(name, layout, tmp_path):
    method, other = small(MODULES[name]), small(MODULES[name])
    path = export(method, layout, tmp_path / "weights")
    assert not equal(method.state_dict(), other.state_dict())
    load_weights(other, path)
    assert equal(method.state_dict(), other.state_dict())
    assert load_initial_weights(other, path) == []


@pytest.mark.parametrize("name", MODULES)
def test_the_image_tower_has_timms_names_and_features(name, tmp_path):
    method = small(MODULES[name]).eval()
    size = {"img_size": 8, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4, "num_classes": 0}
    if name == "clip":
        model = timm.models.VisionTransformer(**size, pre_norm=True, norm_layer=lambda d: nn.LayerNorm(d, 1e-5))
    else:
        tanh = lambda: nn.GELU(approximate="tanh")  # noqa: E731
        model = timm.models.VisionTransformer(**size, class_token=False, global_pool="map", act_layer=tanh)
    path, images = export(method, "timm", tmp_path / "tower"), torch.randn(2, 3, 8, 8)
    load_weights(model, path)
    torch.testing.assert_close(model.eval()(images), method.features(images), rtol=1e-5, atol=1e-5)


def test_a_tower_loads_out_of_a_file_with_both(tmp_path):
    method = small(clip)
    path = export(method, "open_clip", tmp_path / "weights")
    vit = ViT(8, 4, 3, 128, 4, 4, pos_embed="learn", pre_norm=True, norm_eps=1e-5)
    load_weights(vit, path, encoder_only=True)
    assert equal(vit.state_dict(), method.visual.state_dict())
    other = small(clip)
    load_weights(other, path, encoder_only=True)
    assert equal(other.visual.state_dict(), method.visual.state_dict())
    assert not torch.equal(other.text.projection.weight, method.text.projection.weight)


class Archive(nn.Module):
    """Parameters and buffers in a tree of modules, as OpenAI's archives hold them."""

    def __init__(self, tensors: dict):
        super().__init__()
        for name, x in tensors.items():
            first, _, rest = name.partition(".")
            if not rest:
                self.register_buffer(first, x)
        heads = {name.partition(".")[0] for name in tensors if "." in name}
        for head in heads:
            setattr(self, head, Archive(part(tensors, f"{head}.")))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_openais_archives_in_float16(tmp_path):
    golden, _ = read("clip")
    state = {name: x.half() for name, x in part(golden, "state.").items()}
    sizes = {"input_resolution": 16, "context_length": 10, "vocab_size": 50}
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.script(Archive(state | {key: torch.tensor(x) for key, x in sizes.items()})).save(str(path))
    method = golden_method("clip").float()
    load_weights(method, path)
    assert all(torch.equal(x.half(), state[name]) for name, x in to_open_clip(method.state_dict()).items())


def test_big_visions_arrays(tmp_path):
    golden, _ = read("siglip")
    path = tmp_path / "siglip.npz"
    np.savez(path, **{f"params/{name}": x.numpy() for name, x in part(golden, "state.").items()})
    method = golden_method("siglip")
    load_weights(method, path)
    loss, _ = method(batch_of(golden["input.images"].double(), golden["input.text"].long()))
    torch.testing.assert_close(loss, golden["loss"].double(), rtol=6e-8, atol=0)


def test_another_vocabulary_is_named(tmp_path):
    path = export(small(clip), "open_clip", tmp_path / "weights")
    other = clip.build(clip.Config("vit_mini", 4, (8, 8), vocabulary=70, text_length=12))
    sentence = "size mismatch for text.token_embedding.weight: [60, 128] in the file, [70, 128] in the model"
    refused(f"weights: {path} does not fit: {sentence}", ValueError, load_weights, other, path)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_open_clip_reads_the_export_of_clip(quick_gelu, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    method = small(clip, quick_gelu=quick_gelu).eval()
    path = export(method, "open_clip", tmp_path / "weights")
    vision = {"layers": 4, "width": 128, "head_width": 32, "patch_size": 4, "image_size": 8}
    text = {"context_length": 12, "vocab_size": 60, "width": 128, "heads": 4, "layers": 3}
    model = open_clip.model.CLIP(128, vision, text, quick_gelu).eval()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    images, tokens = torch.randn(3, 3, 8, 8), torch.randint(60, (3, 12))
    ours = method.embed_images(images), method.embed_text(tokens)
    theirs = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_open_clips_losses_are_ours():
    open_clip = pytest.importorskip("open_clip")
    from fastssl.nn import CLIPLoss, SigLIPLoss

    images, texts = nn.functional.normalize(torch.randn(2, 6, 8, dtype=torch.float64), dim=2)
    scale, bias = torch.tensor(12.0).double(), torch.tensor(-7.0).double()
    torch.testing.assert_close(CLIPLoss()(images, texts, scale), open_clip.loss.ClipLoss()(images, texts, scale))
    torch.testing.assert_close(
        SigLIPLoss()(images, texts, scale, bias), open_clip.loss.SigLipLoss()(images, texts, scale, bias)
    )


@pytest.mark.exhaustive
def test_open_clip_reads_the_export_of_siglip(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    config = siglip.Config(vocabulary=60, text_length=12)
    method = siglip.build(config).eval()
    path = export(method, "open_clip", tmp_path / "weights")
    vision = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_model_pretrained": False, "timm_pool": "map"}
    vision |= {"timm_proj": "none", "image_size": 224, "timm_drop": 0.0}
    text = {"context_length": 12, "vocab_size": 60, "width": 768, "heads": 12, "layers": 12, "pool_type": "last"}
    text |= {"no_causal_mask": True, "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
    text |= {"act_kwargs": {"approximate": "tanh"}}
    model = open_clip.model.CustomTextCLIP(768, vision, text, init_logit_bias=-10.0).eval()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    images, tokens = torch.randn(2, 3, 224, 224), torch.randint(60, (3, 12))
    torch.testing.assert_close(
        method.embed_text(tokens), model.encode_text(tokens, normalize=True), rtol=1e-5, atol=1e-5
    )
    # timm's first SigLIP has exact GELU: only close
    ours, theirs = method.embed_images(images), model.encode_image(images, normalize=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)
