import pytest
import torch

from fastssl.nn import patch_masks
from fastssl.nn.patch_masks import dinov2_masks, ibot_masks, masked_rows, most_masked
from tests.support.golden import read


def test_golden_rows_and_weights_of_a_batch():
    golden, _ = read("dinov2_masks")
    mask = golden["collate.seed1.masks"]
    rows = masked_rows(mask, torch.float64, 0)
    assert torch.equal(rows.rows, golden["collate.seed1.mask_indices_list"]) and rows.counted is None
    torch.testing.assert_close(rows.weights, golden["collate.seed1.masks_weight"].double(), rtol=1e-12, atol=0)
    assert most_masked(196, len(mask), 0.5, (0.1, 0.5)) == golden["collate.seed1.upperbound"]


def test_on_a_device_the_rows_are_filled_up(monkeypatch):
    mask = torch.rand(6, 9) < 0.3
    exact = masked_rows(mask, torch.float32, 0)
    monkeypatch.setattr(patch_masks, "reads_are_free", lambda x: False)
    padded = masked_rows(mask, torch.float32, 40)
    count = len(exact.rows)
    assert padded.rows.shape == (40,) and len(set(padded.rows.tolist())) == 40
    assert torch.equal(padded.counted, torch.arange(40) < count)
    assert torch.equal(padded.rows[:count], exact.rows)
    torch.testing.assert_close(padded.weights, torch.cat([exact.weights, torch.zeros(40 - count)]))


def test_masks_of_dinov2_have_the_statistics_of_its_code():
    """Half of the crops, their numbers of patches evenly spread; for 64 images about 3,726 patches of at most 3,771."""
    _, meta = read("dinov2_masks")
    recorded = meta["statistics"]["batch of 64 images, 128 global crops"]["masked_patches"]
    assert most_masked(196, 128, 0.5, (0.1, 0.5)) == 3771
    totals = []
    for batch in range(8):
        mask = dinov2_masks(torch.arange(64) + 64 * batch, (14, 14), 2, 0.5, (0.1, 0.5))
        counts = mask.sum(1)
        assert mask.shape == (128, 196) and (counts > 0).sum() == 64
        bounds = 196 * (0.1 + 0.4 * torch.arange(65) / 64)
        drawn = counts[counts > 0].sort().values
        assert (drawn <= bounds[1:]).all() and (drawn.float() >= bounds[:-1] - 5).all()
        totals.append(counts.sum().item())
    # one batch's total varies by about 5, so a mean of eight by about 2
    assert sum(totals) / 8 == pytest.approx(recorded["mean"], abs=10)
    assert min(totals) > recorded["min"] - 15 and max(totals) < recorded["max"] + 15


def test_masks_of_ibot_have_the_statistics_of_its_code():
    statistics = read("ibot")[1]["mask_statistics"]
    seeds = torch.arange(1500)
    counts = ibot_masks(seeds, (14, 14), 2, ((0.3, 0.0),), True).sum(1).double()
    recorded = statistics["block, ratio .3 of 196 (58.8)"]
    assert counts.mean() == pytest.approx(recorded["mean"], abs=0.2) and counts.max() == recorded["max"]
    counts = ibot_masks(seeds, (14, 14), 2, ((0.0, 0.0), (0.3, 0.2)), True).sum(1).double()
    recorded = statistics["recipe: ratio 0 or U(.1, .5)"]
    assert counts.mean() == pytest.approx(recorded["mean"], abs=2.5)  # standard deviation of the mean: 0.6
    assert (counts == 0).double().mean() == pytest.approx(recorded["share_zero"], abs=0.04)
    assert counts.max() <= 98
    both = ibot_masks(seeds, (14, 14), 2, ((0.3, 0.2),), False).view(2, 1500, 196)
    assert not torch.equal(both[0], both[1])


def test_single_patches_are_exactly_as_many_as_asked_for():
    counts = ibot_masks(torch.arange(50), (6, 4), 2, ((0.3, 0.0),), False).sum(1)
    assert (counts == int(0.3 * 24)).all()


def test_no_crop_is_masked_at_probability_0():
    assert not dinov2_masks(torch.arange(4), (8, 8), 2, 0.0, (0.1, 0.5)).any()
    assert most_masked(64, 8, 0.0, (0.1, 0.5)) == 0
