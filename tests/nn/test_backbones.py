"""Networks of timm and torchvision as encoders, with random weights: nothing is downloaded."""

import copy
import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

from fastssl.distributed import rank, world_size
from fastssl.extras import MissingExtra
from fastssl.nn import MomentumEncoder, accelerate
from fastssl.nn.backbones import ForeignNetwork, build_backbone
from fastssl.nn.heads import mlp_head
from fastssl.nn.norm import SplitBatchNorm2d, SyncBatchNorm, SyncBatchNormAct, sync_batch_norms
from fastssl.nn.resnet import ResNet
from fastssl.nn.sharing import headless
from fastssl.train.config import Training
from fastssl.train.optim import build_optimizer
from tests.support.contract import refused
from tests.support.ranks import run_ranks

# name: (size of the images, the library's network without its classifier)
NETWORKS = {
    "timm:test_convnext": (32, lambda: timm.create_model("test_convnext", num_classes=0)),
    "timm:test_vit": (32, lambda: timm.create_model("test_vit", num_classes=0, img_size=32)),
    "timm:test_efficientnet": (32, lambda: timm.create_model("test_efficientnet", num_classes=0)),
    "timm:test_nfnet": (32, lambda: timm.create_model("test_nfnet", num_classes=0)),
    "torchvision:shufflenet_v2_x0_5": (32, lambda: without("fc", "shufflenet_v2_x0_5")),
    "torchvision:mobilenet_v3_small": (32, lambda: without("classifier.3", "mobilenet_v3_small")),
    "torchvision:squeezenet1_1": (64, None),
}
TAKEN = [name for name, (_, library) in NETWORKS.items() if library]


def without(classifier, name):
    network = torchvision.models.get_model(name)
    parent, _, child = classifier.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    return network


def built(name, dim=7, **options):
    return build_backbone(name, dim, image_size=(NETWORKS[name][0],) * 2, **options)


@pytest.mark.parametrize("name", TAKEN)
def test_features_and_names_are_the_librarys(name):
    size, library = NETWORKS[name]
    network, theirs, images = built(name).eval(), library().eval(), torch.randn(2, 3, size, size)
    encoder = headless(network, "fc")
    theirs.load_state_dict(encoder.state_dict(), strict=True)
    features = encoder(images)
    torch.testing.assert_close(features, theirs(images))
    assert features.shape == (2, network.fc.in_features)
    torch.testing.assert_close(network(images), network.fc(features))
    assert set(network.state_dict()) == {*encoder.state_dict(), "fc.weight", "fc.bias"}
    assert encoder.image_size == (size, size)


@pytest.mark.parametrize("name", TAKEN)
def test_a_projector_takes_the_place_of_the_last_layer(name):
    network, again = built(name), built(name)
    for encoder in (network, again):
        encoder.fc = mlp_head(encoder.fc.in_features, 8, 5)
    copies = [copy.deepcopy(network), MomentumEncoder(network), again]
    for other in copies:
        with torch.no_grad():
            for p in other.parameters():
                p.fill_(0.5)
        assert set(other.state_dict()) == set(network.state_dict())
        other.load_state_dict(network.state_dict(), strict=True)
        for key, value in network.state_dict().items():
            assert torch.equal(other.state_dict()[key], value)
    images = torch.randn(4, 3, *network.image_size)
    network(images).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    assert network.training and all(part.training for part in network.modules())


@pytest.mark.parametrize("name", ["timm:test_convnext", "timm:test_efficientnet", "torchvision:resnet18"])
def test_feature_maps(name):
    network, images = build_backbone(name, 7, image_size=(64, 96)).eval(), torch.randn(2, 3, 64, 96)
    features = network.feature_map(images)
    assert features.shape == (2, network.width, 2, 3)
    if "convnext" not in name:  # which normalises after pooling
        torch.testing.assert_close(features.mean((2, 3)), headless(network, "fc")(images))
    for other in ("timm:test_vit", "torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x0_5"):
        network = built(other).eval()
        sentence = f"backbone: {other} has no map of {network.width} features before its last layer"
        refused(sentence, ValueError, network.feature_map, images[..., :32, :32])


def test_our_resnets_are_built_as_before():
    network = build_backbone("resnet_mini", 5, bn_splits=2, image_size=(8, 8))
    assert isinstance(network, ResNet)
    assert network.bn1.splits == 2
    small = build_backbone("resnet18", 5, True)
    assert small.conv1.kernel_size == (3, 3)


