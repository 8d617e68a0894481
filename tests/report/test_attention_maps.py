import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastssl.nn import ViT
from fastssl.nn.beit import Beit
from fastssl.nn.resnet import build_resnet
from fastssl.report.attention_maps import attention_of_last_block, feature_maps, heat, principal_colours


@pytest.mark.parametrize("class_token", [True, False])
def test_attention_is_that_of_the_last_block(class_token):
    """From the block's own queries and keys by torch's attention, with the identity as values."""
    vit = ViT(16, 4, embed_dim=32, depth=2, num_heads=2, class_token=class_token, global_pool="avg", qk_norm=True)
    vit.eval()
    images = torch.randn(3, 3, 16, 16)
    maps = attention_of_last_block(vit, images)
    prefix = int(class_token)
    assert maps.shape == (3, 2, 16)
    seen = []
    handle = vit.blocks[-1].norm1.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    with torch.no_grad():
        vit.forward_features(images)
        attn = vit.blocks[-1].attn
        q, k, _ = attn.qkv(seen[0]).unflatten(2, (3, 2, 16)).transpose(1, 3).unbind(2)
    handle.remove()
    length = 16 + prefix
    values = torch.eye(length).expand(3, 2, length, length)
    weights = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), values)
    expected = weights[:, :, 0] if class_token else weights.mean(2)
    torch.testing.assert_close(maps, expected[..., prefix:].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["shared", "block", "none"])
def test_attention_of_beit_has_its_biases(kind):
    """The weights that are shown give the block's output: of queries with a bias, and scores with that of positions."""
    vit = Beit(16, 4, 3, 32, 2, 2, relative_bias=kind, fc_norm=False).eval()
    for x in vit.parameters():
        torch.nn.init.normal_(x, std=0.5)
    images, attn, kept = torch.randn(3, 3, 16, 16), vit.blocks[-1].attn, []
    maps = attention_of_last_block(vit, images)
    handle = attn.register_forward_hook(lambda module, args, output: kept.extend((args, output)))
    with torch.no_grad():
        vit.forward_features(images)
        (tokens, bias), output = kept
        _, _, v = attn.project(tokens).unbind(2)
        mixed = torch.einsum("bhqk,bkhe->bqhe", attn.weights(tokens, bias=bias), v).flatten(2)
        torch.testing.assert_close(attn.proj(mixed), output, rtol=1e-4, atol=1e-4)
    handle.remove()
    torch.testing.assert_close(maps, attn.weights(tokens, bias=bias)[:, :, 0, 1:].detach())


def test_feature_maps():
    images = torch.randn(2, 3, 32, 32)
    vit = ViT(32, 8, embed_dim=16, depth=1, num_heads=2).eval()
    tokens = vit.forward_features(images)[:, 1:]
    torch.testing.assert_close(feature_maps(vit, images).flatten(1, 2), tokens.detach())
    resnet = build_resnet("resnet18", 8, small_images=True).eval()
    maps = feature_maps(resnet, images)
    assert maps.shape == (2, 4, 4, 512)
    resnet.fc = torch.nn.Identity()
    torch.testing.assert_close(maps.mean((1, 2)), resnet(images).detach())
    assert feature_maps(torch.nn.Linear(2, 2), images) is None


def test_colours_separate_parts():
    """Two kinds of places get two colours, whatever the offset of the features."""
    kinds = torch.zeros(2, 4, 4, 8)
    kinds[:, :2] = torch.linspace(1, 2, 8)
    colours, share = principal_colours(100 + kinds + 1e-3 * torch.randn(2, 4, 4, 8))
    assert share > 0.99
    assert (colours[:, :2, :, 0] == 255).mean() > 0.9 and (colours[:, 2:, :, 0] == 0).mean() > 0.9
    assert principal_colours(torch.ones(1, 4, 4, 2))[0].shape == (1, 4, 4, 3)


def test_heat_runs_from_dark_to_bright():
    images = heat(torch.arange(8.0).view(2, 2, 2), (6, 4))
    assert images.shape == (2, 6, 4, 3)
    assert images[:, 0, 0].sum() < 30 and (images[:, -1, -1].sum(-1) > 600).all()
    np.testing.assert_array_equal(images[0, 0, 0], images[0, 2, 1])  # one place is 3 × 2 pixels
