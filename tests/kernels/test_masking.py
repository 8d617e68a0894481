import itertools

import pytest
import torch

from fastssl.kernels import masking as kernels
from fastssl.kernels import tile
from fastssl.ops import dispatch, keep_tokens, masking, random_masking, restore_tokens
from tests.kernels.contract import launched, same_as_body
from tests.kernels.interpreter import triton_on_cpu
from tests.support import kernel_model as model
from tests.support.close import assert_exact
from tests.support.contract import plain, sparse

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SPECIAL = torch.tensor([float("nan"), -float("nan"), 0.0, -0.0, float("inf"), -float("inf"), 1e-40, -1e-40, -1.0])
MAE = {"B": 256, "L": 196, "M": 49}


def ids_of(batch, length, keep):
    """(ids_keep, ids_restore) of random permutations."""
    ids = torch.rand(batch, length).argsort(1)
    return ids[:, :keep].contiguous(), ids.argsort(1)


def body_of(launcher):
    return getattr(masking, f"_{launcher.__name__}")


def check(launcher, *args):
    return same_as_body(launcher, body_of(launcher), *args)


def check_restore_bwd(dout, ids_restore, prefix, kept):
    (dx, dtoken), _ = launched(kernels.restore_tokens_bwd, dout, ids_restore, prefix, kept)
    plain_dx, plain_sum = plain(masking._restore_tokens_bwd, dout, ids_restore, prefix, kept)
    assert torch.equal(dx, plain_dx) and dx.dtype == plain_dx.dtype and dx.is_contiguous()
    assert_exact(dtoken, dout[:, prefix:].double()[ids_restore >= kept].sum(0), plain_sum, "dmask_token")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 13, 63, 65, 100, 512, 513, 700])
