import pytest
import torch

from fastssl import ops
from fastssl.contract import Batch
from fastssl.data import draws
from fastssl.distributed import rank
from fastssl.methods.mae import MAE
from fastssl.nn import MaskedPatchLoss, random_masking, seeded_noise
from fastssl.nn.masking import splitmix64
from fastssl.ops import masked_patch_mse, patchify
from tests.support.contract import refused
from tests.support.golden import read
from tests.support.ranks import run_ranks


def official_random_masking(x, mask_ratio):
    """MAE's method of this name, by the paper's description: shuffle, take the first, restore."""
    batch, length, dim = x.shape
    keep = int(length * (1 - mask_ratio))
    noise = torch.rand(batch, length, device=x.device)
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    kept = x.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, dim))
    mask = torch.ones(batch, length)
    mask[:, :keep] = 0
    return kept, mask.gather(1, ids_restore), ids_restore


@pytest.mark.parametrize("ratio", [0.75, 0.9, 0.0])
def test_random_masking_is_the_official_one_with_the_same_seed(ratio):
    x = torch.randn(3, 196, 8)
    torch.manual_seed(7)
    expected = official_random_masking(x, ratio)
    torch.manual_seed(7)
    for ours, theirs in zip(random_masking(x, ratio), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_random_masking_takes_noise_and_a_generator():
    x = torch.randn(2, 10, 4, requires_grad=True)
    noise = torch.rand(2, 10, generator=torch.Generator().manual_seed(3))
    by_noise, by_generator = (
        random_masking(x, 0.5, noise),
        random_masking(x, 0.5, generator=torch.Generator().manual_seed(3)),
    )
    assert all(torch.equal(a, b) for a, b in zip(by_noise, by_generator))
    by_noise[0].sum().backward()
    assert x.grad.sum() == 2 * 5 * 4
    refused(
        "random_masking: mask_ratio must keep at least one of 10 patches, got 0.95, which keeps 0",
        ValueError,
        random_masking,
        x,
        0.95,
    )
    refused(
        "random_masking: noise must have shape [B=2, L=10], got [2, 9]",
        ValueError,
        random_masking,
        x,
        0.5,
        noise[:, :9],
    )


SPLITMIX64 = {  # seed: the first numbers of the reference implementation, Vigna's splitmix64.c
    0: (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC),
    1234567: (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431),
}


def reference_splitmix64(seed, count):
    """Its published form, in Python's integers."""
    numbers = []
    for i in range(1, count + 1):
        z = (seed + i * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        numbers.append(z ^ z >> 31)
    return numbers


def test_splitmix64_gives_the_published_numbers():
    """In all its forms: in torch for masks, in NumPy for augmentations, and in this file."""
    numbers = splitmix64(torch.tensor(list(SPLITMIX64)), 4)
    for row, (seed, expected) in zip(numbers.tolist(), SPLITMIX64.items()):
        assert [number % 2**64 for number in row] == list(expected) == reference_splitmix64(seed, 4)
        assert draws.mix(seed).tolist() == [expected[0] % 2**63]  # 63 bits of the first number


def test_seeded_noise_is_splitmix64():
    samples = torch.tensor([0, 1, 2**62, -5])
    noise = seeded_noise(9, 11, 2**40, samples)
    assert noise.dtype == torch.float32
    for row, sample in zip(noise, samples.tolist()):
        seed = 0
        for part in (11, 2**40, sample % 2**64):
            (seed,) = reference_splitmix64(seed + part, 1)
        assert (row.double() * 2**24).tolist() == [number >> 40 for number in reference_splitmix64(seed, 9)]


def test_seeded_noise_needs_numbers_of_samples():
    refused(
        "seeded_noise: the key must hold an int64 tensor [B], one number for each sample",
        ValueError,
        seeded_noise,
        4,
        0,
        1,
    )


def test_seeded_noise_is_uniform_and_its_rows_are_unrelated():
    noise = seeded_noise(196, 0, 5, torch.arange(4000)).double()
    counts = torch.histc(noise, 64, 0, 1)
    expected = noise.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 104  # chi² of 63 degrees of freedom: 1 in 1,000 is above
    kept = (noise.argsort(1).argsort(1) < 49).double().mean(0)  # how often each place stays
    assert (kept - 0.25).abs().max() < 4.5 * (0.25 * 0.75 / 4000) ** 0.5
    rows = noise - 0.5
    neighbours = (rows[1:] * rows[:-1]).mean() * 12
    assert neighbours.abs() < 5 / rows[1:].numel() ** 0.5


def tiny_mae():
    torch.manual_seed(0)
    return MAE(16, 4, embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)


def losses_of_a_rank(batches):
    torch.manual_seed(rank())  # ranks draw different numbers from torch's generator, and none of them matters
    model, (images, index) = tiny_mae(), batches[rank()]
    torch.manual_seed(100 + rank())
    return model(Batch((images,), index, None, index * 7919))[0].detach()


def test_masks_do_not_depend_on_how_samples_are_dealt_out():
    images, index = torch.randn(6, 3, 16, 16), torch.arange(6)
    whole = tiny_mae()(Batch((images,), index, None, index * 7919))[0]
    shares = [(images[part], index[part]) for part in ([4, 0, 2], [5, 3, 1])]
    torch.testing.assert_close(torch.stack(run_ranks(2, losses_of_a_rank, shares)).mean(), whole.detach())


@pytest.mark.parametrize("name", ["mae_raw_pixels", "mae_norm_pixels"])
def test_masked_patch_loss_is_the_official_forward_loss(name):
    golden, meta = read(name)
    images, pred, mask = (golden[key].double() for key in ("images", "pred", "mask"))
    for masked in (None, int(mask[0].sum())):
        criterion = MaskedPatchLoss(meta["patch_size"], meta["norm_pix_loss"], masked)
        torch.testing.assert_close(criterion(images, pred, mask), golden["loss"][0].double(), rtol=1e-9, atol=0)
        torch.testing.assert_close(criterion(images, pred, mask.bool()), golden["loss"][0].double(), rtol=1e-9, atol=0)


def test_masked_patch_loss_takes_ids_and_predictions_of_the_masked_alone():
    images, ids = torch.randn(2, 3, 16, 16), torch.tensor([[0, 5, 9], [3, 2, 15]])
    pred = torch.randn(2, 16, 48, requires_grad=True)
    criterion = MaskedPatchLoss(4, True)
    masked_alone = torch.stack([row[i] for row, i in zip(pred, ids)])
    expected = masked_patch_mse(masked_alone, images, ids, 4, True)
    torch.testing.assert_close(criterion(images, pred, ids), expected)
    torch.testing.assert_close(criterion(images, masked_alone, ids), expected)
    criterion(images, pred, ids).backward()
    assert (pred.grad.abs().sum(2) > 0).sum(1).tolist() == [3, 3]


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("counts", [(3, 4, 1), (0, 5, 2), (16, 2, 9), (16, 16, 16)], ids=str)
def test_masks_that_remove_different_numbers_are_the_official_loss(counts, norm_pix):
    images, pred = torch.randn(3, 3, 16, 16).double(), torch.randn(3, 16, 48).double().requires_grad_()
    mask = torch.stack([(torch.rand(16).argsort() < count).double() for count in counts])
    target = patchify(images, 4)
    if norm_pix:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6) ** 0.5
    official = (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    (expected,) = torch.autograd.grad(official, pred)
    for removed in (mask, mask.bool()):
        loss = MaskedPatchLoss(4, norm_pix)(images, pred, removed)
        torch.testing.assert_close(loss, official)
        torch.testing.assert_close(torch.autograd.grad(loss, pred)[0], expected)


def test_the_rows_on_lightly_s_masked_autoencoder():
    utils = pytest.importorskip("lightly.models.utils")
    images, length, width = torch.rand(2, 3, 16, 16), 16, 8
    masking = ops.random_masking(torch.rand(2, length), int(length * (1 - 0.75)))
    lightly_keep, lightly_mask = utils.random_token_mask((2, 1 + length), 0.75)
    assert masking.ids_keep.shape[1] == lightly_keep.shape[1] - 1
    assert masking.ids_masked.shape == lightly_mask.shape
    tokens, patches = torch.randn(2, length, width), utils.patchify(images, 4)
    kept = ops.keep_tokens(tokens, masking.ids_keep)
    assert torch.equal(kept, utils.get_at_index(tokens, masking.ids_keep))
    assert torch.equal(ops.patchify(images, 4), patches)
    assert torch.equal(ops.unpatchify(patches, 4, 16, 16), utils.unpatchify(patches, 4))
    pred = torch.randn(2, 12, 48)
    expected = torch.nn.MSELoss()(pred, utils.get_at_index(patches, masking.ids_masked))
    torch.testing.assert_close(ops.masked_patch_mse(pred, images, masking.ids_masked, 4), expected)
    class_token, mask_token, pos = torch.randn(2, 1, width), torch.randn(1, 1, width), torch.randn(1 + length, width)
    x = torch.cat([class_token, kept], 1)
    ids = torch.cat([torch.zeros(2, 1, dtype=torch.int64), masking.ids_keep + 1], 1)
    expected = utils.set_at_index(utils.repeat_token(mask_token, (2, 1 + length)), ids, x) + pos
    assert torch.equal(ops.restore_tokens(x, mask_token, masking.ids_restore, pos), expected)


def test_masked_patch_loss_error_sentences():
    images, pred = torch.randn(2, 3, 16, 16), torch.randn(2, 16, 48)
    mask = torch.zeros(2, 16)
    sentence = "MaskedPatchLoss: mask must remove at least one patch, got zeros alone"
    refused(sentence, ValueError, MaskedPatchLoss(4), images, pred, mask)
    mask[0, :3] = mask[1, :4] = 1
    refused(
        "MaskedPatchLoss: pred must be [B, L=16, P] where rows of mask remove different numbers, got pred [B, 4, P]",
        ValueError,
        MaskedPatchLoss(4),
        images,
        pred[:, :4],
        mask,
    )
    refused(
        "MaskedPatchLoss: int64 numbers of removed patches must be fewer than all 16 patches: a mask of zeros and "
        "ones must be floating or bool",
        ValueError,
        MaskedPatchLoss(4),
        images,
        pred,
        mask.long(),
    )
    refused(
        "MaskedPatchLoss: mask must hold zeros and ones alone, 0 kept and 1 removed",
        ValueError,
        MaskedPatchLoss(4),
        images,
        pred,
        mask / 2,
    )
    mask[0, 3] = 1
    refused(
        "MaskedPatchLoss: mask must remove masked=12 patches in each row, got from 4 to 4",
        ValueError,
        MaskedPatchLoss(4, masked=12),
        images,
        pred,
        mask,
    )
