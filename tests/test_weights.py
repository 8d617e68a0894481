"""Weights in and out: every layout, both directions, bit for bit."""

import argparse

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from fastssl.contract import Batch
from fastssl.methods import mae, moco_v1, moco_v2, moco_v3
from fastssl.nn.vit import ViT
from fastssl.weights import export, load_weights, read_weights
from tests.support.contract import refused


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(x, two[name]) for name, x in one.items())


def trained(method):
    """With other numbers everywhere than a fresh one has."""
    with torch.no_grad():
        for x in method.state_dict().values():
            x.copy_(torch.randn_like(x)) if x.is_floating_point() else x.add_(3)
    if hasattr(method, "criterion"):  # whose queue is saved as a copy, in another layout
        method.criterion.queue_ptr.fill_(7)
    return method


def small_mae(size=32):
    return mae.MAE(size, 8, 3, 48, 2, 4, 32, 1, 4)


METHODS = {
    "mae": (small_mae, "mae"),
    "moco_v1": (lambda: moco_v1.build(moco_v1.Config("resnet_mini", queue_size=20)), "moco"),
    "moco_v2": (lambda: moco_v2.build(moco_v2.Config("resnet_mini", queue_size=20)), "moco"),
    "moco_v3 resnet": (lambda: moco_v3.build(moco_v3.Config("resnet_mini", (32, 32), 16, 32)), "moco"),
    "moco_v3 vit": (lambda: moco_v3.build(moco_v3.Config("vit_mini", (32, 32), 16, 32)), "moco"),
}


@pytest.mark.parametrize("name", METHODS)
def test_whole_models_come_back_bit_equal(name, tmp_path):
    build, official = METHODS[name]
    method = trained(build())
    for layout, suffix in ((official, ".pth"), ("safetensors", ".safetensors")):
        path = export(method, layout, tmp_path / "weights", "resnet50")
        assert path == tmp_path / f"weights{suffix}"
        other = build()
        load_weights(other, path)
        assert equal(other.state_dict(), method.state_dict())


def test_moco_checkpoints_have_the_official_layout(tmp_path):
    """Names of the reference's encoder_q, encoder_k and queue [D, K], with DataParallel's prefix."""
    path = export(trained(METHODS["moco_v2"][0]()), "moco", tmp_path / "moco", "resnet50")
    file = torch.load(path, weights_only=True)
    assert file["arch"] == "resnet50"
    state = {name: tuple(x.shape) for name, x in file["state_dict"].items()}
    assert (state["module.queue"], state["module.queue_ptr"]) == ((128, 20), (1,))
    assert all(name.startswith("module.") for name in state)
    for encoder in ("encoder_q", "encoder_k"):
        names = {name.removeprefix(f"module.{encoder}.") for name in state if name.startswith(f"module.{encoder}.")}
        assert {"conv1.weight", "layer4.0.bn2.running_var", "fc.0.weight", "fc.2.bias"} <= names


def test_official_names_of_a_resnet_50_are_ours():
    """The reference's encoders are torchvision's ResNets, for v2 with fc = Sequential(Linear, ReLU, fc)."""
    with torch.device("meta"):
        theirs = torchvision.models.resnet50(num_classes=128)
        theirs.fc = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), theirs.fc)
        ours = moco_v2.build(moco_v2.Config())
        v3 = moco_v3.build(moco_v3.Config.paper("resnet50"))
    names = [f"{encoder}.{name}" for encoder in ("encoder_q", "encoder_k") for name in theirs.state_dict()]
    assert set(ours.state_dict()) == {*names, "queue", "queue_ptr"}
    shapes = {name: x.shape for name, x in theirs.state_dict().items()}
    assert all(ours.state_dict()[f"encoder_k.{name}"].shape == shape for name, shape in shapes.items())
    parts = {name.split(".")[0] for name in v3.state_dict()}
    assert parts == {"base_encoder", "momentum_encoder", "predictor"}
    assert v3.state_dict()["base_encoder.fc.3.weight"].shape == (256, 4096)


