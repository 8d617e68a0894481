"""The ViT with every option beside timm's VisionTransformer, which has the same names, and what the options cost."""

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import SwiGLUPacked
from timm.layers.drop import DropPath
from torch import nn

from fastssl.nn import ViT
from fastssl.nn.block import Block, LayerScale, drop_path_factors
from fastssl.nn.momentum import MomentumEncoder
from fastssl.nn.positions import interpolate_positions
from fastssl.train.recompute import recompute_blocks
from tests.support.contract import refused

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
SMALL = {**TINY, "pos_embed": "learn"}
DINOV2 = {**SMALL, "patch_size": 14, "init_values": 1e-5}
# name in timm: (arguments of timm's model, arguments of ours)
CASES = {
    "plain": ("vit_small_patch16_224", {}, SMALL),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 98}, {**DINOV2, "img_size": 98}),
    "dinov2 reg4": (
        "vit_small_patch14_reg4_dinov2",
        {"img_size": 98},
        {**DINOV2, "img_size": 98, "reg_tokens": 4, "no_embed_class": True},
    ),
    "registers with positions": ("vit_small_patch16_224", {"reg_tokens": 3}, {**SMALL, "reg_tokens": 3}),
    "avg, fc_norm": ("vit_small_patch16_224", {"global_pool": "avg"}, {**SMALL, "global_pool": "avg"}),
    "avg, norm": (
        "vit_small_patch16_224",
        {"global_pool": "avg", "fc_norm": False},
        {**SMALL, "global_pool": "avg", "fc_norm": False},
    ),
    "no class token": (
        "vit_small_patch16_224",
        {"class_token": False, "global_pool": "avgmax"},
        {**SMALL, "class_token": False, "global_pool": "avgmax"},
    ),
    "max, registers alone": (
        "vit_small_patch16_224",
        {"class_token": False, "global_pool": "max", "reg_tokens": 2, "fc_norm": False},
        {**SMALL, "class_token": False, "global_pool": "max", "reg_tokens": 2, "fc_norm": False},
    ),
    "qk_norm, no qkv bias": (
        "vit_small_patch16_224",
        {"qk_norm": True, "qkv_bias": False},
        {**SMALL, "qk_norm": True, "qkv_bias": False},
    ),
    "pre_norm, eps": (
        "vit_small_patch16_224",
        {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-3)},
        {**SMALL, "pre_norm": True, "norm_eps": 1e-3},
    ),
    "no positions": ("vit_small_patch16_224", {"pos_embed": "none"}, {**SMALL, "pos_embed": "none"}),
    "all tokens, no classifier": (
        "vit_small_patch16_224",
        {"global_pool": "", "num_classes": 0},
        {**SMALL, "global_pool": "", "num_classes": 0},
    ),
    "swiglu": (
        "vit_small_patch16_224",
        {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 2.66667 * 2},
        {**SMALL, "mlp": "swiglu", "mlp_ratio": 2.66667 * 2},
    ),
}


def pair(case, dtype=torch.float64, **both):
    """timm's model with random weights everywhere, and ours with its state dict."""
    name, options, arguments = CASES[case]
    theirs = timm.create_model(name, pretrained=False, **{**TINY, **options, **both})
    for parameter in theirs.parameters():  # LayerScale starts at 1e-5, which would hide the blocks
        nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else nn.init.normal_(parameter, 1.0, 0.1)
    ours = ViT(**{**arguments, **both})
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype).eval(), ours.to(dtype).eval()


def agree(theirs, ours, images, **close):
    torch.testing.assert_close(ours.forward_features(images), theirs.forward_features(images), **close)
    features = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    torch.testing.assert_close(ours.features(images), features, **close)
    torch.testing.assert_close(ours(images), theirs(images), **close)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_timms_weights_load_strictly_and_give_timms_numbers(case):
    theirs, ours = pair(case)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(2, 3, *ours.img_size, dtype=torch.float64)
    agree(theirs, ours, images, rtol=1e-10, atol=1e-10)
    agree(theirs.float(), ours.float(), images.float(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in CASES if case != "all tokens, no classifier"])