def test_the_same_seed_gives_the_same_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(built("timm:test_vit").state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_batch_norms_of_parts_of_the_batch():
    split, plain = built("torchvision:shufflenet_v2_x0_5", bn_splits=2), built("torchvision:shufflenet_v2_x0_5")
    norms = [part for part in split.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms and all(isinstance(norm, SplitBatchNorm2d) and norm.splits == 2 for norm in norms)
    plain.load_state_dict(split.state_dict(), strict=True)
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(split.double()(images)[::2], plain.double()(images[::2]))
    assert not any(isinstance(part, SplitBatchNorm2d) for part in built("timm:test_convnext", bn_splits=2).modules())


def test_attention_of_a_vit_can_be_swapped():
    network, images = built("timm:test_vit").eval(), torch.randn(2, 3, 32, 32)
    expected, names = network(images), set(network.state_dict())
    assert len(accelerate(network)) == 6
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert set(network.state_dict()) == names


@pytest.mark.parametrize("name", ["timm:test_convnext", "timm:test_efficientnet", "torchvision:swin_t"])
def test_norms_have_no_weight_decay(name):
    """LayerNorm2d of ConvNeXt, batch norms with an activation, layer norms: recognised by their type."""
    network = build_backbone(name, 7, image_size=(32, 32))
    groups = build_optimizer(network, Training(1, 8, "lars", 0.1, 1e-4)).param_groups
    decayed, exempt = ({id(p) for p in group["params"]} for group in groups)
    kinds = set()
    for part in network.modules():
        for p in part.parameters(recurse=False):
            if "norm" in type(part).__name__.lower():
                kinds.add(type(part).__name__)
                assert id(p) in exempt
            elif isinstance(part, nn.Conv2d | nn.Linear) and p.ndim > 1:
                assert id(p) in decayed
    assert kinds >= {
        "timm:test_convnext": {"LayerNorm2d"},
        "timm:test_efficientnet": {"BatchNormAct2d"},
        "torchvision:swin_t": {"LayerNorm"},
    }.get(name)


def outputs_of_this_rank(images, state):
    network = build_backbone("timm:test_efficientnet", 7)
    network.load_state_dict(state)
    synced = sync_batch_norms(network)
    kinds = {type(part) for part in synced.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)}
    assert kinds <= {SyncBatchNorm, SyncBatchNormAct} and SyncBatchNormAct in kinds
    assert set(synced.state_dict()) == set(state)
    return synced(images.chunk(world_size())[rank()]).detach()


def test_batch_norms_with_activations_over_two_ranks():
    network, images = build_backbone("timm:test_efficientnet", 7), torch.randn(8, 3, 32, 32)
    state = copy.deepcopy(network.state_dict())
    both = torch.cat(run_ranks(2, outputs_of_this_rank, images, state))
    torch.testing.assert_close(both, network(images).detach(), rtol=1e-3, atol=1e-4)


def test_refusals(monkeypatch):
    def refuses(sentence, name, *args, error=ValueError, **options):
        refused(f"backbone: {sentence}", error, build_backbone, name, 7, *args, **options)

    size = "choose another size (--image-size) or network (--backbone)"
    ours = "there are {}, and timm:NAME or torchvision:NAME for the networks of these libraries"
    refuses(f"unknown name 'resnet51': {ours.format('resnet50, resnet18, resnet152')}", "resnet51")
    every = "resnet_mini, resnet18, resnet34, resnet50, resnet101, resnet152"
    refuses(f"unknown name 'tim:vit': {ours.format(every)}", "tim:vit")
    refuses(
        "timm has no network named 'convnext_ato': did you mean convnext_atto or convnextv2_atto or convnext_nano?",
        "timm:convnext_ato",
    )
    refuses("timm has no network named '' (timm.list_models() lists them)", "timm:")
    refuses(
        "torchvision has no network named 'resnet19': did you mean resnet18 or resnet152 or resnet101?",
        "torchvision:resnet19",
    )
    refuses(
        "torchvision:squeezenet1_1 does not end in one linear layer, whose place the projector could take",
        "torchvision:squeezenet1_1",
    )
    refuses(
        "timm:deit_tiny_distilled_patch16_224 does not end in one linear layer, whose place the projector could take",
        "timm:deit_tiny_distilled_patch16_224",
    )
    refuses(
        "small_images is for our ResNets, got timm:test_vit, which has the stem of its library", "timm:test_vit", True
    )
    refuses(
        "timm:test_efficientnet has batch norms of a kind that can't be split (BatchNormAct2d): use --bn-splits 1",
        "timm:test_efficientnet",
        bn_splits=2,
    )
    refuses(
        "torchvision:alexnet takes no images of 32 × 32 pixels (Given input size: (256x1x1). Calculated output size: "
        f"(256x0x0). Output size is too small): {size}",
        "torchvision:alexnet",
        image_size=(32, 32),
    )
    refuses(
        "timm:test_vit takes no images of 33 × 32 pixels (Input height (33) should be divisible by patch size (16)): "
        f"{size}",
        "timm:test_vit",
        image_size=(33, 32),
    )
    refuses(
        "torchvision:vit_b_32 can't be built for images of 30 × 30 pixels (Input shape indivisible by patch size!): "
        f"{size}",
        "torchvision:vit_b_32",
        image_size=(30, 30),
    )
    refuses(
        "torchvision:vit_b_32 takes square images, got 32 × 64 pixels: choose another size (--image-size), or a "
        "network of timm",
        "torchvision:vit_b_32",
        image_size=(32, 64),
    )
    monkeypatch.setitem(sys.modules, "timm", None)
    refused(
        "--backbone timm:test_vit needs timm: pip install 'fastssl-engine[finetune]'",
        MissingExtra,
        build_backbone,
        "timm:test_vit",
        7,
    )


def test_networks_that_do_not_fit():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.last = nn.Linear(3, 4), nn.Linear(4, 5)

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 5)

        def forward(self, images):
            return self.head(images.new_zeros(1, 2, 4))

    name = "torchvision:own"
    refused(
        f"backbone: {name} has weights named fc.weight that are not those of its last layer",
        ValueError,
        ForeignNetwork,
        Two(),
        name,
        5,
    )
    refused(
        f"backbone: {name} must give 4 features of an image of 8 × 9 pixels, got [1, 2, 4]: choose another size "
        "(--image-size) or network (--backbone)",
        ValueError,
        ForeignNetwork(Maps(), name, 5).check,
        (8, 9),
    )
