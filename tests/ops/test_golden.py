"""The ops compared with numbers of the reference implementations."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import batch_info_nce, info_nce, patchify, random_masking, unpatchify
from tests.support.golden import read


def test_random_masking():
    golden, _ = read("random_masking")
    masking = random_masking(golden["noise"], golden["ids_keep"].shape[1])
    assert torch.equal(masking.ids_keep, golden["ids_keep"])
    assert torch.equal(torch.cat([masking.ids_keep, masking.ids_masked], 1), golden["ids_shuffle"])
    assert torch.equal(masking.ids_restore, golden["ids_restore"])
    assert torch.equal(masking.mask, golden["mask"])


@pytest.mark.parametrize("name", ["mae_raw_pixels", "mae_norm_pixels"])
def test_patchify(name):
    golden, meta = read(name)
    assert torch.equal(patchify(golden["images"], meta["patch_size"]), golden["patches"])
    images = unpatchify(golden["pred"], meta["patch_size"], *golden["images"].shape[2:])
    assert torch.equal(images, golden["unpatchified"])


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2"])
def test_info_nce_from_the_logits_of_moco(name):
    """With unit vectors as queries, the keys can be chosen so that the logits are the golden ones."""
    golden, meta = read(name)
    for step in range(4):
        logits = golden[f"step{step}.logits"] * meta["temperature"]
        q = torch.eye(8, dtype=torch.float64)
        k = logits[:, :1] * q
        loss, rank = info_nce(q, k, logits[:, 1:].T.contiguous(), meta["temperature"])
        torch.testing.assert_close(loss.mean(), golden[f"step{step}.loss"][0], rtol=1e-12, atol=0)
        assert torch.equal(rank, (logits[:, 1:] > logits[:, :1]).sum(1))


def test_batch_info_nce_is_moco_v3s_loss():
    golden, meta = read("moco_v3_loss")
    tau = meta["temperature"]
    q = golden["q"].double().requires_grad_()
    keys = F.normalize(golden["k"].double(), dim=1)
    loss = 2 * tau * batch_info_nce(F.normalize(q, dim=1), keys, tau).loss.mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["loss"][0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q.grad, golden["grad_q"], rtol=1e-9, atol=1e-9)
