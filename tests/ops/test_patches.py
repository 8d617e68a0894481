import pytest
import torch

from fastssl.ops import keep_patches, masked_patch_mse, patches, patchify, random_masking, unpatchify
from tests.close import assert_exact
from tests.ops.contract import compiles, gradcheck, opcheck, refused, refuses_second_derivative

SIZES = [(1, 1, 4, 4, 4), (2, 3, 32, 32, 8), (3, 3, 14, 35, 7), (2, 4, 6, 2, 1), (0, 3, 8, 8, 4)]  # B, C, H, W, p
LAYOUTS = [torch.contiguous_format, torch.channels_last]


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


def test_pixels_may_be_bytes():
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
def test_loss_errs_no_more_than_float32_torch(dtype, norm_pix, layout):
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
    """A constant patch has variance 0, and a bright one must not lose its variance to cancellation."""
    images = torch.full((1, 3, 8, 8), 1000.0)
    images[..., 4:] += torch.rand(1, 3, 8, 4) * 0.01
    pred, ids = torch.zeros(1, 4, 48), torch.arange(4)[None]
    truth = loss_formula(pred.double(), images.double(), ids, 4, True)
    assert_exact(masked_patch_mse(pred, images, ids, 4, True), truth, loss_formula(pred, images, ids, 4, True))


def test_a_float16_gradient_survives_a_loss_scale():
    images, ids = images_of(8, 3, 64, 64, torch.float32), random_masking(torch.rand(8, 256), 64).ids_masked
    pred = torch.randn(8, 192, 48).half().requires_grad_()
    wide_pred = pred.detach().float().requires_grad_()
    (masked_patch_mse(pred, images, ids, 4) * 65536.0).backward()
    (masked_patch_mse(wide_pred, images, ids, 4) * 65536.0).backward()
    torch.testing.assert_close(pred.grad, wide_pred.grad.half())


def test_no_gradient_is_made_where_none_is_needed():
    images, ids = images_of(1, 3, 8, 8, torch.float32), torch.tensor([[1]])
    for with_grad, size in ((False, 0), (True, 48)):
        assert patches._masked_patch_mse_fwd(torch.zeros(1, 1, 48), images, ids, 4, False, with_grad)[1].numel() == size


def test_autocast_changes_nothing():
    images, ids = images_of(2, 3, 8, 8, torch.float32), torch.tensor([[1, 2], [3, 0]])
    pred = torch.randn(2, 2, 48)
    with torch.autocast("cpu", torch.bfloat16):
        inside = masked_patch_mse(pred, images, ids, 4, True)
    assert inside.dtype == torch.float32 and torch.equal(inside, masked_patch_mse(pred, images, ids, 4, True))


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


def test_error_sentences():
    images, ids = images_of(2, 3, 8, 12, torch.float32), torch.tensor([[5, 0], [2, 3]])
    refused("patchify: height and width must be divisible by patch=5, got 8×12", ValueError, patchify, images, 5)
    refused("patchify: images must have shape [B, C, H, W], got [3, 8, 12]", ValueError, patchify, images[0], 4)
    refused(
        "unpatchify: patches must have shape [B, L=6, P], got [2, 5, 48]",
        ValueError, unpatchify, torch.zeros(2, 5, 48), 4, 8, 12,
    )  # fmt: skip
    refused(
        "unpatchify: patches must have P divisible by patch² = 16, got P=47",
        ValueError, unpatchify, torch.zeros(2, 6, 47), 4, 8, 12,
    )  # fmt: skip
    refused(
        "masked_patch_mse: pred must have shape [B=2, M=2, P=48], got [2, 6, 48]",
        ValueError, masked_patch_mse, torch.zeros(2, 6, 48), images, ids, 4,
    )  # fmt: skip
    refused(
        "masked_patch_mse: ids must name at least one patch a sample, got shape [2, 0]",
        ValueError, masked_patch_mse, torch.zeros(2, 0, 48), images, ids[:, :0], 4,
    )  # fmt: skip
    refused("keep_patches: ids_keep must be int64, got float32", TypeError, keep_patches, images, ids.float(), 4)
