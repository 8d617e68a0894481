import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.ops import dispatch, keep_tokens, masking, random_masking, restore_tokens
from tests.support.close import assert_exact
from tests.support.contract import (
    compiles,
    equals_body,
    gradcheck,
    opcheck,
    plain,
    refused,
    refuses_second_derivative,
    rejects,
    sparse,
)

SIZES = [(1, 1, 1), (2, 13, 4), (3, 63, 16), (2, 196, 49), (1, 1000, 999), (0, 16, 4)]  # B, L, keep
WIDTH = 7
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


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


def ids_of(batch, length, keep):
    return random_masking(torch.rand(batch, length), keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 13, 63, 64, 65, 128, 129, 197, 256, 257, 513, 1000])
def test_masking_equals_the_plain_torch_body(length, dtype):
    special = torch.tensor([float("nan"), -float("nan"), 0.0, -0.0, float("inf"), -float("inf"), 1e-40, -1.0])
    noise = torch.cat([torch.randn(3, length), special[torch.randint(8, (3, length))]]).to(dtype)
    for layout in (noise, noise.T.contiguous().T, noise[:1].expand(3, length), noise[:, :1].expand(6, length)):
        equals_body(masking._random_masking, layout, (length + 1) // 2)
        equals_body(masking._random_masking, layout, length)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_equal_the_plain_torch_body_in_mixed_dtypes(dtype):
    masks, x, kept, token, pos = masked(2, 13, 5)
    # 35 columns: whole vectors and a tail
    x, kept, token, pos = (t.repeat(*[1] * (t.ndim - 1), 5) for t in (x, kept, token, pos))
    for other, third in itertools.product(DTYPES, [None, *DTYPES]):
        home = None if third is None else pos.to(third)
        equals_body(masking._restore_tokens_fwd, kept.to(dtype), token.to(other), masks.ids_restore, home, 1)
        equals_body(masking._keep_tokens_fwd, x.to(dtype), masks.ids_keep, None if third is None else home[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 13, 63, 197, 1000])
@pytest.mark.parametrize("prefix", [0, 2])
def test_gradients_equal_the_plain_torch_body(width, prefix, dtype):
    masks = ids_of(3, 29, 7)
    for dkept in (torch.randn(3, 7, width), torch.randn(3, width, 7).mT, torch.randn(1, 7, 1)):
        equals_body(masking._keep_tokens_bwd, dkept.expand(3, 7, width).to(dtype), masks.ids_keep, 29)
    for kept in (0, 7, 29):
        dout = torch.randn(3, prefix + 29, width).to(dtype)
        for layout in (dout, dout.mT.contiguous().mT, dout[:1].expand_as(dout)):
            dx, dtoken = masking._restore_tokens_bwd(layout, masks.ids_restore, prefix, kept)
            plain_dx, plain_sum = plain(masking._restore_tokens_bwd, layout, masks.ids_restore, prefix, kept)
            assert torch.equal(dx, plain_dx)
            holes = layout[:, prefix:].double()[masks.ids_restore >= kept]
            assert_exact(dtoken, holes.sum(0), plain_sum, "dmask_token")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_token_gradient_of_a_large_batch(dtype):
    """More samples than partial sums, and a sum whose naive summation in float32 loses digits."""
    dout, ids = (torch.rand(700, 17, 33) + 100).to(dtype), ids_of(700, 16, 3).ids_restore
    dtoken = masking._restore_tokens_bwd(dout, ids, 1, 3)[1]
    plain_sum = plain(masking._restore_tokens_bwd, dout, ids, 1, 3)[1]
    assert_exact(dtoken, dout[:, 1:].double()[ids >= 3].sum(0), plain_sum, "dmask_token")


def test_any_strides():
    masks, x, kept, token, pos = masked(4, 16, 5, torch.float32)
    ids_keep, ids_restore = masks.ids_keep.T.contiguous().T, masks.ids_restore[:1].expand(4, 16)
    transposed = x.mT.contiguous().mT, kept.mT.contiguous().mT
    expanded = x[:1].expand(4, 16, 7), kept[..., :1].expand(4, 6, 7)
    for x, kept in (transposed, expanded):
        for home in (pos, pos.T.contiguous().T, pos[:, :1].expand(17, 7), None):
            equals_body(masking._keep_tokens_fwd, x, ids_keep, None if home is None else home[1:])
            equals_body(masking._restore_tokens_fwd, kept, token, ids_restore, home, 1)
            equals_body(masking._restore_tokens_fwd, kept, token[:1].expand(7), ids_restore, home, 1)
        equals_body(masking._keep_tokens_bwd, x[:, :5], ids_keep, 16)


@settings(max_examples=60)
@given(st.data())
def test_any_shape(data):
    batch, length, width = (data.draw(st.integers(low, high)) for low, high in ((0, 4), (1, 70), (0, 40)))
    keep, prefix = data.draw(st.integers(1, length)), data.draw(st.integers(0, 3))
    dtype, with_pos = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    noise = torch.randint(8, (batch, length)).to(dtype)
    ids_keep, _, ids_restore, _ = equals_body(masking._random_masking, noise, keep)
    x, pos = torch.randn(batch, length, width).to(dtype), torch.randn(prefix + length, width)
    kept = equals_body(masking._keep_tokens_fwd, x, ids_keep, pos[prefix:] if with_pos else None)[0]
    equals_body(masking._keep_tokens_bwd, kept, ids_keep, length)
    kept = torch.cat([torch.randn(batch, prefix, width).to(kept), kept], 1)
    token = torch.randn(width, dtype=dtype)
    out = equals_body(masking._restore_tokens_fwd, kept, token, ids_restore, pos if with_pos else None, prefix)[0]
    dx = masking._restore_tokens_bwd(out, ids_restore, prefix, keep)[0]
    assert torch.equal(dx, plain(masking._restore_tokens_bwd, out, ids_restore, prefix, keep)[0])


def test_offsets_beyond_31_bits():
    """The last rows and columns are beyond 2**31 elements."""
    far, far_column = sparse((2, 3, 4), (2**31, 2**30, 1)), sparse((2, 3, 4), (1, 2, 2**30))
    for x in (far, far_column):
        x.copy_(torch.randn(2, 3, 4))
        ids = torch.tensor([[2, 0], [1, 2]])
        equals_body(masking._keep_tokens_fwd, x, ids, x[1])
        equals_body(masking._keep_tokens_bwd, x[:, 1:], ids, 3)
        equals_body(masking._restore_tokens_fwd, x, x[1, 2], torch.tensor([[2, 0, 1], [1, 2, 0]]), None, 1)
        dx = masking._restore_tokens_bwd(x, torch.tensor([[1, 0], [0, 1]]), 1, 1)[0]
        assert torch.equal(dx, torch.stack([x[0, [0, 2]], x[1, [0, 1]]]))
        equals_body(masking._random_masking, x[:, 0], 2)


def test_same_bits_on_one_thread_and_on_two():
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            masks, x, kept, token, pos = masked(300, 50, 13, torch.float32)
            dout = torch.randn(300, 51, 200)
            results.append(
                [
                    *masks,
                    keep_tokens(x, masks.ids_keep, pos[1:]),
                    restore_tokens(kept, token, masks.ids_restore, pos),
                    masking._keep_tokens_bwd(dout[:, :13], masks.ids_keep, 50),
                    *masking._restore_tokens_bwd(dout, masks.ids_restore, 1, 13),
                ]
            )
        assert all(torch.equal(one, two) for one, two in zip(*results))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("wrong", [-1, 16, 2**62, -(2**63)])
def test_ids_out_of_range_raise(wrong):
    _, x, kept, token, pos = masked(2, 16, 4, torch.float32)
    keep, restore = torch.zeros(2, 4, dtype=torch.int64), torch.arange(16).repeat(2, 1)
    keep[1, 3] = restore[1, 15] = wrong
    for call in (
        lambda: masking._keep_tokens_fwd(x, keep, pos[1:]),
        lambda: masking._keep_tokens_bwd(x[:, :4], keep, 16),
        lambda: masking._restore_tokens_fwd(kept, token, restore, pos, 1),
        lambda: masking._restore_tokens_bwd(pos.expand(2, 17, 7), restore, 1, 4),
    ):
        with pytest.raises(
            (RuntimeError, IndexError), match=r"must be between 0 and L-1=15|out of bounds|out of range"
        ):
            call()


def test_duplicate_ids_leave_no_cell_unwritten():
    x = torch.randn(2, 5, WIDTH)
    twice = torch.tensor([[3, 3, 0, 0, 3], [1, 1, 1, 1, 1]])
    assert masking._keep_tokens_bwd(x, twice, 5).isfinite().all()
    if dispatch.has_kernel("restore_tokens_bwd", "cpu"):  # the plain-torch body leaves them uninitialised
        assert all(t.isfinite().all() for t in masking._restore_tokens_bwd(x, twice[:, :4], 1, 3))


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_repeated_ids_get_the_sum_of_their_gradients(dtype):
    x, pos = torch.randn(2, 5, 40).to(dtype).requires_grad_(), torch.randn(5, 40).to(dtype).requires_grad_()
    ids = torch.tensor([[3, 1, 3, 3], [0, 0, 4, 2]])
    dkept = torch.randn(2, 4, 40).to(dtype)
    formula = (x + pos).gather(1, ids[..., None].expand(-1, -1, 40))
    expected = torch.autograd.grad(formula.double(), (x, pos), dkept.double())
    with dispatch.reference():
        plain = torch.autograd.grad(keep_tokens(x, ids, pos), (x, pos), dkept)
    for made in (torch.autograd.grad(keep_tokens(x, ids, pos), (x, pos), dkept), plain):
        for ours, wanted in zip(made, expected):
            torch.testing.assert_close(ours, wanted, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_ranks_that_are_no_permutation_get_their_gradients():
    x, token = torch.randn(1, 4, 8).double().requires_grad_(), torch.randn(8).double().requires_grad_()
    ids = torch.tensor([[0, 0, 4, 2, 0]])  # the first kept token three times, the second and a mask token nowhere
    padded = torch.cat([x[:, 1:], token.expand(1, 2, 8)], 1).gather(1, ids[..., None].expand(-1, -1, 8))
    formula, dout = torch.cat([x[:, :1], padded], 1), torch.randn(1, 6, 8).double()
    expected = torch.autograd.grad(formula, (x, token), dout)
    with dispatch.reference():
        plain = torch.autograd.grad(restore_tokens(x, token, ids), (x, token), dout)
    for made in (torch.autograd.grad(restore_tokens(x, token, ids), (x, token), dout), plain):
        for ours, wanted in zip(made, expected):
            torch.testing.assert_close(ours, wanted)


def test_ids_are_checked_where_they_are_used():
    """Another thread changes ids all the time: the call refuses them or reads inside of x, and never outside."""
    x, good = torch.randn(64, 50, 16), torch.randint(50, (64, 40))
    ids, stop = good.clone().share_memory_(), threading.Event()

    def disturb():
        while not stop.is_set():
            ids.fill_(2**62)
            ids.copy_(good)

    other = threading.Thread(target=disturb)
    other.start()
    try:
        outcomes = {_survives(x, ids) for _ in range(300)}
    finally:
        stop.set()
        other.join()
    assert outcomes <= {"result", "refused"}


def _survives(x, ids):
    try:
        kept = keep_tokens(x, ids)
    except RuntimeError as error:
        assert "keep_tokens: ids_keep must be between 0 and L-1=49" in str(error)
        return "refused"
    assert kept.abs().max() <= x.abs().max()
    return "result"


def test_plain_torch_checks_ids_too():
    for bad in (-1, 5):
        with dispatch.reference():
            sentence = f"keep_tokens: ids_keep must be between 0 and L-1=4, got {bad}"
            refused(sentence, RuntimeError, keep_tokens, torch.randn(1, 5, 2), torch.tensor([[1, bad]]))


def test_error_sentences():
    masks, x, kept, token, pos = masked(2, 16, 4)
    refused("random_masking: keep must be between 1 and L=16, got 0", ValueError, random_masking, torch.rand(2, 16), 0)
    rejects("random_masking", "keep", "17", ValueError, random_masking, torch.rand(2, 16), 17)
    rejects("random_masking", "noise", "[16]", ValueError, random_masking, torch.rand(16), 4)
    rejects("random_masking", "noise", "int64", TypeError, random_masking, torch.zeros(2, 16, dtype=torch.int64), 4)
    rejects("keep_tokens", "ids_keep", "int32", TypeError, keep_tokens, x, masks.ids_keep.int())
    rejects("keep_tokens", "ids_keep", "[1, 4]", ValueError, keep_tokens, x, masks.ids_keep[:1])
    rejects("keep_tokens", "pos", "[17, 7]", ValueError, keep_tokens, x, masks.ids_keep, pos)
    rejects("restore_tokens", "mask_token", "[3]", ValueError, restore_tokens, kept, token[:3], masks.ids_restore)
    rejects("restore_tokens", "x", "18", ValueError, restore_tokens, torch.zeros(2, 18, 7), token, masks.ids_restore)
