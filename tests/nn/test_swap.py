import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from fastssl.nn import Attention, accelerate
from fastssl.nn.attention import TorchvisionAttention, is_causal
from fastssl.nn.biased_attention import BiasedAttention
from fastssl.nn.vit import ViT
from tests.support.contract import refused

SUPPORTED = [  # registers, distillation, LayerScale, no class token, norms before the blocks, other patch sizes
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
SMALL = {"img_size": 48, "embed_dim": 48, "num_heads": 3, "depth": 2}
WINDOWS = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (1, 2)}
BIASED = [  # architectures with an additive bias
    ("beit_base_patch16_224", SMALL),
    ("beit_base_patch16_224", SMALL | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    ("beitv2_base_patch16_224", SMALL | {"use_shared_rel_pos_bias": True}),
    ("vit_relpos_small_patch16_224", SMALL | {"qk_norm": True}),
    ("vit_relpos_small_patch16_224", SMALL | {"rel_pos_type": "bias", "class_token": True}),
    ("vit_srelpos_small_patch16_224", SMALL),
    ("swin_tiny_patch4_window7_224", WINDOWS),
]
ROTARY = "takes rotary positions, which the kernels do not apply"
OTHER = "is not a supported kind of attention"
UNSUPPORTED = {
    "eva02_tiny_patch14_224": f"blocks.0.attn (timm.models.eva.EvaAttention) {ROTARY}, and 1 more",
    "vit_base_patch16_rope_224": f"blocks.0.attn (timm.layers.attention.AttentionRope) {ROTARY}, and 1 more",
    "swinv2_cr_tiny_224": f"stages.0.blocks.0.attn "
    f"(timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention) {OTHER}, and 11 more",
    "cait_xxs24_224": f"blocks.0.attn (timm.models.cait.TalkingHeadAttn) {OTHER}, and 3 more",
}
LEAVE = "; nothing was swapped (accelerate(model, leave=[…]) leaves modules by name)"


def timm_model(name, **options):
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


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_architectures_keep_their_results_weights_and_names(name):
    model, images = timm_model(name)
    state = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    out, gradients = results(model, images)
    assert accelerate(model) == ["blocks.0.attn", "blocks.1.attn"]
    assert type(model.blocks[0].attn) is Attention
    assert list(model.state_dict()) == list(state)
    assert all(p is parameters[key] for key, p in model.named_parameters())
    engine_out, engine_gradients = results(model, images)
    torch.testing.assert_close(engine_out, out, rtol=1e-4, atol=1e-5)
    assert engine_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert (engine_gradients[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, key
    assert accelerate(model) == [], "a second call has nothing to replace"


@pytest.mark.parametrize("name, options", BIASED, ids=str)
def test_attention_with_a_bias_keeps_its_results_weights_and_names(name, options):
    torch.manual_seed(1)
    model = timm.create_model(name, pretrained=False, num_classes=7, **options).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else nn.init.normal_(parameter, 1.0, 0.1)
    images = torch.randn(2, 3, options["img_size"], options["img_size"]).double()
    names, parameters = list(model.state_dict()), dict(model.named_parameters())
    out, gradients = results(model, images)
    swapped = accelerate(model)
    assert len(swapped) == (4 if "swin" in name else 2)
    assert all(type(model.get_submodule(module)) is BiasedAttention for module in swapped)
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == list(parameters)
    assert all(p is parameters[key] for key, p in model.named_parameters())
    torch.testing.assert_close(results(model, images), (out, gradients), rtol=1e-8, atol=1e-10)
    assert accelerate(model) == [], "a second call has nothing to replace"
    with pytest.raises(ValueError, match="must be called before accelerate"):
        model.get_submodule(swapped[0]).set_window_size((2, 2))


def test_a_bias_that_is_computed_in_another_way_is_refused():
    class Attention(timm.models.beit.Attention):
        def _get_rel_pos_bias(self):
            return 2 * super()._get_rel_pos_bias()

    model = timm.create_model("beit_base_patch16_224", **SMALL, num_classes=7)
    model.blocks[1].attn = Attention(48, 3, qkv_bias=True, window_size=(3, 3))
    reason = "gives other results than multi-head attention"
    rejected = f"blocks.1.attn ({__name__}.Attention) {reason}"
    refused(f"accelerate: {rejected}{LEAVE}", ValueError, accelerate, model)


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"scale_attn_norm": True}, {"attn_layer": "gated"}])
def test_variants_of_timms_attention(options):
    if options == {"attn_layer": "gated"}:
        model, images = timm_model("vit_tiny_patch16_224")
        for block in model.blocks:
            block.attn = timm.layers.attention.Attention(192, 3, qkv_bias=True, gated=True)
    else:
        model, images = timm_model("vit_tiny_patch16_224", **options)
    model.double()
    with torch.no_grad():
        expected = model(images.double())
        accelerate(model)
        torch.testing.assert_close(model(images.double()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_attention_is_refused_by_name_and_nothing_is_replaced(name):
    model, _ = timm_model(name)
    types = [type(module) for module in model.modules()]
    refused(f"accelerate: {UNSUPPORTED[name]}{LEAVE}", ValueError, accelerate, model)
    assert [type(module) for module in model.modules()] == types


def test_modules_can_be_left_alone():
    model, images = timm_model("vit_base_patch16_siglip_224")
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
    engine_out, engine_gradients = results(model, images)
    torch.testing.assert_close(engine_out, out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(engine_gradients, gradients, rtol=1e-3, atol=1e-5)
    assert sorted(model.state_dict()) == sorted(names)
    refused(
        "TorchvisionAttention: query, key and value must be one tensor, and need_weights False",
        ValueError,
        TorchvisionAttention(nn.MultiheadAttention(8, 2)),
        *torch.randn(3, 1, 2, 8).unbind(0),
    )


class OfficialAttention(nn.Module):
    """A copy of the `Attention` of timm 0.3.2, which the official MAE uses, with ways to compute something else."""

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
def test_an_attention_of_unknown_code_is_swapped_if_it_gives_the_same_results(scale):
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
    does = "drops attention weights (attn_drop=0.5), which the kernels do not"
    refused(f"accelerate: {where} {does}{LEAVE}", ValueError, accelerate, model)
    model.blocks[0].attn.attn_drop = nn.Dropout2d(0.0)
    does = "changes its attention weights (attn_drop is a Dropout2d)"
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
    model, _ = timm_model("vit_tiny_patch16_224")
    model.blocks[0].attn.forward = lambda x, **_: x
    replaced = "has a forward method that replaces that of its class"
    refused(
        f"accelerate: blocks.0.attn (timm.layers.attention.Attention) {replaced}{LEAVE}", ValueError, accelerate, model
    )
    with torch.device("meta"):
        model = official_like()
    reason = "is not timm's, and on the meta device its results can't be compared, and 1 more"
    refused(f"accelerate: {where} {reason}{LEAVE}", ValueError, accelerate, model)


class DinoV2Attention(nn.Module):
    """`Attention` of DINOv2's code: `attn_drop` is a number, and torch or xformers computes."""

    def __init__(self, dim, num_heads, attn_drop=0.0, double=True, factor=1.0):
        super().__init__()
        self.dim, self.num_heads, self.scale, self.attn_drop = dim, num_heads, (dim // num_heads) ** -0.5, attn_drop
        self.double_precision, self.factor = double, factor
        self.qkv, self.proj, self.proj_drop = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x, is_causal=False):
        if x.dtype == torch.float64 and not self.double_precision:
            raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        dropped = self.attn_drop if self.training else 0
        x = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=is_causal)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)) * self.factor)


