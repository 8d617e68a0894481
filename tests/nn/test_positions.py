import pytest
import timm
import torch
import torch.nn.functional as F

from fastssl.methods.mae import MAE
from fastssl.nn.positions import fit_positions, sincos_positions
from fastssl.nn.vit import ViT
from tests.support.contract import refused

SIZES = {"embed_dim": 16, "depth": 1, "num_heads": 2}
DECODER = {f"decoder_{name}": value for name, value in SIZES.items()}


def test_a_table_of_the_same_grid_is_returned():
    table = sincos_positions(16, (3, 4))
    assert fit_positions(table, (3, 4)) is table


@pytest.mark.parametrize("row_first", [False, True])
def test_the_grid_of_a_fixed_table_is_detected_and_it_is_interpolated(row_first):
    """2×6, 3×4 and 4×3 have the same number of patches."""
    for grid in ((2, 6), (3, 4), (4, 3)):
        table = sincos_positions(16, grid, row_first=row_first)
        fitted = fit_positions(table, (6, 8))
        image = table[0, 1:].T.reshape(1, 16, *grid)
        expected = F.interpolate(image, (6, 8), mode="bicubic", align_corners=False)
        assert torch.equal(fitted[0, 1:], expected[0].flatten(1).T)
        assert torch.equal(fitted[:, 0], table[:, 0])


def test_any_other_table_is_taken_for_a_square_as_timm_does():
    table = torch.randn(1, 1 + 49, 12)
    expected = timm.layers.resample_abs_pos_embed(table, [5, 9], [7, 7], antialias=False)
    torch.testing.assert_close(fit_positions(table, (5, 9)), expected)
    learned = torch.randn(1, 1 + 12, 12)
    assert fit_positions(learned, (3, 4)) is learned
    refused(
        "positions: a table of 12 patches that is neither fixed nor of a square can't be fitted to another grid: "
        "interpolate it yourself, or build the model for the image size it was trained with",
        ValueError,
        fit_positions,
        torch.randn(1, 13, 8),
        (3, 5),
    )


def test_a_checkpoint_of_another_grid_loads():
    square, wide = (MAE(size, 8, **SIZES, **DECODER) for size in (32, (16, 64)))
    before = {name: x.clone() for name, x in wide.state_dict().items()}
    wide.load_state_dict(square.state_dict(), strict=True)
    for name in ("pos_embed", "decoder_pos_embed"):
        assert torch.equal(wide.state_dict()[name], fit_positions(square.state_dict()[name], (2, 8)))
        assert not torch.equal(wide.state_dict()[name], before[name])
    assert torch.equal(wide.cls_token, square.cls_token)
    wide.loss(torch.randn(2, 3, 16, 64)).backward()


def test_a_table_of_another_width_is_refused_by_torch():
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        ViT(32, 8, **SIZES).load_state_dict(ViT(32, 8, **{**SIZES, "embed_dim": 32}).state_dict())


def test_images_of_another_size_get_a_sentence():
    remedy = "build MAE(img_size=(H, W)) for another size, it loads this state dict with fitted positions"
    model = MAE(32, 8, **SIZES, **DECODER)
    for call in (model.loss, model.reconstruct, model.features):
        refused(
            f"MAE: images must have shape [B, C=3, H=32, W=32], got [2, 3, 32, 40] ({remedy})",
            ValueError,
            call,
            torch.randn(2, 3, 32, 40),
        )
    refused("MAE: images must have shape [B, C, H, W], got [3, 32, 32]", ValueError, model.loss, torch.randn(3, 32, 32))
    refused(
        "MAE: noise must have shape [B=2, L=16], got [2, 15]",
        ValueError,
        model.loss,
        torch.randn(2, 3, 32, 32),
        torch.rand(2, 15),
    )
