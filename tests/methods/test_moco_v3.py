import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.contract import Batch
from fastssl.distributed import all_gather, rank, world_size
from fastssl.methods import moco_v3
from fastssl.methods.moco_v3 import MoCoV3
from fastssl.nn.heads import mlp_head
from fastssl.nn.norm import SyncBatchNorm
from fastssl.nn.vit import ConvStem
from tests.support.contract import refused
from tests.support.golden import part, read
from tests.support.ranks import run_ranks


class Encoder(nn.Module):
    """The golden file's encoder: body, ReLU, projector."""

    def __init__(self, mlp_dim, dim):
        super().__init__()
        self.body = nn.Linear(20, 32)
        self.head = mlp_head(32, mlp_dim, mlp_dim, dim, last_norm="plain")

    def forward(self, x):
        return self.head(F.relu(self.body(x)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_three_golden_steps(dtype):
    """Losses, gradients and momentum encoder, of the method itself."""
    golden, meta = read("moco_v3_vit")
    predictor = mlp_head(meta["dim"], meta["mlp_dim"], meta["dim"], last_norm="plain")
    model = MoCoV3(Encoder(meta["mlp_dim"], meta["dim"]), predictor, meta["temperature"], meta["momentum"])
    model.load_state_dict(part(golden, "state."), strict=True)
    model.to(dtype)
    exact = {"rtol": 1e-8, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=meta["sgd_lr"])
    model.after_step(0.0)  # the reference also updates before the first step
    for step in range(3):
        expected = part(golden, f"step{step}.")
        for key, value in part(expected, "momentum_encoder.").items():
            torch.testing.assert_close(model.momentum_encoder.state_dict()[key], value.to(dtype), **exact)
        loss, _ = model(Batch((expected["x1"].to(dtype), expected["x2"].to(dtype)), None, None))
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected["loss"][0].to(dtype), **exact)
        for key, value in part(expected, "grad.").items():
            torch.testing.assert_close(model.get_parameter(key).grad, value.to(dtype), **exact)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(0.0)


def tiny(backbone="vit_mini", **changes):
    config = moco_v3.Config.small()
    config.backbone, config.hidden, config.dim, config.ema_momentum = backbone, 32, 16, 0.99
    for name, value in changes.items():
        setattr(config, name, value)
    return moco_v3.build(config)


def batch(size=8, height=32, width=32, dtype=torch.float32):
    view1, view2 = torch.randn(2, size, 3, height, width, dtype=dtype)
    return Batch((view1, view2), None, None)


def layers(head):
    return [f"{type(m).__name__}{'' if getattr(m, 'affine', True) else ' plain'}" for m in head]


def test_heads_have_the_layers_of_the_official_code():
    inner = ["Linear", "BatchNorm1d", "ReLU"]
    vit, resnet = tiny(), tiny("resnet_mini")
    assert layers(vit.base_encoder.head) == inner * 2 + ["Linear", "BatchNorm1d plain"]
    assert layers(vit.predictor) == [*inner, "Linear", "BatchNorm1d plain"]
    assert layers(resnet.base_encoder.fc) == [*inner, "Linear", "BatchNorm1d plain"]
    assert layers(resnet.predictor) == [*inner, "Linear"]
    for module in (vit.base_encoder.head, vit.predictor, resnet.base_encoder.fc, resnet.predictor):
        assert all(layer.bias is None for layer in module if isinstance(layer, nn.Linear))
    shapes = [tuple(layer.weight.shape) for layer in vit.base_encoder.head if isinstance(layer, nn.Linear)]
    assert shapes == [(32, 128), (32, 32), (16, 32)]


def test_vits_are_those_of_the_paper():
    """Names and shapes of the official state dict; 12 heads; 11 blocks after the convolutional stem."""
    with torch.device("meta"):
        small, stem = (moco_v3.build(moco_v3.Config.paper(name)) for name in ("vit_small", "vit_conv_base"))
    state = {name: tuple(x.shape) for name, x in small.state_dict().items()}
    assert state["base_encoder.patch_embed.proj.weight"] == (384, 3, 16, 16)
    assert state["momentum_encoder.pos_embed"] == (1, 197, 384)
    assert state["base_encoder.blocks.11.attn.qkv.weight"] == (1152, 384)
    assert state["base_encoder.head.0.weight"] == (4096, 384)
    assert state["momentum_encoder.head.6.weight"] == (256, 4096)
    assert state["predictor.3.weight"] == (256, 4096)
    assert small.base_encoder.blocks[0].attn.num_heads == 12
    assert len(stem.base_encoder.blocks) == 11
    assert isinstance(stem.base_encoder.patch_embed, ConvStem)
    convolutions = {n: tuple(x.shape) for n, x in stem.base_encoder.patch_embed.state_dict().items() if x.ndim == 4}
    assert convolutions == {
        "proj.0.weight": (96, 3, 3, 3),
        "proj.3.weight": (192, 96, 3, 3),
        "proj.6.weight": (384, 192, 3, 3),
        "proj.9.weight": (768, 384, 3, 3),
        "proj.12.weight": (768, 768, 1, 1),
    }


def test_positions_weights_and_the_frozen_patch_embedding():
    golden, meta = read("pos_embed_moco_v3")
    torch.manual_seed(0)
    vit = tiny(image_size=(28, 28)).base_encoder
    dim = golden["pos_embed"].shape[-1]
    assert meta["grid"] == vit.grid[0]
    from fastssl.nn.positions import sincos_positions

    torch.testing.assert_close(
        sincos_positions(dim, vit.grid, row_first=True), golden["pos_embed"].float(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(vit.pos_embed.data, sincos_positions(128, vit.grid, row_first=True))
    bound = (6 / 256) ** 0.5
    qkv = vit.blocks[0].attn.qkv.weight.detach()
    assert bound * 0.99 < qkv.abs().max() <= bound
    assert 0 < vit.cls_token.detach().std() < 2e-6
    assert vit.patch_embed.proj.bias.abs().max() == 0
    assert not any(p.requires_grad for p in vit.patch_embed.parameters())
    assert not vit.pos_embed.requires_grad
    assert all(p.requires_grad for p in tiny(freeze_patch_embed=False).base_encoder.patch_embed.parameters())


def test_resnet_blocks_are_the_identity_at_initialisation():
    assert all(block.bn2.weight.abs().max() == 0 for block in tiny("resnet_mini").base_encoder.layer3)


def test_conv_stem_trains_and_is_not_frozen():
    config = moco_v3.Config(backbone="vit_conv_small", image_size=(32, 48), dim=16, hidden=32)
    model = moco_v3.build(config)
    loss, _ = model(batch(4, 32, 48))
    loss.backward()
    assert all(p.grad is not None for p in model.base_encoder.patch_embed.parameters())
    assert model.features(batch(2, 32, 48).views[0]).shape == (2, 384)


def test_forward_reads_and_after_step_writes_the_momentum_encoder():
    model = tiny()
    before = {name: x.clone() for name, x in model.momentum_encoder.named_parameters()}
    loss, metrics = model(batch())
    loss.backward()
    assert 0 <= metrics["top1"] <= 1
    assert all(torch.equal(x, before[name]) for name, x in model.momentum_encoder.named_parameters())
    with torch.no_grad():
        model.base_encoder.norm.weight.add_(1.0)
    model.after_step(0.5)  # halfway along the cosine from 0.99 to 1
    moved = model.momentum_encoder.state_dict()["norm.weight"]
    torch.testing.assert_close(moved, torch.ones_like(moved) + (1 - 0.995))


def test_features_are_the_inputs_of_the_projector():
    for name, width in (("vit_mini", 128), ("resnet_mini", 256)):
        model = tiny(name).eval()
        images = batch().views[0]
        features = model.features(images)
        assert features.shape == (8, width)
        projector = model.base_encoder.get_submodule(model.projector_name)
        torch.testing.assert_close(projector(features), model.base_encoder(images))


def test_defaults_are_those_of_the_paper():
    vit, resnet = moco_v3.Config.paper("vit_base"), moco_v3.Config.paper("resnet50")
    t = vit.training
    assert (t.optimizer, t.lr, t.weight_decay, t.decay_all, t.betas) == ("adamw", 1.5e-4, 0.1, True, (0.9, 0.999))
    assert (t.epochs, t.batch_size, t.warmup_epochs, vit.tau, vit.ema_momentum) == (300, 4096, 40, 0.2, 0.99)
    t = resnet.training
    assert (t.optimizer, t.lr, t.weight_decay, t.momentum) == ("lars", 0.3, 1.5e-6, 0.9)
    assert (t.epochs, t.batch_size, t.warmup_epochs, resnet.tau, resnet.ema_momentum) == (1000, 4096, 10, 1.0, 0.996)
    view1, view2 = vit.augmentation.views
    assert (view1.blur_p, view1.solarize_p, view2.blur_p, view2.solarize_p) == (1.0, 0.0, 0.1, 0.2)
    assert (view1.jitter, view1.jitter_p, view1.grayscale_p, view1.flip_p) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 0.5)
    assert (view1.crop, resnet.augmentation.views[0].crop) == ((0.08, 1.0), (0.2, 1.0))


def test_error_sentences():
    refused(
        "moco_v3: unknown backbone 'vit_b', there are vit_mini, vit_small, vit_base, vit_conv_small, vit_conv_base, "
        "ResNets, timm:NAME and torchvision:NAME",
        ValueError,
        moco_v3.build,
        moco_v3.Config(backbone="vit_b"),
    )


def three_steps(world=1, rank=0):
    """Losses and state of three SGD steps in float64; with several ranks under DDP, on a part of the batch."""
    torch.manual_seed(0)
    model = tiny().double()
    assert any(isinstance(m, SyncBatchNorm) for m in model.modules()) == (world > 1)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for step in range(3):
        torch.manual_seed(10 + step)
        views = [view.chunk(world)[rank] for view in batch(8, 16, 16, torch.float64).views]
        loss, _ = wrapped(Batch(tuple(F.interpolate(view, (32, 32)) for view in views), None, None))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(step / 3)
        losses.append(all_gather(loss.detach().view(1)).mean())
    return torch.stack(losses), model.state_dict()


def three_steps_on_this_rank():
    return three_steps(world_size(), rank())


def test_two_ranks_equal_one_process_with_the_whole_batch():
    """Gathered keys, the rank's label offset, synchronised batch norms, and the mean of gradients by DDP."""
    losses, state = three_steps()
    for rank_losses, rank_state in run_ranks(2, three_steps_on_this_rank):
        torch.testing.assert_close(rank_losses, losses, rtol=1e-10, atol=0)
        torch.testing.assert_close(rank_state, state, rtol=1e-8, atol=1e-11)
