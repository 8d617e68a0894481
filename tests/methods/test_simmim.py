"""SimMIM against the formulas of the official code: mask tokens, a convolution, pixel shuffle, L1 on masked pixels."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastssl import distributed
from fastssl.contract import Batch, Reconstructs
from fastssl.methods import simmim
from fastssl.nn.beit import Beit
from fastssl.ops import patchify
from fastssl.weights import export, load_weights
from tests.support.contract import refused
from tests.support.ranks import run_ranks


def small(**changes):
    config = dataclasses.replace(simmim.Config.small(), **{"image_size": (16, 24), "layer_scale": 0.1, **changes})
    method = simmim.build(config)
    for p in method.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return method.double().eval()


def batch_of(count):
    images = torch.randn(count, 3, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Batch((images,), torch.arange(count), None, torch.arange(count))


def formula(method, images, mask):
    """The official code's loss of a mask [B, rows, columns] of patches."""
    tokens = method.vit.forward_features(images, mask.flatten(1))[:, 1:]
    maps = tokens.transpose(1, 2).unflatten(2, mask.shape[1:])
    decoded = F.pixel_shuffle(F.conv2d(maps, method.decoder[0].weight, method.decoder[0].bias), 4)
    pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].double()
    return ((decoded - images).abs() * pixels).sum() / (pixels.sum() + 1e-5) / 3, decoded


def test_the_loss_is_that_of_the_official_code():
    method, batch = small(), batch_of(3)
    mask = method.mask(torch.rand(3, 6))
    assert mask.sum(1).tolist() == [16] * 3  # 4 = ⌈0.6 · 6⌉ squares of 2 × 2 patches
    squares = mask.view(3, 2, 2, 3, 2).transpose(2, 3).flatten(3)
    assert (squares.all(3) | ~squares.any(3)).all()
    (images,), results = batch.views, []
    expected, decoded = formula(method, images, mask.view(3, 4, 6))
    for loss in (method.loss(images, mask), expected):
        gradients = torch.autograd.grad(loss, [p for p in method.parameters()], retain_graph=True)
        results.append((loss.detach(), *gradients))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)
    pred, removed = method.reconstruct(images, torch.rand(3, method.length))
    _, decoded = formula(method, images, removed.bool().view(3, 4, 6))
    torch.testing.assert_close(pred, patchify(decoded, 4), rtol=1e-9, atol=1e-12)
    assert isinstance(method, Reconstructs)


def test_the_recipe_and_its_weight_decay():
    config, method = simmim.Config.paper(), small()
    training = config.training
    assert (training.epochs, training.lr * training.batch_size / 256, training.lr_drops) == (800, 4e-4, (700,))
    assert (config.mask_size, config.mask_ratio, config.crop_min, training.clip_parameter_norm) == (32, 0.6, 0.67, 5.0)
    names = {id(p): name for name, p in method.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in simmim.parameter_groups(method))
    assert {"vit.mask_token", "vit.cls_token", "decoder.0.bias", "vit.blocks.0.gamma_1"} <= kept
    assert {"vit.rel_pos_bias.relative_position_bias_table", "decoder.0.weight"} <= decayed


def test_checkpoints_have_the_official_names(tmp_path):
    source, other = small().float(), small().float()
    path = export(source, "simmim", tmp_path / "simmim")
    state = torch.load(path, weights_only=True)["model"]
    assert state["decoder.0.weight"].shape == (48, 128, 1, 1)
    assert {"encoder.mask_token", "encoder.rel_pos_bias.relative_position_index", "encoder.blocks.0.gamma_1"} <= set(
        state
    )
    load_weights(other, path)
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in source.state_dict().items())
    encoder = Beit((16, 24), 4, 3, 128, 4, 4, fc_norm=False)
    load_weights(encoder, path, encoder_only=True)
    images = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(encoder(images), source.features(images))


def _loss_and_gradients(world):
    rank = distributed.rank()
    torch.manual_seed(0)
    method, batch = small(), batch_of(8)
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    loss, _ = method(Batch((batch.views[0][share],), batch.index[share], None, batch.seed[share]))
    loss.backward()
    gradients = {n: distributed.all_sum(p.grad) / world for n, p in method.named_parameters()}
    return distributed.all_sum(loss.detach()) / world, gradients


@pytest.mark.slow
def test_two_ranks_equal_one_process():
    expected = _loss_and_gradients(1)
    for result in run_ranks(2, _loss_and_gradients, 2):
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-9)  # 1e-5 is added to a count of pixels


def test_refusals():
    config = simmim.Config.small()
    sentence = "simmim: --mask-size must be a multiple of the patch size 4 that divides --image-size 24 24, got "
    for size in (6, 16):
        refused(f"{sentence}{size}", ValueError, simmim.build, dataclasses.replace(config, mask_size=size))
    for ratio in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"^simmim: --mask-ratio must mask at least one of 9 squares and keep one"):
            simmim.build(dataclasses.replace(config, mask_ratio=ratio))
