"""Every method that takes an encoder with networks of timm and torchvision: training, evaluation, export, loading."""

import dataclasses
import inspect
import re

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastssl
from fastssl.contract import Batch
from fastssl.distributed import all_mean, rank, world_size
from fastssl.eval.protocols import Finetune
from fastssl.method_modules import method_module, method_names
from fastssl.methods import densecl, moco_v3, simsiam, swav
from fastssl.nn import accelerate
from fastssl.weights import load_weights
from tests.support.command import run
from tests.support.every_command import DATA, TINY, use_every_command
from tests.support.ranks import run_ranks
from tests.support.small_methods import SMALL


def takes_networks(method: str) -> bool:
    """Whether the help of the method's `backbone` names networks of other libraries."""
    sources = (inspect.getsource(part) for part in method_module(method).Config.__mro__[:-1])
    return "timm:NAME" in next((source for source in sources if "    backbone: str" in source), "")


METHODS = [name for name in method_names() if takes_networks(name)]


def torchvision_network(name: str, classifier: str) -> nn.Module:
    network = torchvision.models.get_model(name)
    parent, _, child = classifier.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    return network


# method: (its backbone, the library's network without its classifier)
RUNS = {
    "simclr_v1": ("timm:test_convnext", lambda: timm.create_model("test_convnext", num_classes=0)),
    "byol": ("timm:test_efficientnet", lambda: timm.create_model("test_efficientnet", num_classes=0)),
    "moco_v3": ("timm:test_vit", lambda: timm.create_model("test_vit", num_classes=0, img_size=32)),
    "simsiam": ("torchvision:shufflenet_v2_x0_5", lambda: torchvision_network("shufflenet_v2_x0_5", "fc")),
    "moco_v2": ("torchvision:mobilenet_v3_small", lambda: torchvision_network("mobilenet_v3_small", "classifier.3")),
    "swav": ("timm:test_efficientnet", lambda: timm.create_model("test_efficientnet", num_classes=0)),
    "dino": ("torchvision:shufflenet_v2_x0_5", lambda: torchvision_network("shufflenet_v2_x0_5", "fc")),
    "densecl": ("timm:test_efficientnet", lambda: timm.create_model("test_efficientnet", num_classes=0)),
    "instdisc": ("timm:test_efficientnet", lambda: timm.create_model("test_efficientnet", num_classes=0)),
    "invaspread": ("timm:test_vit", lambda: timm.create_model("test_vit", num_classes=0, img_size=32)),
    "deepcluster": ("timm:test_convnext", lambda: timm.create_model("test_convnext", num_classes=0)),
    "deepcluster_v2": ("timm:test_efficientnet", lambda: timm.create_model("test_efficientnet", num_classes=0)),
}
SMALL_CROPS = ["--local-size", "16", "16", "--local-crops", "1", "--prototypes"]
OPTIONS = {
    "moco_v2": ["--bn-splits", "1", "--queue-size", "64"],
    "swav": [*SMALL_CROPS, "12"],
    "dino": [*SMALL_CROPS, "48"],
    "densecl": ["--bn-splits", "1", "--queue-size", "64"],
    "instdisc": ["--nce-k", "32"],
    "deepcluster": ["--clusters", "6", "--components", "8"],
    "deepcluster_v2": [*SMALL_CROPS, "6", "5"],
}
EXHAUSTIVE = {"dino", "densecl", "instdisc", "invaspread", "deepcluster", "deepcluster_v2"}
ROWS = [pytest.param(name, marks=[pytest.mark.exhaustive] if name in EXHAUSTIVE else []) for name in RUNS]


@pytest.mark.slow
@pytest.mark.parametrize("method", ROWS)
def test_every_command_and_the_library_loads_what_is_exported(method, monkeypatch, capsys, tmp_path):
    (backbone, create), folder = RUNS[method], tmp_path / "run"
    library = backbone.partition(":")[0]
    words = ["--backbone", backbone, *OPTIONS.get(method, [])]
    use_every_command(monkeypatch, capsys, folder, method, *words, formats=(library, "safetensors"))
    opened, images = fastssl.open_run(folder), torch.randn(2, 3, 32, 32)
    file, network = opened.export(library), create()
    state = load_file(file) if library == "timm" else torch.load(file, weights_only=True)
    network.load_state_dict(state, strict=True)
    torch.testing.assert_close(network.eval()(images), opened.encoder()(images))
    other = "torchvision" if library == "timm" else "timm"
    sentence = rf"^export: {backbone} has the names of {library} alone: use --format {library} or safetensors$"
    with pytest.raises(ValueError, match=sentence):
        opened.export(other)
    again = opened.build()
    load_weights(again, file, encoder_only=True)
    torch.testing.assert_close(again.eval().encoder(images), opened.encoder()(images))
    words += ["--weights", file, "--folder", tmp_path / "second"]
    run(monkeypatch, "pretrain", method, *TINY, *words)  # and a run starts from it
    if "vit" in backbone:
        encoder = opened.encoder()
        assert len(accelerate(encoder)) == 6
        torch.testing.assert_close(encoder(images), opened.encoder()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["timm:test_convnext", "torchvision:shufflenet_v2_x0_5"])
