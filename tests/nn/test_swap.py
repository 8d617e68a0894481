import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from fastssl.nn import Attention, accelerate
from fastssl.nn.attention import TorchvisionAttention
from fastssl.nn.vit import ViT
from tests.support.contract import refused

KNOWN = [  # class and register tokens, distillation, LayerScale, no class token, norms before the blocks, other patches
    "vit_tiny_patch16_224",
    "vit_small_patch32_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_base_patch16_224.mae",
    "vit_base_patch16_clip_224",
    "vit_small_patch14_reg4_dinov2",
    "flexivit_small",
    "vit_medium_patch16_gap_256",
    "vit_wee_patch16_reg1_gap_256",
]
ROTARY = "takes rotary positions, which the kernels do not apply"
OTHER = "is not a supported kind of attention"
UNKNOWN = {
    "eva02_tiny_patch14_224": f"blocks.0.attn (timm.models.eva.EvaAttention) {ROTARY}, and 1 more",
    "vit_base_patch16_rope_224": f"blocks.0.attn (timm.layers.attention.AttentionRope) {ROTARY}, and 1 more",
    "swin_tiny_patch4_window7_224": "layers.0.blocks.0.attn (timm.models.swin_transformer.WindowAttention) "
    f"{OTHER}, and 11 more",
    "beit_base_patch16_224": f"blocks.0.attn (timm.models.beit.Attention) {OTHER}, and 1 more",
    "cait_xxs24_224": f"blocks.0.attn (timm.models.cait.TalkingHeadAttn) {OTHER}, and 3 more",
    "vit_base_patch16_siglip_224": f"attn_pool (timm.layers.attention_pool.AttentionPoolLatent) {OTHER}",
}
LEAVE = "; nothing was swapped (accelerate(model, leave=[…]) leaves modules by name)"


def of_timm(name, **options):
    if "swin" not in name:
        options = {"depth": 2} | options
    model = timm.create_model(name, pretrained=False, num_classes=7, **options)
    for parameter in model.parameters():  # LayerScale starts at 1e-5, which would hide what attention does
        nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else nn.init.normal_(parameter, 1.0, 0.1)
    return model, torch.randn(2, *model.default_cfg["input_size"])