def test_timms_vit_takes_our_mae_encoder(tmp_path):
    """The whole ViT-B/16 of `vit_base_patch16_224.mae`, strictly, with the same features."""
    config = mae.Config()
    config.decoder_depth = 1
    method = mae.build(config)
    path = export(method, "timm", tmp_path / "encoder")
    theirs = timm.create_model("vit_base_patch16_224.mae", pretrained=False)
    theirs.load_state_dict(load_file(path), strict=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens = theirs.forward_features(images)
        torch.testing.assert_close(method.features(images), tokens[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(method.features(images, "avg"), tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-4)
    back = ViT()
    load_weights(back, path)
    assert equal(back.state_dict(), method.encoder.state_dict())


def test_timm_and_torchvision_take_moco_v3s_vit(tmp_path):
    config = moco_v3.Config("vit_small", (32, 48), dim=16, hidden=32)
    method = moco_v3.build(config).eval()
    images = torch.randn(2, 3, 32, 48)
    theirs = timm.create_model(
        "vit_small_patch16_224", pretrained=False, num_heads=12, num_classes=0, img_size=(32, 48)
    ).eval()
    theirs.load_state_dict(load_file(export(method, "timm", tmp_path / "vit")), strict=True)
    square = moco_v3.build(moco_v3.Config("vit_small", (32, 32), dim=16, hidden=32)).eval()
    tv = torchvision.models.VisionTransformer(32, 16, 12, 12, 384, 1536).eval()
    tv.heads = nn.Identity()
    tv.load_state_dict(torch.load(export(square, "torchvision", tmp_path / "vit"), weights_only=True), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), method.features(images), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(tv(images[..., :32]), square.features(images[..., :32]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["moco_v2", "moco_v3"])
def test_torchvision_and_timm_take_our_resnet(name, tmp_path):
    module = {"moco_v2": moco_v2, "moco_v3": moco_v3}[name]
    config = module.Config("resnet18", dim=16)
    method = module.build(config)
    method.train()(Batch((torch.randn(8, 3, 64, 64), torch.randn(8, 3, 64, 64)), None, None))  # running statistics
    method.eval()
    images = torch.randn(2, 3, 64, 64)
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(torch.load(export(method, "torchvision", tmp_path / "net"), weights_only=True), strict=True)
    of_timm = timm.create_model("resnet18", pretrained=False, num_classes=0)
    of_timm.load_state_dict(load_file(export(method, "timm", tmp_path / "net")), strict=True)
    with torch.no_grad():
        for model in (theirs, of_timm):
            torch.testing.assert_close(model.eval()(images), method.features(images), rtol=1e-4, atol=1e-4)


def test_official_mae_files_load(tmp_path):
    """mae_pretrain_*.pth hold the encoder, mae_visualize_*.pth the whole, both as {"model": …}."""
    source, path = trained(small_mae()), tmp_path / "mae.pth"
    torch.save({"model": source.encoder.state_dict()}, path)
    encoder, whole = ViT(32, 8, 3, 48, 2, 4), small_mae()
    load_weights(encoder, path)
    assert equal(encoder.state_dict(), source.encoder.state_dict())
    decoder = whole.decoder_pred.weight.clone()
    load_weights(whole, path, encoder_only=True)
    assert equal(whole.encoder.state_dict(), source.encoder.state_dict())
    assert torch.equal(whole.decoder_pred.weight, decoder)
    refused(
        f"weights: {path} lacks decoder_blocks.0.attn.proj.bias and 19 more names "
        "(it holds an encoder alone: encoder_only=True loads that)",
        ValueError,
        load_weights,
        whole,
        path,
    )
    torch.save({"model": source.state_dict(), "epoch": 799}, path)
    load_weights(encoder, path, encoder_only=True)
    load_weights(whole, path)
    assert equal(whole.state_dict(), source.state_dict())
    load_weights(small_mae((16, 64)), path)  # another grid: the positional tables are fitted


def test_files_that_do_not_fit_get_one_sentence(tmp_path):
    path = tmp_path / "file.pth"
    refused(f"weights: {path} is no file", ValueError, read_weights, path)
    refused(f"weights: {tmp_path} is no file", ValueError, read_weights, tmp_path)
    torch.save({"model": {}, "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(ValueError, match=r"holds more than weights, and reading that could run code of its author"):
        read_weights(path)
    path.write_bytes(path.read_bytes()[:100])
    refused(f"weights: {path} is damaged or no weights file (RuntimeError)", ValueError, read_weights, path)
    for garbage in (b"not a checkpoint", b"hello", b"<html>404</html>", b""):
        path.write_bytes(garbage)
        with pytest.raises(ValueError, match=r"file\.pth is damaged or no weights file \([A-Za-z]+\)$"):
            read_weights(path)
    torch.save({1: torch.zeros(2)}, path)
    refused(
        f"weights: {path} holds no state dict: a name with its tensor for each weight", ValueError, read_weights, path
    )
    torch.save({"model": {"epoch": 3}}, path)
    refused(
        f"weights: {path} holds no state dict: a name with its tensor for each weight", ValueError, read_weights, path
    )
    torch.save(small_mae().state_dict() | {"norm.weight": torch.zeros(7)}, path)
    with pytest.raises(ValueError, match=r"file\.pth does not fit: size mismatch for norm\.weight"):
        load_weights(small_mae(), path)
    torch.save(small_mae().state_dict() | {"head.weight": torch.zeros(7)}, path)
    with pytest.raises(ValueError, match=r"file\.pth has beside the model head\.weight"):
        load_weights(small_mae(), path)
    broken = tmp_path / "file.safetensors"
    broken.write_bytes(b"no header")
    refused(f"weights: {broken} is damaged or no weights file (SafetensorError)", ValueError, read_weights, broken)
    refused(
        "weights: encoder_only loads into a ViT or MAE, got MoCo",
        ValueError,
        load_weights,
        METHODS["moco_v1"][0](),
        path,
        encoder_only=True,
    )
    refused(
        "export: unknown format 'onnx', there are timm, torchvision, safetensors, moco, mae",
        ValueError,
        export,
        small_mae(),
        "onnx",
        tmp_path / "x",
    )
    refused(
        "export: MAE has no weights in the format moco, but in mae",
        ValueError,
        export,
        small_mae(),
        "moco",
        tmp_path / "x",
    )
    stem = moco_v3.build(moco_v3.Config("vit_conv_small", (32, 32), dim=16, hidden=32))
    for layout in ("timm", "torchvision"):
        refused(
            "export: neither timm's ViT nor torchvision's has MoCo v3's convolutional stem: use --format moco or "
            "safetensors",
            ValueError,
            export,
            stem,
            layout,
            tmp_path / "x",
        )
    for wrong in (tmp_path / "no" / "x", tmp_path):
        refused(
            f"export: the file must be named, in a folder that exists, got {wrong}",
            ValueError,
            export,
            small_mae(),
            "mae",
            wrong,
        )
    assert export(small_mae(), "mae", str(tmp_path / "vit.b.pth.tar")) == tmp_path / "vit.b.pth"


def test_names_of_wrapped_models_are_read(tmp_path):
    state = small_mae().state_dict()
    torch.save({"model": {f"module._orig_mod.{name}": x for name, x in state.items()}}, tmp_path / "x.pth")
    assert equal(read_weights(tmp_path / "x.pth"), dict(state))
