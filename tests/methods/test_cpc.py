import pytest
import torch
import torchvision
from torch import nn

from fastssl.contract import Batch, Method
from fastssl.methods import cpc
from fastssl.nn.predictive import Patches
from tests.support.contract import refused


def tiny(**changes):
    config = cpc.Config.small()
    for name, value in {"hidden": 16, "stride": 4, "offsets": (2, 3), **changes}.items():
        setattr(config, name, value)
    return cpc.build(config)


def batch(size=4, seed=3):
    return Batch((torch.randn(size, 3, 32, 32),), None, None, torch.arange(size) + seed)


def test_it_fulfils_the_contract_and_its_features_are_means_over_patches():
    model, images = tiny(), torch.randn(4, 3, 32, 40)
    assert isinstance(model, Method)
    assert model.latents(images).shape == (4, 256, 5, 7)
    torch.testing.assert_close(model.features(images), model.latents(images).mean((2, 3)))
    patches = [images[..., y : y + 16, x : x + 16] for y in range(0, 17, 4) for x in range(0, 25, 4)]
    expected = torch.stack([model.backbone(patch) for patch in patches]).mean(0)
    torch.testing.assert_close(model.features(images), expected, rtol=1e-4, atol=1e-5)


def test_the_encoder_has_torchvisions_names():
    model = cpc.build(cpc.Config("resnet18"))
    reference = torchvision.models.resnet18(norm_layer=lambda channels: nn.GroupNorm(1, channels))
    reference.fc = nn.Identity()
    reference.load_state_dict(model.encoder.state_dict(), strict=True)
    patch = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(reference(patch), model.features(patch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("candidates", ["all", "drawn"])
def test_every_part_is_trained_and_every_direction_predicts(candidates):
    model = tiny(candidates=candidates, directions=4)
    loss, metrics = model(batch())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert 0 <= metrics["top1"] <= 1
    rank, negatives = model.ranks(batch())
    assert len(rank) == 4 * 4 * (3 + 2) * 5  # directions, images, rows below the offsets 2 and 3, columns
    assert negatives == {"all": 4 * 25 - 1, "drawn": 16}[candidates]
    assert int(rank.max()) <= negatives


def test_drawn_numbers_depend_on_the_images_seeds_alone():
    model, one = tiny(candidates="drawn"), batch()
    assert torch.equal(model(one)[0], model(one)[0])
    assert not torch.equal(model(one)[0], model(one._replace(seed=one.seed + 1))[0])
    assert model(one._replace(seed=None))[0].isfinite()


def test_directions_turn_the_grid():
    """With one context network and loss for all, a turned image has the losses in turned order."""
    model = tiny(directions=4, patch_flip_p=0.0, patch_drop_p=0.0, patch_margin=0)
    latents = torch.randn(3, 256, 5, 5)
    model.latents = lambda images, seeds=None: latents
    for part in (model.contexts, model.losses):
        for other in part[1:]:
            other.load_state_dict(part[0].state_dict())
    losses = [[loss for loss, _ in direction] for direction in model.contrast(batch(3))]
    latents = latents.rot90(1, (2, 3))
    turned = [[loss for loss, _ in direction] for direction in model.contrast(batch(3))]
    for first, second in ((2, 0), (1, 2), (3, 1), (0, 3)):  # down, up, and the two sides
        for x, y in zip(losses[first], turned[second]):
            torch.testing.assert_close(x.mean(), y.mean(), rtol=1e-4, atol=1e-4)


def test_patches_are_cut_and_augmented_one_by_one():
    images, seeds = torch.rand(2, 3, 20, 24) + 0.5, torch.tensor([1, 2])
    grid = Patches(8, 4)(images)
    assert grid.shape == (2, 4, 5, 3, 8, 8)
    assert torch.equal(grid[1, 2, 3], images[1, :, 8:16, 12:20])
    assert torch.equal(Patches(8, 4)(images, seeds), grid)
    flipped = Patches(8, 4, flip_p=1.0)(images, seeds)
    assert torch.equal(flipped, grid.flip(-1))
    dropped = (Patches(8, 4, drop_p=1.0)(images, seeds) != 0).flatten(4).any(4)
    assert (dropped.sum(3) == 1).all() and dropped.flatten(0, 2).any(0).all()
    shifted = Patches(8, 4, margin=2)(images, seeds)
    inner, found = shifted[..., 2:6, 2:6], set()
    assert (shifted.sum((3, 4, 5)) - inner.sum((3, 4, 5))).abs().max() < 1e-4
    for i in range(2):
        for y in range(4):
            for x in range(5):
                places = [(a, b) for a in range(5) for b in range(5)]
                found |= {p for p in places if torch.equal(inner[i, y, x], grid[i, y, x, :, p[0] :, p[1] :][:, :4, :4])}
    assert len(found) > 10


def test_what_cannot_be_predicted_is_refused():
    def refuse(sentence, **changes):
        refused(sentence, ValueError, tiny, **changes)

    refuse(
        "cpc: offsets must be less than the 5 rows of patches of an image, got 5: the grid is 5 × 5 patches of 16 "
        "pixels at stride 4",
        offsets=(1, 5),
    )
    refuse("cpc: patch_margin must be below half of patch=16, got 8", patch_margin=8)
    model = tiny()
    sentence = "Patches: images must have at least 16 pixels on each side, got 32 × 15"
    refused(sentence, ValueError, model.features, torch.randn(1, 3, 32, 15))


def test_defaults_are_those_of_the_papers():
    config = cpc.Config.paper()
    t = config.training
    assert (t.optimizer, t.lr, t.betas, t.weight_decay) == ("adamw", 2e-4, (0.8, 0.999), 0.0)  # 4e-4 at 512
    assert (t.epochs, t.batch_size) == (200, 512)
    assert (config.image_size, config.patch, config.stride) == ((256, 256), 64, 32)
    assert (config.target_dim, config.scale, config.hidden, config.blocks) == (64, 0.1, 256, 5)
    assert (config.negatives, config.candidates, config.directions) == (16, "all", 4)
    with torch.device("meta"):
        model = cpc.build(config)
    assert model.latents(torch.empty(2, 3, 256, 256, device="meta")).shape == (2, 2048, 7, 7)