@pytest.mark.parametrize("method", METHODS)
def test_features_are_what_the_projector_was_given(method, backbone):
    if method == "densecl" and "shufflenet" in backbone:
        pytest.skip("it has no map; see test_densecl_needs_a_map")
    module = method_module(method)
    config = module.Config.small()
    config = dataclasses.replace(config, **SMALL.get(method, {}))
    config.backbone, config.image_size, config.local_crops = backbone, (32, 32), 0
    built = module.build(config).eval()
    images = torch.randn(2, 3, 32, 32)
    assert built.encoder(images).shape == (2, 64 if "convnext" in backbone else 1024)
    torch.testing.assert_close(built.features(images), built.encoder(images))
    names = set(built.encoder.state_dict())
    assert names and not any(name.startswith(("network.", "fc.")) for name in names)


@pytest.mark.parametrize("backbone", ["timm:test_convnext", "torchvision:resnet18"])
def test_densecl_trains_all_parameters(backbone):
    """Layers between pooling and the last layer, such as ConvNeXt's norm, are before the global head alone."""
    config = dataclasses.replace(densecl.Config.small(), backbone=backbone, queue_size=16, image_size=(64, 64))
    model, views = densecl.build(config), torch.randn(2, 4, 3, 64, 64).unbind()
    model(Batch(views, None, None))[0].backward()
    assert all(p.grad is not None for p in model.encoder_q.parameters())
    model.eval()
    pooled = model.features(views[0])
    _, q, _ = model.encoder_q(views[0])
    torch.testing.assert_close(q, model.encoder_q[1].mlp(pooled))


def test_densecl_needs_a_map():
    config = dataclasses.replace(densecl.Config.small(), backbone="timm:test_vit")
    with pytest.raises(ValueError, match=r"^backbone: timm:test_vit has no map of 64 features"):
        densecl.build(config)


def test_all_methods_with_an_encoder_take_them():
    contrastive = {"simclr_v1", "simclr_v2", "moco_v1", "moco_v2", "moco_v3"}
    paired = {"byol", "simsiam", "barlow_twins", "vicreg", "instdisc", "invaspread", "densecl"}
    clustering = {"dino", "swav", "deepcluster", "deepcluster_v2"}
    assert set(METHODS) == contrastive | paired | clustering  # the others have encoders of their own kind


def test_networks_that_do_not_fit_a_method_are_refused():
    vit = dataclasses.replace(swav.Config.small(), backbone="timm:vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"^backbone: timm:vit_tiny.* takes no images of 16 × 16 .* \(--local-size\)"):
        swav.build(vit)
    vit.local_crops = 0
    assert swav.build(vit).encoder.image_size == (32, 32)


def test_resnets_of_other_libraries_have_the_numbers_of_resnets():
    resnet, swin = (moco_v3.Config.paper(name) for name in ("torchvision:resnet50", "torchvision:swin_t"))
    assert (resnet.training.optimizer, resnet.tau) == ("lars", 1.0)
    assert (swin.training.optimizer, swin.tau) == ("adamw", 0.2)
    assert moco_v3.linear_probe("timm:resnet50").lr == 0.1 and moco_v3.linear_probe("timm:swin_base").lr == 3.0
    assert Finetune.paper("torchvision:resnet50") == Finetune.paper("resnet50")
    assert Finetune.paper("timm:convnext_tiny") == Finetune.paper("vit_base")
    config = dataclasses.replace(moco_v3.Config.small(), backbone="torchvision:resnet18")
    assert len(moco_v3.build(config).base_encoder.fc) == len(moco_v3.build(moco_v3.Config.small()).base_encoder.fc)


def step_of_this_rank():
    """Loss and gradients of one step under DDP, on this rank's part of the batch."""
    torch.manual_seed(0)
    model = simsiam.build(dataclasses.replace(simsiam.Config.small(), backbone="timm:test_efficientnet")).double()
    views = [view.chunk(world_size())[rank()] for view in torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)]
    wrapped = DistributedDataParallel(model) if world_size() > 1 else model
    loss, _ = wrapped(Batch(tuple(views), None, None))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return all_mean(loss.detach()), gradients, model.state_dict()


@pytest.mark.slow
def test_two_ranks_train_as_one_process_with_the_whole_batch():
    """timm's batch norms keep their activations, and have the statistics of both ranks."""
    expected = step_of_this_rank()
    for made in run_ranks(2, step_of_this_rank):
        torch.testing.assert_close(made, expected, rtol=1e-7, atol=1e-9)


def test_refusals_come_before_anything_is_written(monkeypatch, tmp_path):
    folder = tmp_path / "run"

    def refuses(sentence, *words):
        words = ["pretrain", "byol", *TINY, "--folder", folder, *words]
        with pytest.raises(SystemExit, match=rf"^fastssl: backbone: {re.escape(sentence)}"):
            run(monkeypatch, *words)
        assert not folder.exists()

    assert DATA in TINY
    refuses("torchvision:alexnet takes no images of 32 × 32 pixels (", "--backbone", "torchvision:alexnet")
    refuses("timm has no network named 'convnext_ato': did you mean", "--backbone", "timm:convnext_ato")
    refuses("unknown name 'resnet': there are", "--backbone", "resnet")
    refuses("small_images is for our ResNets, got timm:test_vit", "--backbone", "timm:test_vit", "--small-images")
    refuses(
        "timm:test_vit takes no images of 36 × 36 pixels (", "--backbone", "timm:test_vit", "--image-size", "36", "36"
    )