def test_other_image_sizes_give_timms_numbers(case, monkeypatch):
    """Smaller and larger, square and not, native again, and one with as many patches as the native size."""
    theirs, ours = pair(case, dynamic_img_size=True)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # timm interpolates float64 tables in float32
    p, (rows, columns) = ours.patch_size, ours.grid
    assert (rows * columns) % 49 == 0
    for grid in ((3, 5), (rows + 2, columns + 1), (rows, columns), (rows // 7, columns * 7)):
        images = torch.randn(1, 3, grid[0] * p, grid[1] * p, dtype=torch.float64)
        agree(theirs, ours, images, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name, options",
    [
        ("vit_small_patch16_224", {"num_classes": 1000}),
        ("vit_small_patch14_dinov2", {"img_size": 518, "patch_size": 14, "init_values": 1e-5}),
        (
            "vit_giant_patch14_reg4_dinov2",
            {
                **{"img_size": 518, "patch_size": 14, "init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
                **{"embed_dim": 1536, "depth": 40, "num_heads": 24, "mlp_ratio": 2.66667 * 2, "mlp": "swiglu"},
            },
        ),
    ],
)
def test_names_and_shapes_of_whole_models(name, options):
    with torch.device("meta"):
        theirs = timm.create_model(name, pretrained=False).state_dict()
        ours = ViT(**{"embed_dim": 384, "num_heads": 6, "pos_embed": "learn", **options}).state_dict()
    assert {n: x.shape for n, x in ours.items()} == {n: x.shape for n, x in theirs.items()}


@torch.no_grad()
def test_dinov2_at_its_native_size():
    """518 pixels: 1,370 tokens, more than the attention kernel takes."""
    theirs = timm.create_model("vit_small_patch14_dinov2", pretrained=False, depth=1).eval()
    ours = ViT(518, **{**DINOV2, "embed_dim": 384, "num_heads": 6, "depth": 1, "num_classes": 0}).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(1, 3, 518, 518)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["dinov2 reg4", "no class token", "qk_norm, no qkv bias", "pre_norm, eps", "swiglu"])
def test_gradients_are_timms(case):
    theirs, ours = pair(case, dynamic_img_size=True)
    p = ours.patch_size
    images = torch.randn(2, 3, 3 * p, 4 * p, dtype=torch.float64)
    for model in (theirs, ours):
        model(images).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"{name} {m}"
        )


def factors_of(vit, batch, seed):
    torch.manual_seed(seed)
    return drop_path_factors(vit.drop_path_rate, len(vit.blocks), next(vit.parameters()).new_empty(batch))


def test_drop_path_is_timms_with_the_same_draws(monkeypatch):
    theirs, ours = pair("dinov2", drop_path_rate=0.5, depth=3)
    assert [block.drop_path1.drop_prob for block in theirs.blocks[1:]] == [0.25, 0.5]
    factors = factors_of(ours, 4, seed=3)
    assert factors.unique().tolist() == pytest.approx([0, 1, 1 / 0.75, 2])
    draws = iter(factors[1:].unbind(0))  # timm's first block has no drop path
    pending = []

    def timms(module, x):
        pending.extend([] if pending else next(draws).unbind(0))
        return x * pending.pop(0)

    monkeypatch.setattr(DropPath, "forward", timms)
    images = torch.randn(4, 3, 98, 98, dtype=torch.float64)
    torch.manual_seed(3)
    torch.testing.assert_close(ours.train()(images), theirs.train()(images), rtol=1e-10, atol=1e-10)
    assert torch.equal(ours.eval()(images), ours(images)), "evaluation drops nothing"


def test_drop_path_rates_are_linear_and_factors_have_expectation_1():
    torch.manual_seed(0)
    factors = drop_path_factors(0.5, 3, torch.empty(20_000, 1))
    assert drop_path_factors(0.5, 1, torch.empty(9)).eq(1).all()
    assert factors.shape == (3, 2, 20_000, 1, 1)
    assert torch.equal(factors[0], torch.ones(2, 20_000, 1, 1))
    for rate, of_block in zip((0.25, 0.5), factors[1:]):
        assert of_block.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
        deviation = (rate / (1 - rate) / of_block.numel()) ** 0.5
        assert abs(of_block.mean() - 1) < 4.5 * deviation
    both = (factors[2, 0] == 0).double().mul(factors[2, 1] == 0).mean()
    assert both == pytest.approx(0.25, abs=0.015), "the two branches are dropped independently"


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_blocks_drop_the_same_paths(autocast):
    """Gradients of a step with activation checkpointing equal those of one without, to the last bit."""
    torch.manual_seed(0)
    plain = ViT(16, 4, embed_dim=16, depth=3, num_heads=2, drop_path_rate=0.6, init_values=0.5)
    recomputed, images = copy.deepcopy(plain), torch.randn(6, 3, 16, 16)
    recompute_blocks(recomputed)
    for model in (plain, recomputed):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(images).square().mean()
        torch.rand(5)  # other draws between forward and backward
        loss.backward()
    assert factors_of(plain, 6, 1).eq(0).any(), "nothing was dropped, so nothing was tested"
    for one, two in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad)


