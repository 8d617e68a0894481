import pytest
import torch

from fastssl.kernels import patches as kernels
from fastssl.kernels import tile
from fastssl.ops import dispatch, keep_patches, masked_patch_mse, patches, patchify, unpatchify
from tests.kernels.contract import launched, same_as_body
from tests.kernels.interpreter import triton_on_cpu
from tests.ops.test_patches import FLOATS, INTEGERS, ids_for, in_all_layouts, loss_formula
from tests.support import kernel_model as model
from tests.support.close import assert_exact
from tests.support.contract import plain, sparse

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")

BODIES = {
    kernels.patchify: patches._patchify,
    kernels.unpatchify: patches._unpatchify,
    kernels.keep_patches_fwd: patches._keep_patches_fwd,
    kernels.keep_patches_bwd: patches._keep_patches_bwd,
}


def check(launcher, *args):
    return same_as_body(launcher, BODIES[launcher], *args)[0]


def check_moves(images, patch, ids):
    """All four moves of the same images; patches with contiguous rows, and with gaps."""
    whole, kept = check(kernels.patchify, images, patch), check(kernels.keep_patches_fwd, images, ids, patch)
    check(kernels.unpatchify, whole, patch, *images.shape[2:])
    check(kernels.keep_patches_bwd, torch.stack([kept, kept], -1)[..., 0], ids, patch, *images.shape[2:])


def check_loss(pred, images, ids, patch, norm_pix):
    (loss, dpred), _ = launched(kernels.masked_patch_mse_fwd, pred, images, ids, patch, norm_pix, True)
    plain_loss, plain_dpred = plain(patches._masked_patch_mse_fwd, pred, images, ids, patch, norm_pix, True)
    truth_pred = pred.double().requires_grad_()
    truth = loss_formula(truth_pred, images.to(plain_loss.dtype).double(), ids, patch, norm_pix)
    truth.backward()
    assert_exact(loss, truth, plain_loss, "loss")
    assert_exact(dpred, truth_pred.grad, plain_dpred, "dpred")
    assert dpred.is_contiguous() and (norm_pix or torch.equal(dpred, plain_dpred))
    return loss


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.complex64], ids=str)
def test_every_dtype_moves(dtype):
    for patch, channels in ((1, 1), (4, 3), (5, 2)):
        images = torch.randint(0, 256, (2, channels, 2 * patch, 3 * patch)).to(dtype)
        check_moves(images, patch, ids_for(images, patch, 4))


@pytest.mark.parametrize(("patch", "channels"), [(1, 4), (2, 3), (3, 1), (7, 5), (8, 3), (14, 3), (16, 2), (1, 130)])
def test_every_layout_moves(patch, channels):
    """Rectangles, channels last, crops, transposed, expanded; all patches kept."""
    for images in in_all_layouts(torch.randn(1, channels, 2 * patch, 3 * patch)):
        check_moves(images, patch, ids_for(images, patch, 4))
    images = torch.randn(2, channels, patch, 2 * patch)
    check_moves(images, patch, ids_for(images, patch, 2))
    check_moves(images, patch, ids_for(images, patch, 1)[:1].expand(2, 1))


@pytest.mark.parametrize(("patch", "channels"), [(33, 3), (64, 3), (72, 1)])
def test_large_patches_are_moved_in_parts(patch, channels):
    images = torch.randn(1, channels, 2 * patch, patch).contiguous(memory_format=torch.channels_last)
    check_moves(images, patch, torch.tensor([[1]]))


def test_many_patches_share_a_tile():
    images = torch.randn(2, 3, 24, 40).half()
    for patch in (1, 2, 4):
        check_moves(images, patch, ids_for(images, patch, 13))
    assert kernels.patch_tile(196, 4, 3, 2048)[0] == 32


def test_sixteen_bytes_a_pixel_raise():
    images = torch.zeros(1, 1, 2, 2, dtype=torch.complex128)
    with pytest.raises(TypeError, match=r"must have elements of at most 8 bytes, got torch\.complex128;"):
        kernels.patchify(images, 2)
    with pytest.raises(TypeError, match=r"must have elements of at most 8 bytes, got torch\.complex128;"):
        kernels.unpatchify(images.reshape(1, 1, 4), 2, 2, 2)