class MemEffAttention(DinoV2Attention):
    """The same of DINOv2's code with xformers, which has lists of crops in one batch."""

    def forward(self, x, attn_bias=None):
        assert attn_bias is None, "xFormers is required for using nested tensors"
        return super().forward(x)


DinoV2Attention.__name__ = "Attention"


def with_attention(attention):
    model = nn.Module()
    model.block = nn.Module()
    model.block.attn = attention
    return model


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", [DinoV2Attention, MemEffAttention])
def test_the_attention_of_dinov2s_code(kind, double):
    """Also where the kernels have no float64, as xformers', and float32 must do for the comparison."""
    model, x = with_attention(kind(16, 2, double=double)), torch.randn(2, 6, 16)
    expected = model.block.attn(x)
    assert accelerate(model) == ["block.attn"]
    torch.testing.assert_close(model.block.attn(x), expected)
    does = "drops attention weights (attn_drop=0.2), which the kernels do not"
    name = f"block.attn ({__name__}.{kind.__name__})"
    refused(f"accelerate: {name} {does}{LEAVE}", ValueError, accelerate, with_attention(kind(16, 2, 0.2)))
    does = "gives other results than multi-head attention"
    other = with_attention(kind(16, 2, double=double, factor=1.001))
    refused(f"accelerate: {name} {does}{LEAVE}", ValueError, accelerate, other)


class MaskedAttention(OfficialAttention):
    """Attention of somebody, whose mask says which pairs of tokens are left out, not which are kept."""

    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        mask = None if attn_mask is None else ~attn_mask
        x = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return self.proj(x.transpose(1, 2).flatten(2))


class PrefixAttention(OfficialAttention):
    def forward(self, x, prefix=None):
        return super().forward(x if prefix is None else torch.cat([prefix, x], 1))


MaskedAttention.__name__ = PrefixAttention.__name__ = "Attention"


def test_arguments_that_would_fail_or_mean_another_thing_later_are_refused_at_the_swap():
    for kind, does in (
        (MaskedAttention, "gives other results than multi-head attention with attn_mask"),
        (PrefixAttention, "takes the argument prefix, which the engine's attention does not"),
    ):
        name = f"accelerate: block.attn ({__name__}.Attention)"
        refused(f"{name} {does}{LEAVE}", ValueError, accelerate, with_attention(kind(16, 2)))