def test_a_block_scales_its_branches_in_one_pass():
    block = Block(16, 2, init_values=0.1)
    nn.init.normal_(block.ls1.gamma)
    nn.init.normal_(block.ls2.gamma)
    x, factors = torch.randn(3, 5, 16), torch.tensor([[0.0, 2.0, 1.0], [4.0, 0.0, 1.0]]).view(2, 3, 1, 1)
    total = sum(block(x, drop_path=factors))
    middle = x + block.ls1(block.attn(block.norm1(x)[1])) * factors[0]
    expected = middle + block.ls2(block.mlp(block.norm2(middle)[1])) * factors[1]
    torch.testing.assert_close(total, expected)
    ids = torch.tensor([[4, 0], [1, 2], [3, 3]])
    some = sum(block(x, ids=ids[:, :1], drop_path=factors))
    torch.testing.assert_close(some, total.gather(1, ids[:, :1, None].expand(-1, -1, 16)))


def test_options_that_are_off_add_no_modules_and_no_operations():
    vit = ViT(16, 4, embed_dim=16, depth=2, num_heads=2)
    assert not any(isinstance(m, LayerScale | nn.Dropout) and getattr(m, "p", 1) for m in vit.modules())
    assert not list(vit.buffers()) and vit.fc_norm is None and vit.norm_pre is None and vit.reg_token is None
    state = torch.get_rng_state()
    with torch.profiler.profile() as profile:
        vit.train()(torch.randn(2, 3, 16, 16))
    names = {event.name for event in profile.events()}
    assert not {"aten::rand", "aten::upsample_bicubic2d", "aten::_upsample_bicubic2d_aa", "aten::layer_norm"} & names
    torch.set_rng_state(state)


def test_fixed_positions_are_interpolated_once_for_each_size_and_never_stale(monkeypatch):
    calls = []

    def counting(*args, **kwargs):
        calls.append(args[2])
        return interpolate_positions(*args, **kwargs)

    monkeypatch.setattr("fastssl.nn.vit.interpolate_positions", counting)
    vit = ViT(16, 4, embed_dim=16, depth=1, num_heads=2, dynamic_img_size=True)
    images = torch.randn(2, 3, 8, 12, requires_grad=True)
    with torch.inference_mode():
        vit(images.detach())
    vit(images).sum().backward()  # what inference mode cached may be used in training
    assert calls == [(2, 3)]
    other = ViT(16, 4, embed_dim=16, depth=1, num_heads=2, row_first=True)
    vit.load_state_dict({**vit.state_dict(), "pos_embed": other.pos_embed})
    expected = interpolate_positions(other.pos_embed, (4, 4), (2, 3))[:, 1:]
    assert torch.equal(vit.positions((2, 3)), expected) and len(calls) == 2
    assert vit.double().positions((2, 3)).dtype == torch.float64
    assert torch.equal(copy.deepcopy(vit).float().positions((2, 3)), expected)
    assert torch.equal(vit.positions((4, 4)), vit.pos_embed[:, 1:])


