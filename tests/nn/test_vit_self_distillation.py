"""What DINO, iBOT and DINOv2 need of a ViT: positions with an offset, the mask token, registers without a position, and
stochastic depth by subsets."""

import pytest
import torch
from torch import nn

from fastssl.nn import ViT
from fastssl.nn.block import Block, _add_subset_branch, drop_path_subsets
from fastssl.nn.positions import interpolate_positions
from fastssl.nn.vit import dino_vit
from fastssl.train.recompute import recompute_blocks
from tests.support.contract import refused
from tests.support.golden import read

TINY = {"img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "pos_embed": "learn"}


@pytest.mark.parametrize(
    "name, options, atol", [("offset0.1", {"antialias": False, "offset": 0.1}, 1e-10), ("antialias", {}, 2e-8)]
)
def test_golden_positions(name, options, atol):
    """The recorded numbers with antialias have weights of float32's precision: torch's are exact today, and the 3×3
    table of exact weights differs from the recorded one by 4.6e-9. timm's equal ours to 1e-10 (test_vit.py)."""
    golden, _ = read("dinov2_misc")
    table = golden["pos.state.pos_embed"].double()
    for size in ((12, 12), (12, 28), (40, 40)):
        grid = tuple(n // 4 for n in size)
        expected = golden[f"pos.{name}.{size[0]}x{size[1]}"]
        result = interpolate_positions(table, (5, 5), grid, 1, **options)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=atol)


def test_a_vit_interpolates_as_it_is_told():
    vit = ViT(**TINY, dynamic_img_size=True, pos_offset=0.1, pos_antialias=False)
    expected = interpolate_positions(vit.pos_embed, (3, 3), (2, 2), 1, antialias=False, offset=0.1)
    assert torch.equal(vit.positions((2, 2)), expected[:, 1:])


def test_golden_stochastic_depth_by_subset():
    golden, _ = read("dinov2_misc")
    x = golden["drop.input"].double()
    result = _add_subset_branch(x, lambda t: t * t + 1, None, golden["drop.kept"])
    torch.testing.assert_close(result, golden["drop.output"], rtol=1e-9, atol=1e-10)


def test_subsets_are_random_and_of_one_size():
    x = torch.zeros(10, 3, 4)
    subsets = drop_path_subsets(0.3, 50, x)
    assert subsets.shape == (50, 2, 7)
    assert all(len(set(ids.tolist())) == 7 for ids in subsets.flatten(0, 1))
    counts = subsets.flatten().bincount(minlength=10)  # 70 of 100 in expectation
    assert (counts > 45).all() and (counts < 95).all()
    assert drop_path_subsets(0.99, 1, x).shape == (1, 2, 1)


def test_a_block_on_subsets_equals_one_with_factors():
    """Samples outside of the subset keep their values, the others get B / K times the branch; gradients too."""
    block = Block(16, 2, init_values=0.5).double()
    x = torch.randn(5, 3, 16, dtype=torch.float64)
    kept = torch.tensor([[0, 3, 4], [2, 3, 1]])
    factors = torch.zeros(2, 5, 1, 1, dtype=torch.float64)
    for row, ids in zip(factors, kept):
        row[ids] = 5 / 3
    results = []
    for argument in ({"kept": kept}, {"drop_path": factors}):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        out, delta = block(leaf, None, **argument)
        out = out if delta is None else out + delta
        out.square().sum().backward()
        results.append([out.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters())])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_subsets_are_drawn_in_training_alone_and_once_under_recomputation():
    vit = ViT(**TINY, drop_path_rate=0.5, drop_path_subset=True)
    nn.init.normal_(vit.blocks[0].mlp.fc2.weight)
    images, copy = torch.randn(4, 3, 12, 12), ViT(**TINY)
    copy.load_state_dict(vit.state_dict())
    assert torch.equal(vit.eval()(images), copy.eval()(images))
    vit.train()
    gradients = []
    for recompute in (False, True):
        if recompute:
            recompute_blocks(nn.Sequential(vit))
        vit.zero_grad()
        torch.manual_seed(0)
        vit(images).square().sum().backward()
        gradients.append(vit.patch_embed.proj.weight.grad.clone())
    assert torch.equal(*gradients)


def test_masked_patches_are_replaced_before_positions_are_added():
    vit, images = ViT(**TINY, mask_token=True).double(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    nn.init.normal_(vit.mask_token)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 4] = mask[1, :2] = True
    tokens = vit.embed(images)
    tokens[0, 4], tokens[1, 0], tokens[1, 1] = vit.mask_token[0], vit.mask_token[0], vit.mask_token[0]
    expected = vit.encode(tokens + vit.positions((3, 3)), torch.float64)
    assert torch.equal(vit.forward_features(images, mask), expected)
    refused("ViT: mask must have shape [B=2, L=9], got [2, 8]", ValueError, vit.forward_features, images, mask[:, 1:])
    sentence = "ViT: mask must be None without mask_token=True, got a tensor"
    refused(sentence, ValueError, ViT(**TINY).double().forward_features, images, mask)


def test_registers_without_a_position_equal_timms_layout():
    """In timm's layout the class token's position is part of the class token."""
    vit = ViT(**TINY, reg_tokens=3, no_embed_reg=True).double()
    assert vit.pos_embed.shape == (1, 1 + 9, 16)
    timms = ViT(**TINY, reg_tokens=3, no_embed_class=True).double()
    state = vit.state_dict()
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    timms.load_state_dict(state)
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(vit.forward_features(images), timms.forward_features(images))


def test_initial_weights_and_sizes_of_dino_and_dinov2():
    vit = dino_vit("vit_mini", 32)
    assert vit.grid == (8, 8) and vit.pos_embed.requires_grad
    assert (vit.pos_offset, vit.pos_antialias, vit.dynamic_img_size) == (0.1, False, True)
    weights = [block.attn.qkv.weight for block in vit.blocks]
    assert torch.stack(weights).std().item() == pytest.approx(0.02, rel=0.02)
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    bound = (3 * 4 * 4) ** -0.5  # torch's default of a convolution
    assert bound * 0.95 < vit.patch_embed.proj.weight.abs().max() <= bound
    small = dino_vit("vit_mini", 32, 8, token_std=1e-6, reg_tokens=2, no_embed_reg=True)
    assert small.patch_size == 8 and small.cls_token.abs().max() < 1e-5 and small.pos_embed.shape[1] == 17
    with torch.device("meta"):
        giant = dino_vit("vit_giant", 28)
    assert giant.blocks[0].mlp.fc1.out_features == 2 * 4096  # as in the table of the golden file
    sentence = (
        "dino_vit: name must be one of vit_mini, vit_tiny, vit_small, vit_base, vit_large, vit_giant, got 'vit_huge'"
    )
    refused(sentence, ValueError, dino_vit, "vit_huge")
