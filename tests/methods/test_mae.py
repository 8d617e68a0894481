import contextlib

import pytest
import timm
import torch

from fastssl.contract import Batch
from fastssl.methods import mae
from fastssl.methods.mae import MAE
from fastssl.nn.vit import ViT
from fastssl.ops import dispatch
from tests.support.close import assert_as_exact_on_average, assert_exact
from tests.support.contract import refused
from tests.support.golden import part, read

GOLDEN = ["mae_raw_pixels", "mae_norm_pixels"]


def golden_model(name, dtype=torch.float64):
    golden, meta = read(name)
    meta.pop("norm_eps")
    model = MAE(**meta)
    model.load_state_dict(part(golden, "state."), strict=True)
    return model.to(dtype), {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in golden.items()
    }


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_forward_and_gradients(name):
    model, golden = golden_model(name)
    images, noise = golden["images"], golden["noise"].float()
    masking = model.masking(images, noise)
    assert torch.equal(masking.ids_restore, golden["ids_restore"])
    assert torch.equal(masking.mask.double(), golden["mask"])
    torch.testing.assert_close(model.encode_kept(images, masking), golden["latent"], rtol=1e-9, atol=1e-9)
    pred, mask = model.reconstruct(images, noise)
    torch.testing.assert_close(pred, golden["pred"], rtol=1e-9, atol=1e-9)
    assert torch.equal(mask, masking.mask)
    loss = model.loss(images, noise)
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["loss"][0], rtol=1e-9, atol=1e-9)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    expected = part(golden, "grad.")
    assert set(gradients) == set(expected)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", GOLDEN)
def test_float32_errors_do_not_exceed_those_of_plain_torch(name):
    exact_golden, results = golden_model(name)[1], []
    for context in (contextlib.nullcontext, dispatch.reference):
        model, golden = golden_model(name, torch.float32)
        with context():
            pred, _ = model.reconstruct(golden["images"], golden["noise"])
            loss = model.loss(golden["images"], golden["noise"])
            loss.backward()
        results.append((loss.detach(), pred.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (loss, pred, gradients), (plain_loss, plain_pred, plain_gradients) = results
    assert_exact(loss, exact_golden["loss"][0], plain_loss)
    assert_as_exact_on_average(pred, exact_golden["pred"], plain_pred)
    scaled = []  # gradients divided by their root mean square, so that all have equal weight
    for computed in (gradients, plain_gradients, None):
        parts = [
            (t if computed is None else computed[key]) / t.square().mean().sqrt()
            for key, t in part(exact_golden, "grad.").items()
        ]
        scaled.append(torch.cat([x.flatten() for x in parts]))
    ours, plain, exact = scaled
    assert_as_exact_on_average(ours.float(), exact, plain.float())


@pytest.mark.parametrize("name", GOLDEN)
def test_state_dict_has_the_official_names_and_shapes(name):
    golden, meta = read(name)
    meta.pop("norm_eps")
    state = MAE(**meta).state_dict()
    official = part(golden, "state.")
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in official.items()}


@pytest.mark.parametrize(("cls_dim", "table"), [(64, "pos_embed_mae")])
def test_positions(cls_dim, table):
    golden, meta = read(table)
    ours = MAE(
        28, 4, embed_dim=cls_dim, depth=1, num_heads=4, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2
    )
    assert meta["grid"] == ours.grid[0]
    torch.testing.assert_close(ours.pos_embed[0].double(), golden["pos_embed"], rtol=1e-6, atol=1e-7)
    v3 = read("pos_embed_moco_v3")[0]["pos_embed"][0]
    swapped = torch.cat([v3[:, cls_dim // 2 :], v3[:, : cls_dim // 2]], dim=1)
    torch.testing.assert_close(ours.pos_embed[0].data, swapped, rtol=1e-5, atol=1e-5)


def test_rectangular_images_and_any_channels():
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    sizes |= {f"decoder_{name}": value for name, value in sizes.items()}
    model = MAE((16, 40), 8, in_chans=2, **sizes, mask_ratio=0.5)
    images = torch.randn(3, 2, 16, 40)
    pred, mask = model.reconstruct(images)
    assert pred.shape == (3, 10, 128)
    assert mask.sum(1).tolist() == [5, 5, 5]
    assert model.features(images).shape == model.features(images, "avg").shape == (3, 16)
    model.loss(images).backward()


def test_initial_weights_follow_the_paper():
    torch.manual_seed(0)
    model = mae.build(mae.Config(backbone="vit_tiny"))
    weight = model.patch_embed.proj.weight
    weight = weight.detach()
    assert weight.abs().max() <= (6 / (192 + 768)) ** 0.5 + 1e-6
    assert weight.std() == pytest.approx((2 / (192 + 768)) ** 0.5, rel=0.02)
    assert model.mask_token.detach().std() == pytest.approx(0.02, rel=0.15)
    assert model.blocks[0].attn.qkv.bias.abs().max() == 0
    assert not model.pos_embed.requires_grad
    assert not model.decoder_pos_embed.requires_grad


def test_presets_have_the_published_parameter_counts():
    """111.9, 329.5 and 657.1 million parameters, including the decoder."""
    with torch.device("meta"):
        for backbone, millions in (("vit_base", 111.9), ("vit_large", 329.5), ("vit_huge", 657.1)):
            model = mae.build(mae.Config(backbone=backbone))
            assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_timm_loads_the_encoder_and_has_the_same_features():
    ours = ViT(32, 8, embed_dim=48, depth=2, num_heads=4)
    timm_vit = timm.models.VisionTransformer(
        32, 8, embed_dim=48, depth=2, num_heads=4, num_classes=0, global_pool="token"
    )
    timm_vit.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), timm_vit(images), rtol=1e-4, atol=1e-5)


def test_only_kept_patches_are_embedded_and_only_masked_ones_predicted():
    model, tokens = mae.build(mae.Config.small()), {}
    for name in ("patch_embed", "decoder_pred"):
        getattr(model, name).register_forward_hook(
            lambda _, args, out, name=name: tokens.update({name: args[0].shape[1]})
        )
    model.loss(torch.randn(2, 3, 32, 32))
    assert tokens == {"patch_embed": model.keep, "decoder_pred": model.length - model.keep}


def test_loss_compiles_to_one_graph():
    model = mae.build(mae.Config.small())
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, model.length)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, noise), model.loss(images, noise))


def test_kernels_and_plain_torch_agree_on_a_step():
    model, batch = mae.build(mae.Config.small()), Batch((torch.randn(2, 3, 32, 32),), None, None)
    losses = []
    for context in (dispatch.reference, torch.enable_grad):
        torch.manual_seed(3)
        with context():
            losses.append(model(batch)[0])
    torch.testing.assert_close(*losses)


def test_error_sentences():
    refused("MAE: img_size must be divisible by patch_size=16, got 100×224", ValueError, MAE, (100, 224))
    refused(
        "MAE: mask_ratio must keep at least one and mask at least one of 196 patches, got 0.999, which keeps 0",
        ValueError,
        MAE,
        mask_ratio=0.999,
    )
    refused(
        "MAE: mask_ratio must keep at least one and mask at least one of 196 patches, got 0, which keeps 196",
        ValueError,
        MAE,
        mask_ratio=0,
    )
    refused(
        "mae: unknown backbone 'vit_b', there are vit_mini, vit_tiny, vit_small, vit_base, vit_large, vit_huge",
        ValueError,
        mae.build,
        mae.Config(backbone="vit_b"),
    )