def test_trained_positions_get_their_gradient_at_every_size():
    vit = ViT(16, 4, embed_dim=16, depth=1, num_heads=2, dynamic_img_size=True, pos_embed="learn", reg_tokens=2)
    before = vit.positions((2, 3)).clone()
    (vit(torch.randn(2, 3, 8, 12)) * torch.randn(16)).sum().backward()
    assert vit.pos_embed.grad.abs().sum(2).gt(0).all()
    vit.pos_embed.data.add_(1)  # a write that leaves no trace in the tensor's version
    torch.testing.assert_close(vit.positions((2, 3)), before + 1)


def test_the_residual_stream_stays_float32_under_autocast():
    options = {"pos_embed": "none", "init_values": 0.1, "drop_path_rate": 0.5, "pre_norm": True, "reg_tokens": 1}
    vit, dtypes = ViT(16, 4, embed_dim=16, depth=2, num_heads=2, **options), []
    for block in vit.blocks:
        block.norm1.register_forward_hook(lambda _, args, out: dtypes.append((args[0].dtype, out[1].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        features = vit.train()(torch.randn(2, 3, 16, 16))
    assert dtypes == [(torch.float32, torch.bfloat16)] * 2 and features.dtype == torch.float32


def test_a_momentum_encoder_without_drop_path_follows_a_vit_with_it():
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    student, teacher = ViT(16, 4, **sizes, drop_path_rate=0.3), ViT(16, 4, **sizes)
    teacher.load_state_dict(student.state_dict(), strict=True)
    MomentumEncoder(teacher).update(student)


def test_arguments_that_do_not_fit_get_one_sentence():
    pools, mlps = "'avg', 'max', 'avgmax', 'map', ''", "'gelu', 'gelu_tanh', 'quick_gelu', 'swiglu'"
    for arguments, sentence in (
        ({"global_pool": "mean"}, f"ViT: global_pool must be one of 'token', {pools}, got 'mean'"),
        ({"class_token": False}, f"ViT: global_pool must be one of {pools}, got 'token' (without class token)"),
        ({"pos_embed": "rope"}, "ViT: pos_embed must be 'sincos', 'learn' or 'none', got 'rope'"),
        ({"drop_path_rate": 1.0}, "ViT: drop_path_rate must be at least 0 and below 1, got 1.0"),
        ({"reg_tokens": -1}, "ViT: reg_tokens must be at least 0, got -1"),
        ({"mlp": "relu"}, f"Block: mlp must be one of {mlps}, got 'relu'"),
        ({"mlp": "swiglu", "mlp_ratio": 0.2}, "SwiGLU: hidden must be even, for the gate and its input, got 3"),
        ({"img_size": (16, 18)}, "ViT: img_size must be divisible by patch_size=4, got 16×18"),
    ):
        refused(
            sentence, ValueError, ViT, **{"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_heads": 2} | arguments
        )
    vit = ViT(16, 4, embed_dim=16, depth=1, num_heads=2, dynamic_img_size=True)
    expected = "ViT: images must have shape [B, C=3, H, W] with H and W divisible by patch_size=4"
    for shape in ([2, 3, 16, 18], [2, 1, 16, 16], [2, 3, 0, 16], [2, 3, 16, 0]):
        refused(f"{expected}, got {shape}", ValueError, vit, torch.randn(shape))
    refused(
        "features: pool must be one of 'token', 'avg', 'max', 'avgmax', '', got 'cls'",
        ValueError,
        vit.features,
        None,
        "cls",
    )


@pytest.mark.parametrize("options", [{"drop_path_rate": 0.5}, {"dynamic_img_size": True}, {"mlp": "swiglu"}])
def test_compiles_in_one_graph(options):
    torch._dynamo.reset()
    vit = ViT(16, 4, embed_dim=16, depth=2, num_heads=2, **options)
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 8, 12) if "dynamic_img_size" in options else torch.randn(2, 3, 16, 16)
    compiled(images).sum().backward()
    assert vit.patch_embed.proj.weight.grad.isfinite().all()
    torch.testing.assert_close(compiled.eval()(images), vit(images))