@pytest.mark.parametrize("options", [{}, {"class_token": True, "reg_tokens": 1, "qk_norm": True}])
def test_padded_batches_of_a_naflex_vit(options):
    """Images of several sizes in one batch: timm masks the padding of the smaller ones."""
    config = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "global_pool": "avg", **options}
    model = timm.models.naflexvit.NaFlexVit(timm.models.naflexvit.NaFlexVitCfg(**config), num_classes=7).double().eval()
    y, x = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    patches = {
        "patches": torch.randn(2, 12, 48, dtype=torch.float64),
        "patch_coord": torch.stack([y, x], -1).view(1, 12, 2).repeat(2, 1, 1),
        "patch_valid": torch.arange(12) < torch.tensor([[12], [8]]),
    }
    whole = {**patches, "patch_valid": torch.ones(2, 12, dtype=torch.bool)}
    inputs = (patches, whole, torch.randn(2, 3, 16, 24, dtype=torch.float64))
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        assert accelerate(model) == ["blocks.0.attn", "blocks.1.attn"]
        for x, out in zip(inputs, expected):
            torch.testing.assert_close(model(x), out, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(expected[0], expected[1])


def test_a_class_of_timm_whose_forward_was_replaced_is_compared(monkeypatch):
    model, _ = timm_model("vit_tiny_patch16_224")
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


def test_a_module_with_two_names_is_swapped_under_both():
    model = official_like()
    model.blocks[1].attn = model.blocks[0].attn
    accelerate(model)
    assert model.blocks[0].attn is model.blocks[1].attn


def test_models_without_supported_attention_are_refused():
    refused(
        "accelerate: ResNet has no attention of a supported kind; nothing was swapped",
        ValueError,
        accelerate,
        torchvision.models.resnet18(),
    )
    layer = nn.TransformerEncoderLayer(16, 2, batch_first=True)
    with pytest.raises(
        ValueError, match=r"self_attn \(torch\.nn.*MultiheadAttention\) is called in an unsupported way"
    ):
        accelerate(layer)
    assert accelerate(ViT(16, 8, embed_dim=16, depth=1, num_heads=2)) == []


def test_attention_equals_timms():
    options = {"qkv_bias": True, "qk_norm": True, "norm_layer": nn.LayerNorm}
    attention, reference = Attention(24, 3, **options), timm.layers.attention.Attention(24, 3, **options)
    reference.load_state_dict(attention.state_dict(), strict=True)
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(attention(x), reference(x))
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
    mask = torch.rand(2, 1, 7, 7) > 0.3
    for call in ({"attn_mask": mask}, {"attn_mask": mask.float()}, {"is_causal": True}):
        torch.testing.assert_close(attention(x, **call), reference(x, **call))
    refused(
        "Attention: attn_bias is not supported: give images of one size at a time, or use accelerate(model, leave=[…])",
        ValueError,
        attention,
        x,
        attn_bias=mask,
    )


def test_timms_siglip_keeps_its_pooling():
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
    model = timm.models.VisionTransformer(**size, class_token=False, global_pool="map").eval()
    images = torch.randn(2, 3, 16, 16)
    expected = model(images)
    assert accelerate(model) == ["blocks.0.attn", "blocks.1.attn"]
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


def test_open_clips_towers_with_their_causal_mask():
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 4, "image_size": 8}
    text = {"context_length": 12, "vocab_size": 60, "width": 32, "heads": 4, "layers": 2}
    model = open_clip.model.CLIP(16, vision, text).eval()
    images, tokens = torch.randn(2, 3, 8, 8), torch.randint(60, (2, 12))
    expected = model.encode_image(images), model.encode_text(tokens)
    names = accelerate(model)
    assert names == [f"{side}transformer.resblocks.{i}.attn" for side in ("visual.", "") for i in range(2)]
    for one, two in zip((model.encode_image(images), model.encode_text(tokens)), expected):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_causal_masks_of_multihead_attention_are_recognised():
    causal = torch.zeros(5, 5).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf"))
    assert all(is_causal(mask) for mask in (causal, causal.bfloat16(), causal < 0, torch.zeros(1, 1)))
    finite = causal.clamp(min=-1e4)
    others = (causal.T, ~(causal < 0), finite, causal[:4], causal[None], torch.ones(1, 1), causal.requires_grad_())
    assert not any(is_causal(mask) for mask in others)


@pytest.mark.parametrize("kind", ["float", "bool", "by head"])
def test_masks_of_multihead_attention(kind):
    module = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)
    if kind != "bool":
        mask = torch.zeros(9, 9).masked_fill(mask, float("-inf"))
    if kind == "by head":
        mask = mask.expand(8, 9, 9) + torch.randn(8, 1, 9)
    x = torch.randn(2, 9, 32)
    expected, _ = module(x, x, x, need_weights=False, attn_mask=mask)
    ours, _ = TorchvisionAttention(module)(x, x, x, attn_mask=mask)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
