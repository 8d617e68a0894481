import pytest
import torch

from fastssl.ops import keep_tokens, masking, random_masking, restore_tokens
from tests.ops.contract import compiles, gradcheck, opcheck, refused, refuses_second_derivative

SIZES = [(1, 1, 1), (2, 13, 4), (3, 63, 16), (2, 196, 49), (1, 1000, 999), (0, 16, 4)]  # B, L, keep
WIDTH = 7


def masked(batch, length, keep, dtype=torch.float64, prefix=1):
    masks = random_masking(torch.rand(batch, length), keep)
    x = torch.randn(batch, length, WIDTH, dtype=dtype)
    kept = torch.randn(batch, prefix + keep, WIDTH, dtype=dtype)
    token, pos = torch.randn(WIDTH, dtype=dtype), torch.randn(prefix + length, WIDTH, dtype=dtype)
    return masks, x, kept, token, pos


@pytest.mark.parametrize(("batch", "length", "keep"), SIZES)
def test_masking_is_the_stable_argsort(batch, length, keep):
    noise = torch.rand(batch, length).mul(16).round()  # many ties
    result = random_masking(noise, keep)
    for b in range(batch):
        order = sorted(range(length), key=lambda i: (noise[b, i].item(), i))
        assert result.ids_keep[b].tolist() == order[:keep]
        assert result.ids_masked[b].tolist() == order[keep:]
        assert [order[r] for r in result.ids_restore[b].tolist()] == list(range(length))
        assert result.mask[b].tolist() == [float(i not in order[:keep]) for i in range(length)]
    assert result.mask.dtype == torch.float32 and result.mask.shape == (batch, length)


def test_masking_puts_nan_last():
    result = random_masking(torch.tensor([[float("nan"), 0.5, float("nan"), 0.1]]), 2)
    assert result.ids_keep.tolist() == [[3, 1]] and result.ids_masked.tolist() == [[0, 2]]


def test_every_token_is_kept_equally_often():
    kept = torch.zeros(16).index_add_(0, random_masking(torch.rand(4000, 16), 4).ids_keep.flatten(), torch.ones(16000))
    chi2 = ((kept - 1000) ** 2 / 1000).sum()
    assert chi2 < 37.7, f"chi² of 15 degrees of freedom {chi2:.1f}: probability below 0.1 %"


@pytest.mark.parametrize(("batch", "length", "keep"), SIZES)
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_keep_and_restore_are_their_formulas(batch, length, keep, prefix):
    masks, x, kept, token, pos = masked(batch, length, keep, prefix=prefix)
    ids = masks.ids_keep[..., None].expand(-1, -1, WIDTH)
    assert torch.equal(keep_tokens(x, masks.ids_keep), x.gather(1, ids))
    assert torch.equal(keep_tokens(x, masks.ids_keep, pos[prefix:]), (x + pos[prefix:]).gather(1, ids))
    assert torch.equal(keep_tokens(x, masks.ids_keep, pos[None, prefix:]), (x + pos[prefix:]).gather(1, ids))
    holes = token.expand(batch, length - keep, WIDTH)
    ids = masks.ids_restore[..., None].expand(-1, -1, WIDTH)
    home = torch.cat([kept[:, :prefix], torch.cat([kept[:, prefix:], holes], 1).gather(1, ids)], 1)
    assert torch.equal(restore_tokens(kept, token, masks.ids_restore, prefix=prefix), home)
    assert torch.equal(restore_tokens(kept, token.view(1, 1, -1), masks.ids_restore, pos, prefix), home + pos)


def test_restore_undoes_keep():
    masks, x, *_ = masked(4, 36, 9)
    home = restore_tokens(keep_tokens(x, masks.ids_keep), torch.zeros(WIDTH).double(), masks.ids_restore, prefix=0)
    assert torch.equal(home, x * (1 - masks.mask.double()).unsqueeze(-1))


