"""Weights in and out: every layout, both directions, bit for bit."""

import argparse

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from fastssl.contract import Batch
from fastssl.method_modules import method_module
from fastssl.methods import (
    albef,
    barlow_twins,
    byol,
    cpc,
    deepcluster_v2,
    densecl,
    dino,
    instdisc,
    invaspread,
    mae,
    moco_v1,
    moco_v2,
    moco_v3,
    simclr_v1,
    simsiam,
    swav,
    vicreg,
)
from fastssl.nn.vit import ViT
from fastssl.weights import FORMATS, export, load_initial_weights, load_weights, read_weights
from tests.support.contract import refused


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(x, two[name]) for name, x in one.items())


def randomise(method):
    """The method with random numbers in its whole state, unlike any freshly built one."""
    with torch.no_grad():
        for x in method.state_dict().values():
            x.copy_(torch.randn_like(x)) if x.is_floating_point() else x.add_(3)
    for queue in ("criterion", "dense_criterion"):  # whose keys are saved as a copy, in another layout
        if hasattr(getattr(method, queue, None), "queue_ptr"):
            getattr(method, queue).queue_ptr.fill_(7)
    return method


def small_mae(size=32):
    return mae.MAE(size, 8, 3, 48, 2, 4, 32, 1, 4)


def small_dino(backbone):
    config = dino.Config(backbone, norm_last_layer=False, prototypes=24, hidden=16, bottleneck=8)
    config.image_size, config.local_size = (32, 32), (16, 16)
    return config


METHODS = {
    "mae": (small_mae, "mae"),
    "moco_v1": (lambda: moco_v1.build(moco_v1.Config("resnet_mini", queue_size=20)), "moco"),
    "moco_v2": (lambda: moco_v2.build(moco_v2.Config("resnet_mini", queue_size=20)), "moco"),
    "moco_v3 resnet": (lambda: moco_v3.build(moco_v3.Config("resnet_mini", (32, 32), 16, 32)), "moco"),
    "simsiam": (lambda: simsiam.build(simsiam.Config("resnet_mini", (32, 32), 16, 8)), "simsiam"),
    "byol": (lambda: byol.build(byol.Config("resnet_mini", (32, 32), 16, 8)), None),
    "simclr_v1": (lambda: simclr_v1.build(simclr_v1.Config("resnet_mini", (32, 32), 16, 8)), None),
    "barlow_twins": (lambda: barlow_twins.build(barlow_twins.Config("resnet_mini", (32, 32), 16)), "barlow_twins"),
    "vicreg": (lambda: vicreg.build(vicreg.Config("resnet_mini", (32, 32), 16)), "vicreg"),
    "dino": (lambda: dino.build(small_dino("resnet_mini")), "dino"),
    "dino vit": (lambda: dino.build(small_dino("vit_mini")), "dino"),
    "swav": (lambda: swav.build(swav.Config("resnet_mini", (32, 32), dim=16, queue_size=4096)), "swav"),
    "deepcluster_v2": (lambda: deepcluster_v2.build(deepcluster_v2.Config("resnet_mini", (32, 32), dim=16)), "swav"),
    "densecl": (lambda: densecl.build(densecl.Config("resnet_mini", queue_size=20)), "densecl"),
    "instdisc": (lambda: instdisc.build(instdisc.Config("resnet_mini", images=20)), None),
    "invaspread": (lambda: invaspread.build(invaspread.Config("resnet_mini", small_images=False)), None),
    "cpc": (lambda: cpc.build(cpc.Config.small()), None),
    "moco_v3 vit": (lambda: moco_v3.build(moco_v3.Config("vit_mini", (32, 32), 16, 32)), "moco"),
    "albef": (lambda: albef.build(albef.Config.small()), "albef"),
}


@pytest.mark.parametrize("name", METHODS)
def test_whole_models_come_back_bit_equal(name, tmp_path):
    build, official = METHODS[name]
    method = randomise(build())
    for layout, suffix in ((official, ".pth"), ("safetensors", ".safetensors")):
        if layout is None:
            continue
        path = export(method, layout, tmp_path / "weights", "resnet50")
        assert path == tmp_path / f"weights{suffix}"
        other = build()
        load_weights(other, path)
        assert equal(other.state_dict(), method.state_dict())


