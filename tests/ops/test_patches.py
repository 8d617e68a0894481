import mmap
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.ops import dispatch, keep_patches, masked_patch_mse, patches, patchify, random_masking, unpatchify
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

SIZES = [(1, 1, 4, 4, 4), (2, 3, 32, 32, 8), (3, 3, 14, 35, 7), (2, 4, 6, 2, 1), (0, 3, 8, 8, 4)]  # B, C, H, W, p
LAYOUTS = [torch.contiguous_format, torch.channels_last]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]


def images_of(batch, channels, height, width, dtype=torch.float64, layout=torch.contiguous_format):
    return torch.randn(batch, channels, height, width, dtype=dtype).contiguous(memory_format=layout)


def formula(images, patch):
    b, c, h, w = images.shape
    grid = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return torch.einsum("nchpwq->nhwpqc", grid).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def loss_formula(pred, images, ids, patch, norm_pix):
    target = formula(images, patch).gather(1, ids[..., None].expand(-1, -1, pred.shape[2]))
    if norm_pix:
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
    return ((pred - target) ** 2).mean(-1).mean()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_patches_are_the_formula(size, layout):
    *shape, patch = size
    images = images_of(*shape, layout=layout)
    rows = patchify(images, patch)
    assert rows.is_contiguous() and torch.equal(rows, formula(images, patch))
    assert torch.equal(unpatchify(rows, patch, *images.shape[2:]), images)
    length = rows.shape[1]
    ids = random_masking(torch.rand(shape[0], length), max(1, length // 3)).ids_keep
    kept = keep_patches(images, ids, patch)
    assert kept.is_contiguous() and torch.equal(kept, rows.gather(1, ids[..., None].expand(-1, -1, rows.shape[2])))


def test_uint8_images():
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    assert torch.equal(patchify(images, 4), formula(images, 4))
    assert keep_patches(images, torch.tensor([[5], [0]]), 4).dtype == torch.uint8


def test_gradients():
    images = images_of(2, 3, 6, 4).requires_grad_()
    ids = torch.tensor([[5, 0], [2, 3]])
    gradcheck(lambda x: patchify(x, 2), images)
    torch.autograd.gradgradcheck(lambda x: patchify(x, 2), images)
    gradcheck(lambda x: unpatchify(x, 2, 6, 4), torch.randn(2, 6, 12).double().requires_grad_())
    gradcheck(lambda x: keep_patches(x, ids, 2), images)
    pred = torch.randn(2, 2, 12).double().requires_grad_()
    for norm_pix in (False, True):
        gradcheck(lambda p, n=norm_pix: masked_patch_mse(p, images, ids, 2, n), pred)
    refuses_second_derivative(lambda p: masked_patch_mse(p, images, ids, 2), pred)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_error_of_the_loss_is_at_most_torch_s_in_float32(dtype, norm_pix, layout):
    images = images_of(3, 3, 32, 64, torch.float32, layout)
    ids = random_masking(torch.rand(3, 8 * 16), 100).ids_masked
    pred = torch.randn(3, 28, 48).to(dtype).requires_grad_()
    truth_pred, plain_pred = pred.detach().double().requires_grad_(), pred.detach().float().requires_grad_()
    truth = loss_formula(truth_pred, images.double(), ids, 4, norm_pix)
    plain = loss_formula(plain_pred, images, ids, 4, norm_pix)
    loss = masked_patch_mse(pred, images, ids, 4, norm_pix)
    for value in (truth, plain, loss):
        value.backward()
    assert_exact(loss, truth, plain, "loss")
    assert_exact(pred.grad, truth_pred.grad, plain_pred.grad.to(dtype), "dpred")


def test_norm_pix_of_flat_and_bright_patches():
    """A constant patch has variance 0, and the variance of a bright patch must not cancel."""
    images = torch.full((1, 3, 8, 8), 1000.0)
    images[..., 4:] += torch.rand(1, 3, 8, 4) * 0.01
    pred, ids = torch.zeros(1, 4, 48), torch.arange(4)[None]
    truth = loss_formula(pred.double(), images.double(), ids, 4, True)
    assert_exact(masked_patch_mse(pred, images, ids, 4, True), truth, loss_formula(pred, images, ids, 4, True))


def test_float16_gradient_with_a_loss_scale():
    images, ids = images_of(8, 3, 64, 64, torch.float32), random_masking(torch.rand(8, 256), 64).ids_masked
    pred = torch.randn(8, 192, 48).half().requires_grad_()
    wide_pred = pred.detach().float().requires_grad_()
    (masked_patch_mse(pred, images, ids, 4) * 65536.0).backward()
    (masked_patch_mse(wide_pred, images, ids, 4) * 65536.0).backward()
    torch.testing.assert_close(pred.grad, wide_pred.grad.half())


def test_no_gradient_without_with_grad():
    images, ids = images_of(1, 3, 8, 8, torch.float32), torch.tensor([[1]])
    for with_grad, size in ((False, 0), (True, 48)):
        assert patches._masked_patch_mse_fwd(torch.zeros(1, 1, 48), images, ids, 4, False, with_grad)[1].numel() == size


def test_autocast_changes_nothing():
    images, ids = images_of(2, 3, 8, 8, torch.float32), torch.tensor([[1, 2], [3, 0]])
    pred = torch.randn(2, 2, 48)
    with torch.autocast("cpu", torch.bfloat16):
        inside = masked_patch_mse(pred, images, ids, 4, True)
    assert inside.dtype == torch.float32 and torch.equal(inside, masked_patch_mse(pred, images, ids, 4, True))


def in_all_layouts(images):
    """The same shape with other strides: contiguous, channels last, a crop, transposed, expanded."""
    b, c, h, w = images.shape
    yield images
    yield images.contiguous(memory_format=torch.channels_last)
    yield torch.nn.functional.pad(images.to(torch.complex128).real, (1, 2, 3, 0)).to(images.dtype)[..., 3:, 1 : w + 1]
    yield images.mT.contiguous().mT
    yield images[:1, :1, :, :1].expand(b, c, h, w)


def ids_for(images, patch, count):
    """`count` patches of each image in random order, not contiguous."""
    length = (images.shape[2] // patch) * (images.shape[3] // patch)
    return torch.rand(images.shape[0], length).argsort(1)[:, :count].T.contiguous().T


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("patch", [1, 2, 3, 5, 8, 14, 16])
def test_patches_equal_the_plain_torch_body(patch, channels, dtype):
    for images in in_all_layouts(torch.randint(0, 2**8, (2, channels, 2 * patch, 3 * patch)).to(dtype)):
        ids = ids_for(images, patch, 4)
        (rows,) = equals_body(patches._patchify, images, patch)
        (kept,) = equals_body(patches._keep_patches_fwd, images, ids, patch)
        for column in (1, 2):  # rows without and with gaps
            rows, kept = (torch.stack([t] * column, -1)[..., 0] for t in (rows, kept))
            equals_body(patches._unpatchify, rows, patch, *images.shape[2:])
            equals_body(patches._keep_patches_bwd, kept, ids, patch, *images.shape[2:])


@pytest.mark.parametrize("pixels", [*FLOATS, *INTEGERS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm_pix", [False, True])
def test_error_of_the_loss_in_all_dtypes_is_at_most_torch_s(norm_pix, dtype, pixels):
    for patch, channels in ((1, 1 + norm_pix), (2, 3), (5, 3), (3, 1), (8, 2), (14, 4)):
        for images in in_all_layouts((torch.randn(2, channels, 2 * patch, 3 * patch) * 50).to(pixels)):
            ids = ids_for(images, patch, 5)
            pred = torch.randn(2, 5, channels * patch**2, 2).to(dtype)[..., 0]
            loss, dpred = patches._masked_patch_mse_fwd(pred, images, ids, patch, norm_pix, True)
            plain_loss, plain_dpred = plain(patches._masked_patch_mse_fwd, pred, images, ids, patch, norm_pix, True)
            truth_pred = pred.double().requires_grad_()
            truth = loss_formula(truth_pred, images.to(plain_loss.dtype).double(), ids, patch, norm_pix)
            truth.backward()
            assert_exact(loss, truth, plain_loss, "loss")
            assert_exact(dpred, truth_pred.grad, plain_dpred, "dpred")
            assert norm_pix or torch.equal(dpred, plain_dpred)


def test_a_single_value_has_no_variance():
    images, ids = torch.randn(2, 1, 3, 4), torch.tensor([[3], [0]])
    if dispatch.has_kernel("masked_patch_mse_fwd", "cpu"):  # torch warns and returns NaN
        assert masked_patch_mse(torch.zeros(2, 1, 1), images, ids, 1, True).isnan()


def test_loss_of_no_images_is_nan_and_of_long_patches_exact():
    no_ids, images = torch.zeros(0, 3, dtype=torch.int64), torch.rand(1, 3, 160, 160) + 1
    loss, dpred = patches._masked_patch_mse_fwd(torch.zeros(0, 3, 12), torch.zeros(0, 3, 4, 4), no_ids, 2, True, True)
    assert loss.isnan() and dpred.shape == (0, 3, 12)
    pred, ids = torch.randn(1, 1, 76800), torch.zeros(1, 1, dtype=torch.int64)
    for norm_pix in (False, True):
        truth = loss_formula(pred.double(), images.double(), ids, 160, norm_pix)
        (plain_loss, _) = plain(patches._masked_patch_mse_fwd, pred, images, ids, 160, norm_pix, False)
        assert_exact(masked_patch_mse(pred, images, ids, 160, norm_pix), truth, plain_loss, "loss")


@settings(max_examples=60)
@given(st.data())
def test_any_shape(data):
    batch, channels, rows, columns, patch = (data.draw(st.integers(low, 5)) for low in (0, 1, 1, 1, 1))
    dtype, layout = data.draw(st.sampled_from([*FLOATS, *INTEGERS])), data.draw(st.integers(0, 3))
    images = [*in_all_layouts(torch.randn(batch, channels, rows * patch, columns * patch).to(dtype))][layout]
    ids = ids_for(images, patch, data.draw(st.integers(1, rows * columns)))
    (whole,) = equals_body(patches._patchify, images, patch)
    assert torch.equal(equals_body(patches._unpatchify, whole, patch, *images.shape[2:])[0], images)
    (kept,) = equals_body(patches._keep_patches_fwd, images, ids, patch)
    equals_body(patches._keep_patches_bwd, kept, ids, patch, *images.shape[2:])
    pred = torch.randn(kept.shape)
    (loss, dpred), (plain_loss, plain_dpred) = (
        run(patches._masked_patch_mse_fwd, pred, images, ids, patch, False, True)
        for run in (lambda op, *args: op(*args), plain)
    )
    assert torch.equal(dpred, plain_dpred)
    truth = (pred.double() - kept.double()).square().mean()
    assert_exact(loss, truth, plain_loss) if batch else plain_loss.isnan()


def test_offsets_beyond_31_bits():
    """Batch, channel, row or column of pixels is beyond 2**31 elements."""
    for strides in ((2**31, 16, 4, 1), (16, 2**30, 4, 1), (48, 16, 2**29, 1), (48, 16, 1, 2**29)):
        images = sparse((2, 3, 4, 4), strides)
        images.copy_(torch.randn(2, 3, 4, 4))
        ids = torch.tensor([[3, 1], [2, 0]])
        (rows,) = equals_body(patches._patchify, images, 2)
        (kept,) = equals_body(patches._keep_patches_fwd, images, ids, 2)
        far = sparse((2, 4, 12), (2**31, 2**29, 1)).copy_(rows)
        equals_body(patches._unpatchify, far, 2, 4, 4)
        equals_body(patches._keep_patches_bwd, far[:, :2], ids, 2, 4, 4)
        _, dpred = patches._masked_patch_mse_fwd(far[:, 1:3], images, ids, 2, False, True)
        assert torch.equal(dpred, (rows[:, 1:3] - kept) * (2 / 48))


def test_same_bits_on_one_thread_and_on_two():
    images, threads = torch.randn(32, 3, 64, 96), torch.get_num_threads()
    ids = ids_for(images, 16, 18)
    pred = torch.randn(32, 18, 768)
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            (rows, kept) = patchify(images, 16), keep_patches(images, ids, 16)
            results.append(
                [
                    rows,
                    kept,
                    unpatchify(rows, 16, 64, 96),
                    patches._keep_patches_bwd(kept, ids, 16, 64, 96),
                    *patches._masked_patch_mse_fwd(pred, images, ids, 16, True, True),
                ]
            )
        assert all(torch.equal(one, two) for one, two in zip(*results))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("wrong", [6, 2**62, -7, -(2**63)])
def test_ids_out_of_range_raise(wrong):
    images, ids = torch.randn(2, 3, 8, 12), torch.tensor([[5, 0], [2, wrong]])
    for call in (
        lambda: keep_patches(images, ids, 4),
        lambda: patches._keep_patches_bwd(torch.randn(2, 2, 48), ids, 4, 8, 12),
        lambda: masked_patch_mse(torch.randn(2, 2, 48), images, ids, 4),
    ):
        with pytest.raises((RuntimeError, IndexError), match=r"must be between 0 and L-1=5|out of bounds|out of range"):
            call()


def test_contract():
    images, ids = images_of(2, 3, 8, 12, torch.float32).requires_grad_(), torch.tensor([[5, 0], [2, 3]])
    pred = torch.randn(2, 2, 48, requires_grad=True)
    opcheck(patches._patchify, images, 4)
    opcheck(patches._unpatchify, torch.randn(2, 6, 48, requires_grad=True), 4, 8, 12)
    opcheck(patches._keep_patches_fwd, images, ids, 4)
    opcheck(patches._keep_patches_bwd, torch.randn(2, 2, 48), ids, 4, 8, 12)
    opcheck(patches._masked_patch_mse_fwd, pred, images.detach(), ids, 4, True, True)
    compiles(lambda x: patchify(x, 4), images)
    compiles(lambda x: unpatchify(x, 4, 8, 12), torch.randn(2, 6, 48, requires_grad=True))
    compiles(lambda x: keep_patches(x, ids, 4), images)
    compiles(lambda p, x: masked_patch_mse(p, x, ids, 4, True), pred, images.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_repeated_ids_get_the_sum_of_their_gradients(dtype):
    images, ids = torch.randn(2, 3, 4, 6).to(dtype).requires_grad_(), torch.tensor([[3, 1, 3, 3], [0, 0, 4, 2]])
    formula = patchify(images, 2).gather(1, ids[..., None].expand(-1, -1, 12))
    dkept = torch.randn(2, 4, 12).to(dtype)
    (expected,) = torch.autograd.grad(formula.double(), images, dkept.double())
    with dispatch.reference():
        (plain,) = torch.autograd.grad(keep_patches(images, ids, 2), images, dkept)
    for ours in (torch.autograd.grad(keep_patches(images, ids, 2), images, dkept)[0], plain):
        torch.testing.assert_close(ours, expected, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=0.02)


def test_error_sentences():
    images, ids = images_of(2, 3, 8, 12, torch.float32), torch.tensor([[5, 0], [2, 3]])
    refused("patchify: height and width must be divisible by patch=5, got 8×12", ValueError, patchify, images, 5)
    rejects("patchify", "images", "[3, 8, 12]", ValueError, patchify, images[0], 4)
    rejects("unpatchify", "patches", "[2, 5, 48]", ValueError, unpatchify, torch.zeros(2, 5, 48), 4, 8, 12)
    rejects("unpatchify", "patches", "P=47", ValueError, unpatchify, torch.zeros(2, 6, 47), 4, 8, 12)
    rejects(
        "masked_patch_mse", "pred", "[2, 6, 48]", ValueError, masked_patch_mse, torch.zeros(2, 6, 48), images, ids, 4
    )
    rejects(
        "masked_patch_mse",
        "ids",
        "shape [2, 0]",
        ValueError,
        masked_patch_mse,
        torch.zeros(2, 0, 48),
        images,
        ids[:, :0],
        4,
    )
    rejects("keep_patches", "ids_keep", "float32", TypeError, keep_patches, images, ids.float(), 4)


def _asked_for_huge_pages(address: int) -> bool:
    """Whether the mapping of this address in this process has been advised to have huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux has these pages")
def test_large_results_are_asked_for_in_huge_pages():
    """Whether the system then has such pages free is its own affair."""
    probe = np.frombuffer(memory := mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        pytest.skip("this system has no huge pages on request")
    if not _asked_for_huge_pages(probe.ctypes.data + (4 << 20)):
        pytest.skip("this system does not say what it was asked for")
    images = torch.randn(66, 3, 224, 224)  # a result of 40 MB
    rows = patchify(images, 16)
    assert _asked_for_huge_pages(rows.data_ptr() + rows.nbytes // 2)