def test_gradients():
    masks, x, kept, token, pos = masked(2, 6, 2)
    leaf = [t.requires_grad_() for t in (x, kept, token, pos)]
    gradcheck(lambda x, p: keep_tokens(x, masks.ids_keep, p[1:]), leaf[0], leaf[3])
    gradcheck(lambda k, t, p: restore_tokens(k, t, masks.ids_restore, p), *leaf[1:])
    gradcheck(lambda k, t: restore_tokens(k, t, masks.ids_restore, prefix=1), *leaf[1:3])
    refuses_second_derivative(lambda x: keep_tokens(x, masks.ids_keep), leaf[0])
    refuses_second_derivative(lambda k: restore_tokens(k, token, masks.ids_restore), leaf[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_promote_like_the_formula(dtype):
    masks, x, kept, token, pos = masked(2, 16, 4, dtype)
    assert keep_tokens(x, masks.ids_keep).dtype == dtype
    assert keep_tokens(x, masks.ids_keep, pos[1:].float()).dtype == torch.float32
    out = restore_tokens(kept.requires_grad_(), token.float().requires_grad_(), masks.ids_restore, pos.float())
    assert out.dtype == torch.float32
    out.sum().backward()
    assert kept.grad.dtype == dtype


def test_mask_token_gradient_is_summed_in_float32():
    masks, _, kept, token, _ = masked(64, 196, 49, torch.bfloat16)
    out = restore_tokens(kept, token.requires_grad_(), masks.ids_restore)
    out.backward(torch.ones_like(out))
    assert token.grad.tolist() == [float(torch.tensor(64.0 * 147).bfloat16())] * WIDTH


def test_contract():
    masks, x, kept, token, pos = masked(3, 16, 4, torch.float32)
    for t in (x, kept, token, pos):
        t.requires_grad_()
    opcheck(masking._random_masking, torch.rand(3, 16), 4)
    opcheck(masking._keep_tokens_fwd, x, masks.ids_keep, pos[1:])
    opcheck(masking._keep_tokens_fwd, x, masks.ids_keep, None)
    opcheck(masking._restore_tokens_fwd, kept, token, masks.ids_restore, pos, 1)
    opcheck(masking._keep_tokens_bwd, torch.randn(3, 4, WIDTH), masks.ids_keep, 16)
    opcheck(masking._restore_tokens_bwd, torch.randn(3, 17, WIDTH), masks.ids_restore, 1, 4)
    compiles(lambda noise: random_masking(noise, 4), torch.rand(3, 16))
    compiles(lambda x, p: keep_tokens(x, masks.ids_keep, p[1:]), x, pos)
    compiles(lambda k, t, p: restore_tokens(k, t, masks.ids_restore, p), kept, token, pos)


def test_error_sentences():
    masks, x, kept, token, pos = masked(2, 16, 4)
    refused("random_masking: keep must be between 1 and L=16, got 0", ValueError, random_masking, torch.rand(2, 16), 0)
    refused(
        "random_masking: keep must be between 1 and L=16, got 17", ValueError, random_masking, torch.rand(2, 16), 17
    )
    refused("random_masking: noise must have shape [B, L], got [16]", ValueError, random_masking, torch.rand(16), 4)
    refused(
        "random_masking: noise must be float32, float64, bfloat16 or float16, got int64",
        TypeError, random_masking, torch.zeros(2, 16, dtype=torch.int64), 4,
    )  # fmt: skip
    refused("keep_tokens: ids_keep must be int64, got int32", TypeError, keep_tokens, x, masks.ids_keep.int())
    refused(
        "keep_tokens: ids_keep must have shape [B=2, M], got [1, 4]", ValueError, keep_tokens, x, masks.ids_keep[:1]
    )
    refused(
        "keep_tokens: pos must have shape [L=16, D=7] or that with a 1 in front, got [17, 7]",
        ValueError, keep_tokens, x, masks.ids_keep, pos,
    )  # fmt: skip
    refused(
        "restore_tokens: mask_token must have shape [D=7], got [3]",
        ValueError, restore_tokens, kept, token[:3], masks.ids_restore,
    )  # fmt: skip
    refused(
        "restore_tokens: x must have prefix=1 to prefix+L=17 tokens, got 18",
        ValueError, restore_tokens, torch.zeros(2, 18, 7), token, masks.ids_restore,
    )  # fmt: skip