@pytest.mark.parametrize("pixels", [*FLOATS, *INTEGERS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_loss_of_all_dtypes(dtype, pixels):
    images = (torch.randn(2, 3, 10, 15) * 50).to(pixels)
    pred, ids = torch.randn(2, 5, 75, 2).to(dtype)[..., 0], ids_for(images, 5, 5)
    for norm_pix in (False, True):
        check_loss(pred, images, ids, 5, norm_pix)


@pytest.mark.parametrize(("patch", "channels"), [(1, 2), (2, 3), (4, 3), (14, 3), (16, 3), (3, 1), (1, 130)])
def test_loss_of_all_layouts(patch, channels):
    for i, images in enumerate(in_all_layouts(torch.randn(2, channels, 2 * patch, 3 * patch))):
        pred, ids = torch.randn(2, 3, channels * patch**2), ids_for(images, patch, 3)
        check_loss(pred if i % 2 else pred[:, :1].expand(2, 3, -1), images, ids, patch, norm_pix=i < 4)
    check_loss(pred, images, ids, patch, norm_pix=False)


@pytest.mark.parametrize(("patch", "dtype"), [(40, torch.float32), (72, torch.float32), (72, torch.float64)])
def test_loss_of_large_patches(patch, dtype):
    """A patch that fills a tile, and patches that are read in parts."""
    images, ids = torch.rand(1, 3, patch, 2 * patch) + 1, torch.tensor([[1]])
    for norm_pix in (False, True):
        check_loss(torch.randn(1, 1, 3 * patch**2).to(dtype), images, ids, patch, norm_pix)


def test_norm_pix_of_flat_and_bright_patches():
    """A constant patch has variance 0, and the variance of a bright patch does not cancel."""
    images = torch.full((1, 3, 8, 8), 1000.0)
    images[..., 4:] += torch.rand(1, 3, 8, 4) * 0.01
    check_loss(torch.zeros(1, 4, 48), images, torch.arange(4)[None], 4, norm_pix=True)


def test_loss_of_one_value_and_of_no_images_is_nan():
    (loss, dpred), _ = launched(
        kernels.masked_patch_mse_fwd,
        torch.zeros(2, 1, 1),
        torch.randn(2, 1, 3, 4),
        torch.tensor([[3], [0]]),
        1,
        True,
        True,
    )
    assert loss.isnan() and dpred.isnan().all()
    args = torch.zeros(0, 3, 12), torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, dtype=torch.int64), 2, True, True
    loss, dpred = kernels.masked_patch_mse_fwd(*args)
    assert loss.isnan() and loss.dtype == torch.float32 and dpred.shape == (0, 3, 12)


def test_no_gradient_without_with_grad():
    args = torch.randn(2, 5, 48), torch.randn(2, 3, 8, 12), ids_for(torch.zeros(2, 3, 8, 12), 4, 5), 4, True
    (loss, none), _ = launched(kernels.masked_patch_mse_fwd, *args, False)
    assert torch.equal(loss, check_loss(*args)) and none.shape == (0,)


def test_gradient_far_below_the_range_of_float16():
    images, ids = torch.randn(4, 3, 16, 16), torch.arange(16).expand(4, 16)
    check_loss(torch.randn(4, 16, 48).half() * 1e-3, images * 1e-3, ids, 4, norm_pix=False)


def test_empty():
    for batch, kept in ((0, 2), (2, 0)):
        images, ids = torch.randn(batch, 3, 4, 6), torch.zeros(batch, kept, dtype=torch.int64)
        check_moves(images, 2, ids)


@pytest.mark.parametrize("wrong", [-1, 6, 2**40 + 1, -(2**63), 2**63 - 1])
def test_ids_out_of_range_access_nothing_outside(wrong):
    """The interpreter raises where a lane leaves its tensor; the result is zeros."""
    images, ids = torch.randn(2, 3, 8, 12), torch.tensor([[5, 0], [2, wrong]])
    (kept,), _ = launched(kernels.keep_patches_fwd, images, ids, 4)
    assert torch.equal(kept[1, 1], torch.zeros(48)) and (kept[:, 0] != 0).all()
    (dimages,), _ = launched(kernels.keep_patches_bwd, torch.ones(2, 2, 48), ids, 4, 8, 12)
    assert dimages.sum().item() == 3 * 48
    (loss, _), _ = launched(kernels.masked_patch_mse_fwd, torch.randn(2, 2, 48), images, ids, 4, True, True)
    assert loss.isfinite()


def test_offsets_beyond_31_bits():
    """Sample, channel, row or column times a stride that fits 32 bits, so that the offset does not."""
    for strides in ((2**30 + 96, 32, 8, 1), (96, 2**30 + 32, 8, 1), (96, 32, 2**29, 1), (96, 32, 1, 2**29)):
        images = sparse((3, 3, 6, 6), strides, torch.float16)
        images.copy_(torch.randn(3, 3, 6, 6))
        ids = torch.tensor([[8, 1], [2, 0], [8, 7]])
        rows, kept = check(kernels.patchify, images, 2), check(kernels.keep_patches_fwd, images, ids, 2)
        (_, dpred), _ = launched(kernels.masked_patch_mse_fwd, rows[:, 1:3], images, ids, 2, False, True)
        assert torch.equal(dpred, (rows[:, 1:3].float() - kept.float()) * (2 / 72))
    far = sparse((3, 9, 12), (2**30 + 16, 2**28, 1), torch.float16).copy_(rows)
    check(kernels.unpatchify, far, 2, 6, 6)
    far_ids = sparse((3, 3), (8, 2**30), torch.int64).copy_(torch.tensor([[8, 0, 1], [1, 8, 0], [0, 1, 8]]))
    check(kernels.keep_patches_bwd, far[:, 6:], far_ids, 2, 6, 6)
    (loss, _), _ = launched(kernels.masked_patch_mse_fwd, far[:, 6:], images, far_ids, 2, False, True)
    truth = loss_formula(rows[:, 6:].double(), images.double(), far_ids, 2, False)
    torch.testing.assert_close(loss.double(), truth)


def test_public_ops_and_their_gradients():
    """With the Triton kernels, results and gradients equal those of plain torch."""
    ids, results = torch.tensor([[5, 0, 3], [2, 4, 1]]), []
    pixels, given = torch.randn(2, 3, 8, 12).contiguous(memory_format=torch.channels_last), torch.randn(2, 3, 48)

    def run():
        images, pred = pixels.clone().requires_grad_(), given.clone().requires_grad_()
        kept, whole = keep_patches(images, ids, 4), patchify(images, 4)
        back = unpatchify(whole.sin(), 4, 8, 12)
        loss = masked_patch_mse(pred, images, ids, 4, norm_pix=False)
        (kept.square().sum() + back.square().sum() + loss).backward()
        return kept, whole, back, images.grad, pred.grad, loss

    with dispatch.reference():
        results.append(run())
    with triton_on_cpu() as seen:
        results.append(run())
    assert {kernel for kernel, _ in seen.launches} == {
        "patchify_kernel",
        "unpatchify_kernel",
        "masked_patch_mse_kernel",
    }
    assert all(torch.equal(one, two) for one, two in zip(results[0][:5], results[1][:5]))
    torch.testing.assert_close(results[0][5], results[1][5])


@pytest.mark.parametrize("arch", tile.ARCHITECTURES)
def test_every_configuration(arch):
    images = torch.randn(1, 3, 32, 48)
    ids = ids_for(images, 16, 3)
    with tile.assume_card(arch):
        check_moves(images, 16, ids)
        check_loss(torch.randn(1, 3, 768), images, ids, 16, norm_pix=True)
        check_loss(torch.randn(1, 3, 48), images, ids, 4, norm_pix=True)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("patch", "side", "kept"), [(4, 20, 7), (16, 48, 4), (72, 72, 1)])