def test_moco_checkpoints_have_the_official_layout(tmp_path):
    """Names of the reference's encoder_q, encoder_k and queue [D, K], with DataParallel's prefix."""
    path = export(randomise(METHODS["moco_v2"][0]()), "moco", tmp_path / "moco", "resnet50")
    file = torch.load(path, weights_only=True)
    assert file["arch"] == "resnet50"
    state = {name: tuple(x.shape) for name, x in file["state_dict"].items()}
    assert (state["module.queue"], state["module.queue_ptr"]) == ((128, 20), (1,))
    assert all(name.startswith("module.") for name in state)
    for encoder in ("encoder_q", "encoder_k"):
        names = {name.removeprefix(f"module.{encoder}.") for name in state if name.startswith(f"module.{encoder}.")}
        assert {"conv1.weight", "layer4.0.bn2.running_var", "fc.0.weight", "fc.2.bias"} <= names


def test_names_of_a_resnet_50_are_the_official_ones():
    """The reference's encoders are torchvision's ResNets, for v2 with fc = Sequential(Linear, ReLU, fc)."""
    with torch.device("meta"):
        reference = torchvision.models.resnet50(num_classes=128)
        reference.fc = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), reference.fc)
        model = moco_v2.build(moco_v2.Config())
        v3 = moco_v3.build(moco_v3.Config.paper("resnet50"))
    names = [f"{encoder}.{name}" for encoder in ("encoder_q", "encoder_k") for name in reference.state_dict()]
    assert set(model.state_dict()) == {*names, "queue", "queue_ptr"}
    shapes = {name: x.shape for name, x in reference.state_dict().items()}
    assert all(model.state_dict()[f"encoder_k.{name}"].shape == shape for name, shape in shapes.items())
    parts = {name.split(".")[0] for name in v3.state_dict()}
    assert parts == {"base_encoder", "momentum_encoder", "predictor"}
    assert v3.state_dict()["base_encoder.fc.3.weight"].shape == (256, 4096)


