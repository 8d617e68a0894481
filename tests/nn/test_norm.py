import contextlib

import pytest
import torch
from torch import nn

from fastssl.methods.mae import MAE
from fastssl.nn.norm import ResidualNorm


def test_norm_is_torchs_layer_norm_of_the_sum():
    norm, layer_norm = ResidualNorm(24), nn.LayerNorm(24, eps=1e-6)
    for parameter in layer_norm.parameters():
        nn.init.normal_(parameter)
    norm.load_state_dict(layer_norm.state_dict(), strict=True)
    x, delta = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    total, normed = norm(x, delta)
    assert torch.equal(total, x + delta)
    torch.testing.assert_close(normed, layer_norm(x + delta))
    assert norm(x)[0] is x
    torch.testing.assert_close(norm(x)[1], layer_norm(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_residual_stream_stays_float32_and_normalised_rows_have_autocasts_dtype(autocast):
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    model = MAE(16, 4, **sizes, **{f"decoder_{name}": value for name, value in sizes.items()}, mask_ratio=0.5)
    norms = [module for module in model.modules() if isinstance(module, ResidualNorm)]
    dtypes = []
    for module in norms:
        module.register_forward_hook(lambda _, args, out: dtypes.append((args[0].dtype, *(t.dtype for t in out))))
    narrow = torch.bfloat16 if autocast else torch.float32
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        loss = model.loss(torch.randn(2, 3, 16, 16))
    assert len(norms) == 10 and dtypes == [(torch.float32, torch.float32, narrow)] * 10
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert model.features(torch.randn(2, 3, 16, 16)).dtype == torch.float32