def test_bytes_are_those_of_the_model(patch, side, kept, arch):
    B, L, P = (1 if patch == 72 else 2), (side // patch) ** 2, 3 * patch**2
    images, half = torch.randn(B, 3, side, side), torch.randn(B, 3, side, side).half()
    pred, ids = torch.randn(B, kept, P).bfloat16(), ids_for(images, patch, kept)
    with tile.assume_card(arch):
        whole = kernels.patchify(half, patch)
        counts = [
            launched(kernels.patchify, images, patch)[1],
            launched(kernels.unpatchify, whole, patch, side, side)[1],
            launched(kernels.keep_patches_fwd, half, ids, patch)[1],
            launched(kernels.keep_patches_bwd, whole[:, :kept], ids, patch, side, side)[1],
            launched(kernels.masked_patch_mse_fwd, pred, images, ids, patch, True, True)[1],
        ]
    assert counts == [
        model.patchify(B, L, P, 4).requested,
        model.patchify(B, L, P, 2).requested,
        model.keep_patches_fwd(B, kept, P, 2).requested,
        model.keep_patches_bwd(B, L, kept, P, 2, patch, arch).requested,
        model.masked_patch_mse_fwd(B, kept, P, 2, 4, patch, True, arch).requested,
    ]


@pytest.mark.parametrize("arch", tile.ARCHITECTURES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_bytes_are_near_the_least_in_mae(size, arch):
    B, L, M, P, patch = 256, 196, 49, 768, 16
    for counted in (
        model.patchify(B, L, P, size),
        model.keep_patches_fwd(B, M, P, size),
        model.keep_patches_bwd(B, L, M, P, size, patch, arch),
        model.masked_patch_mse_fwd(B, L - M, P, 2, size, patch, True, arch),
        model.masked_patch_mse_fwd(B, L - M, P, 4, size, patch, False, arch),
    ):
        assert counted.least <= counted.moved <= 1.1 * counted.least