def test_timms_vit_takes_our_mae_encoder(tmp_path):
    """The whole ViT-B/16 of `vit_base_patch16_224.mae`, strictly, with the same features."""
    config = mae.Config()
    config.decoder_depth = 1
    method = mae.build(config)
    path = export(method, "timm", tmp_path / "encoder")
    reference = timm.create_model("vit_base_patch16_224.mae", pretrained=False)
    reference.load_state_dict(load_file(path), strict=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens = reference.forward_features(images)
        torch.testing.assert_close(method.features(images), tokens[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(method.features(images, "avg"), tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-4)
    back = ViT()
    load_weights(back, path)
    assert equal(back.state_dict(), method.encoder.state_dict())


def test_timm_and_torchvision_take_moco_v3s_vit(tmp_path):
    config = moco_v3.Config("vit_small", (32, 48), dim=16, hidden=32)
    method = moco_v3.build(config).eval()
    images = torch.randn(2, 3, 32, 48)
    reference = timm.create_model(
        "vit_small_patch16_224", pretrained=False, num_heads=12, num_classes=0, img_size=(32, 48)
    ).eval()
    reference.load_state_dict(load_file(export(method, "timm", tmp_path / "vit")), strict=True)
    square = moco_v3.build(moco_v3.Config("vit_small", (32, 32), dim=16, hidden=32)).eval()
    tv = torchvision.models.VisionTransformer(32, 16, 12, 12, 384, 1536).eval()
    tv.heads = nn.Identity()
    tv.load_state_dict(torch.load(export(square, "torchvision", tmp_path / "vit"), weights_only=True), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(reference(images), method.features(images), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(tv(images[..., :32]), square.features(images[..., :32]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["moco_v2", "moco_v3", "simclr_v1", "byol", "simsiam", "barlow_twins", "vicreg", "swav", "densecl"]
)
def test_torchvision_and_timm_take_our_resnet(name, tmp_path):
    module = method_module(name)
    config = module.Config("resnet18", dim=16)
    method = module.build(config)
    method.train()(Batch((torch.randn(8, 3, 64, 64), torch.randn(8, 3, 64, 64)), None, None))  # running statistics
    method.eval()
    images = torch.randn(2, 3, 64, 64)
    reference = torchvision.models.resnet18()
    reference.fc = nn.Identity()
    reference.load_state_dict(
        torch.load(export(method, "torchvision", tmp_path / "net"), weights_only=True), strict=True
    )
    timm_resnet = timm.create_model("resnet18", pretrained=False, num_classes=0)
    timm_resnet.load_state_dict(load_file(export(method, "timm", tmp_path / "net")), strict=True)
    with torch.no_grad():
        for model in (reference, timm_resnet):
            torch.testing.assert_close(model.eval()(images), method.features(images), rtol=1e-4, atol=1e-4)


def test_official_mae_files_load(tmp_path):
    """mae_pretrain_*.pth hold the encoder, mae_visualize_*.pth the whole, both as {"model": …}."""
    source, path = randomise(small_mae()), tmp_path / "mae.pth"
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
        f"weights: {path} has no weights of a ResNetMini, but blocks.0.attn.proj.bias and 50 more names",
        ValueError,
        load_weights,
        METHODS["moco_v1"][0](),
        path,
        encoder_only=True,
    )
    refused(
        f"export: unknown format 'onnx', there are {', '.join(FORMATS)}",
        ValueError,
        export,
        small_mae(),
        "onnx",
        tmp_path / "x",
    )
    refused(
        "export: MAE has no weights in the format moco: use timm, torchvision, safetensors, mae",
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


def test_encoder_only_leaves_decoder_mask_token_and_heads_alone(tmp_path):
    """Weights that the encoder cannot represent are named, never dropped."""
    sizes, path = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}, tmp_path / "vit.pth"
    encoder = randomise(ViT(32, **sizes))
    heads = {name: torch.zeros(2) for name in ("mask_token", "head.weight", "fc.bias", "dino_head.mlp.0.weight")}
    torch.save(encoder.state_dict() | heads, path)
    loaded = ViT(32, **sizes)
    load_weights(loaded, path, encoder_only=True)
    assert equal(loaded.state_dict(), encoder.state_dict())
    remedy = "(encoder_only=True leaves decoder, mask token and heads out)"
    sentence = f"weights: {path} has beside the model dino_head.mlp.0.weight and 3 more names {remedy}"
    refused(sentence, ValueError, load_weights, loaded, path)
    options = {"init_values": 0.1, "qk_norm": True, "reg_tokens": 2, "pre_norm": True}
    for option, value in options.items():
        torch.save(ViT(32, **sizes, **{option: value}).state_dict(), path)
        with pytest.raises(
            ValueError, match=r"(has beside the model|lacks) [a-z_0-9.]*(ls1|k_norm|reg_token|norm_pre|proj\.bias)"
        ):
            load_weights(ViT(32, **sizes), path, encoder_only=True)
        load_weights(ViT(32, **sizes, **{option: value}), path, encoder_only=True)
    torch.save(ViT(32, **sizes, init_values=0.1).state_dict(), path)
    remedy = "(build the encoder with the options of the one in the file)"
    sentence = f"weights: {path} has beside the model blocks.0.ls1.gamma and 3 more names {remedy}"
    for module in (ViT(32, **sizes), small_mae()):
        refused(sentence, ValueError, load_weights, module, path, encoder_only=True)


class Outsider(nn.Module):
    """A method whose module, this one, names no layout of a reference checkpoint."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder


def test_methods_without_a_reference_checkpoint_have_the_general_layouts(tmp_path):
    method = Outsider(ViT(32, 8, 3, 48, 2, 4, init_values=0.1))
    for layout in ("mae", "moco"):
        sentence = f"export: Outsider has no weights in the format {layout}: use timm, torchvision, safetensors"
        refused(sentence, ValueError, export, method, layout, tmp_path / "x")
    back = ViT(32, 8, 3, 48, 2, 4, init_values=0.1)
    load_weights(back, export(method, "timm", tmp_path / "x"))
    assert equal(back.state_dict(), method.encoder.state_dict())
    for options, sentence in (
        ({"init_values": 0.1}, "has no blocks.0.ls1.gamma and 3 more names"),
        ({"reg_tokens": 1}, "has no reg_token"),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "needs class_token"),
        ({"pos_embed": "none"}, "needs encoder.pos_embedding"),
    ):
        method = Outsider(ViT(32, 8, 3, 48, 2, 4, **options))
        sentence = f"export: torchvision's ViT {sentence}: use --format timm or safetensors"
        refused(sentence, ValueError, export, method, "torchvision", tmp_path / "x")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"_orig_mod.module._orig_mod.module.{name}",
        lambda name: name.replace(".", "._orig_mod.", 1),
        lambda name: name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module._fsdp_wrapped_module."),
        lambda name: f"module.backbone._orig_mod.{name}",
    ],
)
def test_names_of_wrapped_models_are_read(tmp_path, wrap):
    state = small_mae().state_dict()
    torch.save({"model": {wrap(name): x for name, x in state.items()}}, tmp_path / "x.pth")
    assert equal(read_weights(tmp_path / "x.pth"), dict(state))
    loaded = small_mae()
    load_weights(loaded, tmp_path / "x.pth")
    assert equal(loaded.state_dict(), state)


def test_names_that_become_one_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a.weight": torch.zeros(1), "module.a.weight": torch.ones(1)}, path)
    sentence = "a.weight and module.a.weight are one name, a.weight, without the wrappers' parts"
    refused(f"weights: {path}: {sentence}", ValueError, read_weights, path)


def test_weights_load_into_compiled_and_wrapped_modules(tmp_path):
    source = randomise(small_mae())
    path = export(source, "mae", tmp_path / "x")
    compiled, wrapped, inside = torch.compile(small_mae()), nn.DataParallel(small_mae()), small_mae()
    inside.blocks[1] = torch.compile(inside.blocks[1])
    for module in (compiled, wrapped, inside):
        load_weights(module, path)
        assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), source.state_dict().values()))


WRONG_NUMBERS = {
    "int": (lambda x: x.long(), "has int64 numbers in norm.weight, where real ones are needed"),
    "bool": (lambda x: x > 0, "has bool numbers in norm.weight, where real ones are needed"),
    "complex": (lambda x: x + 1j, "has complex64 numbers in norm.weight, where real ones are needed"),
    "NaN": (lambda x: x.index_fill(0, torch.tensor([3]), float("nan")), "has NaN or infinity in norm.weight"),
    "infinity": (lambda x: x / 0, "has NaN or infinity in norm.weight"),
    "sparse": (lambda x: x.to_sparse(), "has a sparse, quantized or empty tensor as norm.weight"),
}


@pytest.mark.parametrize(("change", "sentence"), WRONG_NUMBERS.values(), ids=WRONG_NUMBERS)
def test_wrong_numbers_are_named_before_anything_is_loaded(tmp_path, change, sentence):
    source, module, path = small_mae(), small_mae(), tmp_path / "x.pth"
    before = {name: x.clone() for name, x in module.state_dict().items()}
    torch.save(source.state_dict() | {"norm.weight": change(source.norm.weight.detach())}, path)
    for encoder_only in (False, True):
        target = source.encoder if encoder_only else module
        refused(f"weights: {path} {sentence}", ValueError, load_weights, target, path, encoder_only)
        assert equal(module.state_dict(), before)


def test_a_wrong_shape_is_named_before_anything_is_loaded(tmp_path):
    source, module, path = small_mae(), small_mae(), tmp_path / "x.pth"
    before = {name: x.clone() for name, x in module.state_dict().items()}
    torch.save(source.state_dict() | {"decoder_pred.bias": torch.zeros(7)}, path)
    sentence = f"weights: {path} does not fit: size mismatch for decoder_pred.bias: [7] in the file, [192] in the model"
    refused(sentence, ValueError, load_weights, module, path)
    assert equal(module.state_dict(), before)


def test_counts_must_be_whole_numbers_and_may_be_missing(tmp_path):
    method, path = METHODS["moco_v1"][0](), tmp_path / "x.pth"
    state = method.state_dict()
    torch.save(state | {"queue_ptr": torch.tensor([3.0])}, path)
    load_weights(method, path)
    assert method.state_dict()["queue_ptr"].tolist() == [3]
    torch.save(state | {"queue_ptr": torch.tensor([3.5])}, path)
    sentence = f"weights: {path} has float32 numbers in queue_ptr, where whole ones are needed"
    refused(sentence, ValueError, load_weights, method, path)
    old = {name: x for name, x in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, path)  # as files of torch before 0.4.1
    load_weights(method, path)


def test_a_name_of_a_weight_is_shown_in_part(tmp_path):
    torch.save({"x" * 100_000: torch.ones(1)}, tmp_path / "long.pth")
    with pytest.raises(ValueError) as error:
        load_weights(mae.build(mae.Config.small()), tmp_path / "long.pth", encoder_only=True)
    assert str(error.value) == f"weights: {tmp_path}/long.pth has no weights of a ViT, but {'x' * 200}…"


def test_official_densecl_checkpoints_load_without_their_second_copy_of_the_backbone(tmp_path):
    """The whole method from the names of its code, and its backbone into another method."""
    method, path = randomise(METHODS["densecl"][0]()), tmp_path / "epoch_200.pth"
    state = method.state_dict()
    twice = {name.replace("encoder_q.0.", "backbone."): x for name, x in state.items() if "encoder_q.0." in name}
    torch.save({"meta": {"epoch": 200}, "state_dict": twice | state}, path)
    other = METHODS["densecl"][0]()
    load_weights(other, path)
    assert equal(other.state_dict(), state)
    moco = METHODS["moco_v2"][0]()
    notes = load_initial_weights(moco, path)
    assert equal(moco.encoder.state_dict(), method.encoder.state_dict())
    assert "also has" in notes[1] and "queue2" in notes[1]