def test_ranks(length, dtype):
    """Ties, NaN and zeros of both signs, infinities, subnormal numbers; rows of one program and of several."""
    noise = torch.cat([torch.randn(1, length), SPECIAL[torch.randint(len(SPECIAL), (1, length))]]).to(dtype)
    check(kernels.random_masking, noise, (length + 1) // 2)
    for layout in (noise.T.contiguous().T, noise[1:].expand(3, length), noise[:, :1].expand(2, length), noise[:, ::3]):
        if length < 512:
            check(kernels.random_masking, layout, layout.shape[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_mixtures_of_dtypes(dtype):
    """A sum is rounded once, to the promoted dtype."""
    ids_keep, ids_restore = ids_of(2, 13, 5)
    x, kept, token, pos = torch.randn(2, 13, 33), torch.randn(2, 6, 33), torch.randn(33), torch.randn(14, 33)
    for other, third in itertools.product(DTYPES, [None, *DTYPES]):
        home = None if third is None else pos.to(third)
        check(kernels.restore_tokens_fwd, kept.to(dtype), token.to(other), ids_restore, home, 1)
    for other in (None, *DTYPES):
        check(kernels.keep_tokens_fwd, x.to(dtype), ids_keep, None if other is None else pos[1:].to(other))


@pytest.mark.parametrize(("width", "prefix"), [(1, 0), (7, 1), (33, 2), (130, 4), (192, 1), (600, 2)])
def test_sizes(width, prefix):
    """Tokens and columns that do not fill their tiles, or fill several; nothing kept, all kept."""
    for dtype, (length, keep) in zip(DTYPES, ((1, 1), (13, 0), (19, 19), (37, 5))):
        ids_keep, ids_restore = ids_of(2, length, keep)
        pos, token = torch.randn(prefix + length, width), torch.randn(width)
        x, given = torch.randn(2, length, width).to(dtype), torch.randn(2, prefix + keep, width).to(dtype)
        check(kernels.keep_tokens_fwd, x, ids_keep, None)
        check(kernels.keep_tokens_fwd, x, ids_keep, pos[prefix:])
        check(kernels.keep_tokens_bwd, given[:, prefix:], ids_keep, length)
        check(kernels.restore_tokens_fwd, given, token.to(dtype), ids_restore, None, prefix)
        for multiprocessors in (1, 132):  # programs with many samples or tiles, and with one
            with tile.assume_card("sm_90", multiprocessors):
                check(kernels.restore_tokens_fwd, given, token, ids_restore, pos, prefix)
                check_restore_bwd(torch.randn(2, prefix + length, width).to(dtype), ids_restore, prefix, keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_token_gradient_of_a_large_sum(dtype):
    """A sum whose naive summation in float32 loses digits."""
    _, ids_restore = ids_of(20, 40, 3)
    with tile.assume_card("sm_90", 1):
        check_restore_bwd((torch.rand(20, 41, 33) + 100).to(dtype), ids_restore, 1, 3)


def test_kept_and_masked_rows_do_not_mix():
    """NaN in a kept row must not enter the mask token's gradient."""
    _, ids_restore = ids_of(2, 20, 5)
    dout = torch.ones(2, 20, 16).masked_fill((ids_restore < 5)[..., None], float("nan"))
    (dx, dtoken), _ = launched(kernels.restore_tokens_bwd, dout, ids_restore, 0, 5)
    assert dx.isnan().all() and dtoken.tolist() == [30.0] * 16


def test_any_strides():
    ids_keep, ids_restore = (ids.T.contiguous().T for ids in ids_of(4, 16, 5))
    x, given, pos, token = torch.randn(4, 16, 7), torch.randn(4, 6, 7), torch.randn(17, 7), torch.randn(7)
    for layout in (lambda t: t.mT.contiguous().mT, lambda t: t[..., :1].expand_as(t), lambda t: t.flip(0)[..., ::2]):
        width = layout(x).shape[2]
        for home in (None, pos[:, :width], pos.T.contiguous().T[:, :width], pos[:, :1].expand(17, width)):
            check(kernels.keep_tokens_fwd, layout(x), ids_keep, None if home is None else home[1:])
            check(kernels.restore_tokens_fwd, layout(given), token[:1].expand(width), ids_restore, home, 1)
        check(kernels.keep_tokens_bwd, layout(x)[:, 1:6], ids_keep, 16)
        check_restore_bwd(layout(x)[:, 3:], ids_restore[:, 4:].argsort(1), 1, 5)
    check(kernels.keep_tokens_fwd, x[:1].expand(4, 16, 7), ids_keep[:1].expand(4, 5), pos[1:])
    check(kernels.keep_tokens_bwd, x[:1, :5].expand(4, 5, 7), ids_keep[:1].expand(4, 5), 16)
    check_restore_bwd(x[:1].expand(4, 16, 7), ids_restore[:1, 1:].expand(4, 15).argsort(1), 1, 5)


def test_offsets_beyond_31_bits():
    """Strides that 32 bits hold, times rows that carry them beyond."""
    x = sparse((3, 4, 4), (2**30 + 8, 2**30, 1), torch.float16)
    x.copy_(torch.randn(3, 4, 4))
    ids = torch.tensor([[3, 0, 2], [1, 3, 2], [0, 3, 2]])
    far_ids = sparse((3, 3), (8, 2**30), torch.int64).copy_(torch.tensor([[2, 0, 1], [1, 2, 0], [0, 1, 2]]))
    check(kernels.random_masking, x[:, :, 0], 2)
    check(kernels.keep_tokens_fwd, x, ids, x[1])
    check(kernels.keep_tokens_fwd, x, far_ids, None)
    check(kernels.keep_tokens_bwd, x[:, 1:], ids, 4)
    check(kernels.keep_tokens_bwd, x[:, 1:], far_ids, 4)
    check(kernels.restore_tokens_fwd, x, x[1, 2], far_ids, x[0], 1)
    check_restore_bwd(x, far_ids, 1, 1)


@pytest.mark.parametrize("wrong", [-1, 16, 2**40, -(2**63), 2**63 - 1])
def test_ids_out_of_range_access_nothing_outside(wrong):
    """The interpreter raises where a lane leaves its tensor; the result is zeros, or a mask token."""
    ids_keep, ids_restore = ids_of(2, 16, 4)
    ids_keep[1, 2] = ids_restore[1, 15] = wrong
    x, given, token, pos = torch.randn(2, 16, 7), torch.randn(2, 5, 7), torch.randn(7), torch.randn(17, 7)
    for home in (None, pos[1:]):
        (kept,), _ = launched(kernels.keep_tokens_fwd, x, ids_keep, home)
        assert torch.equal(kept[1, 2], torch.zeros(7)) and kept.isfinite().all()
    (dx,), _ = launched(kernels.keep_tokens_bwd, x[:, :4], ids_keep, 16)
    assert (dx[1] != 0).any(1).sum() == 3
    (home,), _ = launched(kernels.restore_tokens_fwd, given, token, ids_restore, None, 1)
    assert torch.equal(home[1, 16], token)
    launched(kernels.restore_tokens_bwd, torch.randn(2, 17, 7), ids_restore, 1, 4)


def test_empty():
    """No samples, no columns, no kept tokens, no tokens but the prefix."""
    for batch, width, keep, length in ((0, 7, 2, 4), (2, 0, 2, 4), (2, 7, 0, 4), (2, 7, 0, 0)):
        ids_keep, ids_restore = ids_of(batch, length, keep)
        x, token, pos = torch.randn(batch, length, width), torch.randn(width), torch.randn(1 + length, width)
        check(kernels.keep_tokens_fwd, x, ids_keep, pos[1:])
        check(kernels.keep_tokens_bwd, x[:, :keep], ids_keep, length)
        for prefix in (0, 1):
            given = torch.randn(batch, prefix + keep, width)
            check(kernels.restore_tokens_fwd, given, token, ids_restore, pos[1 - prefix :], prefix)
            check(kernels.restore_tokens_bwd, torch.zeros(batch, prefix + length, width), ids_restore, prefix, keep)
    check(kernels.random_masking, torch.rand(0, 16), 4)


def test_public_ops_and_their_gradients():
    """With the Triton kernels, results and gradients equal those of plain torch."""
    noise, results = torch.rand(3, 20), []
    leaves = [torch.randn(*shape).bfloat16() for shape in ((3, 20, 24), (24,), (20, 24), (21, 24))]

    def run():
        x, token, pos, home = (t.clone().requires_grad_() for t in leaves)
        masks = random_masking(noise, 5)
        kept = keep_tokens(x, masks.ids_keep, pos)
        given = torch.cat([kept.new_ones(3, 1, 24), kept], 1)
        out = restore_tokens(given, token, masks.ids_restore, home)
        (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        return [*masks, out, x.grad, token.grad, pos.grad, home.grad]

    with dispatch.reference():
        results.append(run())
    with triton_on_cpu() as seen:
        results.append(run())
    assert {kernel for kernel, _ in seen.launches} == {
        "random_masking_kernel",
        "keep_tokens_fwd_kernel",
        "keep_tokens_bwd_kernel",
        "restore_tokens_fwd_kernel",
        "restore_tokens_bwd_kernel",
    }
    for i, (one, two) in enumerate(zip(*results)):
        if i == 6:  # dmask_token: summed in another order, rounded to bfloat16
            torch.testing.assert_close(one, two, rtol=2**-7, atol=0)
        else:
            assert torch.equal(one, two), f"result {i}"


@pytest.mark.parametrize("arch", tile.ARCHITECTURES)
def test_every_configuration(arch):
    """With few multiprocessors, so that a program has several samples or tiles, and the last one fewer."""
    with tile.assume_card(arch, 2):
        ids_keep, ids_restore = ids_of(5, 59, 20)
        x = torch.randn(5, 60, 250).bfloat16()
        check(kernels.random_masking, torch.rand(2, 59), 20)
        check(kernels.keep_tokens_fwd, x[:, 1:], ids_keep, x[0, 1:])
        check(kernels.keep_tokens_bwd, x[:, :20], ids_keep, 59)
        check(kernels.restore_tokens_fwd, x[:, :21], x[0, 0], ids_restore, x[1], 1)
        check_restore_bwd(x, ids_restore, 1, 20)


@pytest.mark.parametrize(
    ("arch", "sizes"), [("sm_90", (2, 13, 5, 33)), ("sm_90", (2, 35, 11, 304)), ("gfx942", (3, 20, 20, 256))]
)
def test_bytes_are_those_of_the_model(sizes, arch):
    B, L, M, D = sizes
    ids_keep, ids_restore = ids_of(B, L, M)
    x, half, token, pos = (
        torch.randn(B, 2 + L, D),
        torch.randn(B, 2 + L, D).half(),
        torch.randn(D),
        torch.randn(2 + L, D),
    )
    for noise in (torch.rand(B, L), torch.rand(1, 600).double(), torch.rand(2, 512).half()):
        _, count = launched(kernels.random_masking, noise, noise.shape[1] // 2)
        assert count == model.random_masking(*noise.shape, noise.element_size()).requested
    with tile.assume_card(arch):
        counts = [
            launched(kernels.keep_tokens_fwd, x[:, 2:], ids_keep, None)[1],
            launched(kernels.keep_tokens_fwd, half[:, 2:], ids_keep, pos[2:])[1],
            launched(kernels.keep_tokens_bwd, half[:, :M], ids_keep, L)[1],
            launched(kernels.restore_tokens_fwd, x[:, : 2 + M], token, ids_restore, pos, 2)[1],
            launched(kernels.restore_tokens_fwd, half[:, :M], token.half(), ids_restore, None, 0)[1],
            launched(kernels.restore_tokens_bwd, half, ids_restore, 2, M)[1],
            launched(kernels.restore_tokens_bwd, x, ids_restore, 2, M)[1],
        ]
    assert counts == [
        model.keep_tokens_fwd(B, L, M, D, 4).requested,
        model.keep_tokens_fwd(B, L, M, D, 2, 4).requested,
        model.keep_tokens_bwd(B, L, M, D, 2, arch).requested,
        model.restore_tokens_fwd(B, L, M, D, 2, 4, 4, 4, arch).requested,
        model.restore_tokens_fwd(B, L, M, D, 0, 2, 2, 0, arch).requested,
        model.restore_tokens_bwd(B, L, M, D, 2, 2, arch).requested,
        model.restore_tokens_bwd(B, L, M, D, 2, 4, arch).requested,
    ]


@pytest.mark.parametrize("arch", tile.ARCHITECTURES)
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_are_near_the_least_in_mae(size, arch):
    for counted in (
        model.random_masking(256, 196, 4),
        model.keep_tokens_fwd(**MAE, D=768, x_bytes=size, pos_bytes=size),
        model.keep_tokens_bwd(**MAE, D=768, size=size, arch=arch),
        model.restore_tokens_fwd(**MAE, D=512, prefix=1, x_bytes=size, token_bytes=size, pos_bytes=size, arch=arch),
        model.restore_tokens_bwd(**MAE, D=512, prefix=1, size=size, arch=arch),
    ):
        assert counted.least <= counted.moved <= 1.1 * counted.least
    assert counted.moved <= 1.03 * counted.least, "partial sums of the mask token's gradient"
