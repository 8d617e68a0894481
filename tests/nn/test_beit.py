"""BEiT's ViT against the official code's golden numbers and timm's `Beit`."""

import pytest
import timm
import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple
from timm.models.beit import gen_relative_position_index

from fastssl.nn.beit import INDEX, TABLE, Beit, RelativePositionBias, fit_bias_table, relative_position_index
from fastssl.nn.vit import ViT
from tests.support.contract import refused
from tests.support.golden import part, read

GOLDEN = ["beit_shared_bias", "beit_block_bias", "beit_abs_pos"]
KINDS = {"shared": "use_shared_rel_pos_bias", "block": "use_rel_pos_bias"}


def beit_of(meta, **options):
    """A `Beit` with the sizes of golden numbers."""
    kind = next((kind for kind, name in KINDS.items() if meta[name]), "none")
    sizes = (meta[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"))
    img_size, patch_size, embed_dim, *rest = sizes
    options = {"relative_bias": kind, "abs_pos": meta["use_abs_pos_emb"], "init_values": meta["init_values"], **options}
    return Beit(tuple(img_size), patch_size, 3, embed_dim, *rest, global_pool="token", **options)


def timm_beit(grid=(4, 6), kind="shared", *, depth=2, **options):
    flags = {name: kind == own for own, name in KINDS.items()} | {"use_abs_pos_emb": kind == "none"}
    sizes = {"embed_dim": 16, "depth": depth, "num_heads": 2, "init_values": 0.1, "num_classes": 0}
    return timm.models.Beit((4 * grid[0], 4 * grid[1]), 4, **flags, **sizes, **options)


def randomised(model):
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_features(name):
    golden, meta = read(name)
    state = {n: x for n, x in part(golden, "state.").items() if not n.startswith("lm_head.")}
    model = beit_of(meta, mask_token=True)
    model.load_state_dict(state, strict=True)
    assert {n: x.shape for n, x in model.state_dict().items()} == {n: x.shape for n, x in state.items()}
    for index in (x for n, x in state.items() if n.endswith(INDEX)):
        assert torch.equal(index, relative_position_index((4, 6)))
    model, images = model.double(), golden["input.images"].double()
    for mask, key in ((golden["input.mask"].flatten(1), "features"), (None, "features_unmasked")):
        torch.testing.assert_close(model.forward_features(images, mask), golden[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["shared", "block", "none"])
def test_timm_takes_our_weights_and_has_the_same_features(kind):
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "relative_bias": kind, "abs_pos": kind == "none"}
    images = torch.randn(3, 3, 16, 24, dtype=torch.float64)
    ours = randomised(Beit((16, 24), 4, **sizes, global_pool="token", mask_token=True))
    theirs = timm_beit(kind=kind, global_pool="token").double().eval()
    theirs.load_state_dict(ours.timm_state(), strict=True)
    torch.testing.assert_close(theirs.forward_features(images), ours.forward_features(images), rtol=0, atol=1e-12)
    torch.testing.assert_close(theirs(images), ours.features(images), rtol=0, atol=1e-12)
    pooled = Beit((16, 24), 4, **sizes, num_classes=5).double().eval()  # as fine-tuned: mean of the patches, fc_norm
    theirs = randomised(timm_beit(kind=kind))
    theirs.reset_classifier(5)
    pooled.load_state_dict(theirs.double().state_dict(), strict=True)
    torch.testing.assert_close(pooled(images), theirs(images), rtol=0, atol=1e-12)


def test_the_index_is_timms():
    for grid in ((1, 1), (2, 2), (4, 6), (14, 14)):
        assert torch.equal(relative_position_index(grid), gen_relative_position_index(grid))
    assert len(RelativePositionBias((14, 14), 12).relative_position_bias_table) == 732


def test_a_table_of_another_grid_is_interpolated_as_by_timm():
    small, large = Beit(16, 4, 3, 16, 1, 2), Beit((24, 32), 4, 3, 16, 1, 2)
    torch.nn.init.normal_(small.rel_pos_bias.relative_position_bias_table)
    large.load_state_dict(small.state_dict(), strict=True)
    table = small.state_dict()[f"rel_pos_bias.{TABLE}"]
    expected = resize_rel_pos_bias_table_simple(table, (6, 8), (11 * 15 + 3, 2))
    torch.testing.assert_close(large.rel_pos_bias.relative_position_bias_table.data, expected)
    assert torch.equal(large.rel_pos_bias.relative_position_index, relative_position_index((6, 8)))
    assert fit_bias_table(table[1:], (6, 8)) is not None and len(fit_bias_table(table[1:], (6, 8))) == len(table) - 1


def test_initial_weights_are_those_of_the_official_code():
    """Normal numbers of deviation 0.02, cut at one: 0.0108 remains. The last layers of branches shrink with depth."""
    torch.manual_seed(0)
    model = Beit(32, 8, embed_dim=384, depth=3, num_heads=6, mask_token=True, abs_pos=True)
    for i, block in enumerate(model.blocks, 1):
        for layer, scale in (
            (block.attn.qkv, 1),
            (block.mlp.fc1, 1),
            (block.attn.proj, (2 * i) ** 0.5),
            (block.mlp.fc2, (2 * i) ** 0.5),
        ):
            weight = layer.weight.detach() * scale
            assert weight.abs().max() <= 0.02 * (1 + 1e-6)
            assert weight.std() == pytest.approx(0.0108, rel=0.01)
        assert (block.gamma_1 == 0.1).all() and (block.gamma_2 == 0.1).all()
    for x in (model.patch_embed.proj.weight, model.cls_token, model.mask_token, model.pos_embed):
        assert x.detach().abs().max() <= 0.02 and x.detach().std() == pytest.approx(0.0108, rel=0.15)
    zeros = [n for n, p in model.named_parameters() if n.endswith(("bias", TABLE)) and p.detach().any()]
    assert not zeros
    assert Beit(32, 8, embed_dim=16, depth=1, num_heads=2, init_values=0).blocks[0].gamma_1 is None


def test_drop_path_skips_branches_of_samples_in_training_alone():
    model = randomised(Beit(8, 4, 3, 16, 2, 2, drop_path_rate=0.5))
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64).expand(64, -1, -1, -1)
    assert len(model(images).unique(dim=0).round(decimals=9).unique(dim=0)) == 1
    kinds = model.train()(images).detach().round(decimals=9).unique(dim=0)
    assert 1 < len(kinds) <= 4  # the first block is never skipped; two branches of the second are


def test_positions_other_than_relative_ones_are_optional():
    assert Beit(8, 4, 3, 16, 1, 2).pos_embed is None
    names = {n for n, _ in Beit(8, 4, 3, 16, 1, 2, relative_bias="none", abs_pos=True).named_parameters()}
    assert "pos_embed" in names and not any(n.endswith(TABLE) for n in names)
    assert isinstance(Beit(8, 4, 3, 16, 1, 2), ViT)
    refused(
        "Beit: relative_bias must be 'shared', 'block' or 'none', got 'both'",
        ValueError,
        lambda: Beit(8, 4, 3, 16, 1, 2, relative_bias="both"),
    )