def results(model, images):
    model.zero_grad()
    out = model(images)
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", KNOWN)
def test_known_architectures_keep_their_results_weights_and_names(name):
    model, images = of_timm(name)
    state = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    out, gradients = results(model, images)
    assert accelerate(model) == ["blocks.0.attn", "blocks.1.attn"]
    assert type(model.blocks[0].attn) is Attention
    assert list(model.state_dict()) == list(state)
    assert all(p is parameters[key] for key, p in model.named_parameters())
    ours, our_gradients = results(model, images)
    torch.testing.assert_close(ours, out, rtol=1e-4, atol=1e-5)
    assert our_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert (our_gradients[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, key
    assert accelerate(model) == [], "a second call finds ours"


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"scale_attn_norm": True}, {"attn_layer": "gated"}])
def test_variants_of_timms_attention(options):
    if options == {"attn_layer": "gated"}:
        model, images = of_timm("vit_tiny_patch16_224")
        for block in model.blocks:
            block.attn = timm.layers.attention.Attention(192, 3, qkv_bias=True, gated=True)
    else:
        model, images = of_timm("vit_tiny_patch16_224", **options)
    model.double()
    with torch.no_grad():
        expected = model(images.double())
        accelerate(model)
        torch.testing.assert_close(model(images.double()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_attention_is_refused_by_name_and_nothing_is_touched(name):
    model, _ = of_timm(name)
    types = [type(module) for module in model.modules()]
    refused(f"accelerate: {UNKNOWN[name]}{LEAVE}", ValueError, accelerate, model)
    assert [type(module) for module in model.modules()] == types


def test_modules_can_be_left_alone():
    model, images = of_timm("vit_base_patch16_siglip_224")
    with torch.no_grad():
        expected = model(images)
        assert accelerate(model, leave=["attn_pool", "blocks.1"]) == ["blocks.0.attn"]
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_torchvisions_vit():
    model = torchvision.models.vit_b_16(num_classes=7)
    model.encoder.layers = model.encoder.layers[:2]
    names, images = list(model.state_dict()), torch.randn(2, 3, 224, 224)
    out, gradients = results(model.eval(), images)
    assert accelerate(model) == [f"encoder.layers.encoder_layer_{i}.self_attention" for i in (0, 1)]
    ours, our_gradients = results(model, images)
    torch.testing.assert_close(ours, out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(our_gradients, gradients, rtol=1e-3, atol=1e-5)
    assert sorted(model.state_dict()) == sorted(names)
    refused(
        "TorchvisionAttention: query, key and value must be one tensor, and need_weights False",
        ValueError,
        TorchvisionAttention(nn.MultiheadAttention(8, 2)),
        *torch.randn(3, 1, 2, 8).unbind(0),
    )


class OfficialAttention(nn.Module):
    """With the parts of timm 0.3.2's, which the official MAE uses: the class itself has another home today."""

    def __init__(self, dim, num_heads, scale=None, times=1.0, window=None, drops=0.0, cap=None):
        super().__init__()
        self.num_heads, self.scale, self.times = num_heads, scale or (dim // num_heads) ** -0.5, times
        self.window, self.drops, self.cap = window, drops, cap
        self.qkv, self.attn_drop = nn.Linear(dim, 3 * dim), nn.Dropout(0.0)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x):
        batch, length, dim = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        scores = qkv[0] @ qkv[1].transpose(-2, -1) * self.scale * self.times
        if self.cap:
            scores = self.cap * (scores / self.cap).tanh()
        if self.window:
            places = torch.arange(length)
            scores = scores.masked_fill((places[:, None] - places).abs() > self.window, float("-inf"))
        weights = self.attn_drop(nn.functional.dropout(scores.softmax(-1), self.drops, self.training))
        return self.proj_drop(self.proj((weights @ qkv[2]).transpose(1, 2).reshape(batch, length, dim)))


OfficialAttention.__name__ = "Attention"


def official_like(**options):
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Module() for _ in range(2))
    for block in model.blocks:
        block.attn = OfficialAttention(16, 2, **options)
    return model


@pytest.mark.parametrize("scale", [None, 0.3])
def test_an_attention_of_unknown_home_is_swapped_once_it_gave_the_same_results(scale):
    model, x = official_like(scale=scale), torch.randn(2, 6, 16)
    expected = model.blocks[1].attn(x)
    before = torch.get_rng_state()
    assert accelerate(model) == ["blocks.0.attn", "blocks.1.attn"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(model.blocks[1].attn(x), expected)


def test_an_attention_that_computes_something_else_is_refused():
    where = f"blocks.0.attn ({__name__}.Attention)"
    for options in ({"times": 1.01}, {"window": 8}, {"drops": 0.5}, {"cap": 50.0}):
        model = official_like(**options).bfloat16()
        for block in model.blocks:  # a zero projection hides everything behind it
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.attn.proj.bias)
        refused(
            f"accelerate: {where} gives other results than multi-head attention, and 1 more{LEAVE}",
            ValueError,
            accelerate,
            model,
        )
    model = official_like()
    del model.blocks[0].attn.attn_drop
    model.blocks[0].attn.attn_drop = 0.5
    does = "changes its attention weights (attn_drop is a float)"
    refused(f"accelerate: {where} {does}{LEAVE}", ValueError, accelerate, model)
    refused(
        "accelerate: the model itself is an attention, and can't be swapped inside itself",
        ValueError,
        accelerate,
        OfficialAttention(16, 2),
    )
    refused(
        "accelerate: leave must name modules of the model, got 'nope'",
        ValueError,
        accelerate,
        official_like(),
        ["nope"],
    )
    model = official_like()
    model.blocks[0].attn.attn_drop.p = 0.1
    refused(
        f"accelerate: {where} drops attention weights (attn_drop=0.1), which the kernels do not{LEAVE}",
        ValueError,
        accelerate,
        model,
    )
    model = official_like()
    model.blocks[0].attn.relative_position_bias = nn.Parameter(torch.zeros(3))
    refused(f"accelerate: {where} is not a supported kind of attention{LEAVE}", ValueError, accelerate, model)
    model = official_like()
    model.blocks[0].attn.register_forward_hook(lambda *_: None)
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda *_: None)
    refused(f"accelerate: {where} has hooks, which a swap would lose, and 1 more{LEAVE}", ValueError, accelerate, model)
    model, _ = of_timm("vit_tiny_patch16_224")
    model.blocks[0].attn.forward = lambda x, **_: x
    replaced = "has a forward method that replaces that of its class"
    refused(
        f"accelerate: blocks.0.attn (timm.layers.attention.Attention) {replaced}{LEAVE}",
        ValueError,
        accelerate,
        model,
    )
    with torch.device("meta"):
        model = official_like()
    reason = "is not timm's, and on the meta device its results can't be compared, and 1 more"
    refused(f"accelerate: {where} {reason}{LEAVE}", ValueError, accelerate, model)


def test_a_class_of_timm_whose_forward_was_replaced_is_compared(monkeypatch):
    model, _ = of_timm("vit_tiny_patch16_224")
    monkeypatch.setattr(timm.layers.attention.Attention, "forward", lambda self, x, **_: self.proj(x))
    with pytest.raises(ValueError, match="gives other results than multi-head attention, and 1 more"):
        accelerate(model)


def test_parameters_keep_their_order():
    model = official_like()
    attn = model.blocks[0].attn
    attn._modules = dict(reversed(attn._modules.items()))
    before = list(map(id, model.parameters()))
    accelerate(model)
    assert list(map(id, model.parameters())) == before


def test_a_module_that_stands_in_two_places_is_swapped_in_both():
    model = official_like()
    model.blocks[1].attn = model.blocks[0].attn
    accelerate(model)
    assert model.blocks[0].attn is model.blocks[1].attn


def test_models_without_known_attention_are_refused():
    refused(
        "accelerate: ResNet has no attention of a supported kind; nothing was swapped",
        ValueError,
        accelerate,
        torchvision.models.resnet18(),
    )
    layer = nn.TransformerEncoderLayer(16, 2, batch_first=True)
    with pytest.raises(ValueError, match=r"self_attn \(torch\.nn.*MultiheadAttention\) is called in an unsupported way"):
        accelerate(layer)
    assert accelerate(ViT(16, 8, embed_dim=16, depth=1, num_heads=2)) == []


def test_our_attention_is_timms():
    options = {"qkv_bias": True, "qk_norm": True, "norm_layer": nn.LayerNorm}
    ours, theirs = Attention(24, 3, **options), timm.layers.attention.Attention(24, 3, **options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x))
    assert Attention(8).num_heads == timm.layers.attention.Attention(8).num_heads
    assert Attention(8).qkv.bias is None
    block = timm.models.vision_transformer.Block(24, 3, scale_attn_norm=True, attn_layer=Attention)
    assert block(x).shape == x.shape
    refused(
        "Attention: attn_drop must be 0, the kernels drop no attention weights, got 0.1",
        ValueError,
        Attention,
        8,
        attn_drop=0.1,
    )
    refused("Attention: dim must be divisible by num_heads=3, got 8", ValueError, Attention, 8, 3)
    refused(
        "Attention: attn_mask and is_causal are not supported: every token sees all tokens",
        ValueError,
        ours,
        x,
        torch.zeros(7, 7),
    )
