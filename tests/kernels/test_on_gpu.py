"""The public ops on a GPU, against float64 and plain torch there: what the interpreter can't show, since it knows no
races between warps, no tensor cores and no real sizes."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import (
    attention,
    batch_info_nce,
    dispatch,
    ema_update_,
    enqueue_,
    info_nce,
    keep_patches,
    keep_tokens,
    masked_patch_mse,
    nt_xent,
    patchify,
    random_masking,
    restore_tokens,
    unpatchify,
)
from tests.close import assert_as_exact_on_average, assert_same
from tests.ops.contract import compiles, tensors_of

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=-1).to(dtype)


def noise(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def run(function, tensors, dtype=None):
    """Results of `function`, and gradients of the floating inputs that require one."""
    inputs = [x.detach().to(dtype) if dtype and x.is_floating_point() else x.detach() for x in tensors]
    leaves = [x.requires_grad_(y.requires_grad) for x, y in zip(inputs, tensors)]
    results = tensors_of(function(*leaves))
    wanted = [x for x in leaves if x.requires_grad]
    if not wanted:
        return results
    upstream = torch.linspace(-1, 1, results[0].numel(), device=DEVICE).reshape(results[0].shape).to(results[0].dtype)
    gradients = torch.autograd.grad(results[0], wanted, upstream + 1.5)
    return [x.detach() for x in results] + list(gradients)


def agrees(function, *tensors, exact=False):
    """Bit-equal to plain torch (data movement), or no further from float64 than it. Twice the same bits."""
    ours, again = run(function, tensors), run(function, tensors)
    for a, b in zip(ours, again, strict=True):
        assert_same(a, b, "the same call again")
    with dispatch.reference():
        plain, truth = run(function, tensors), run(function, tensors, torch.float64)
    for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
        if exact or not a.is_floating_point():
            assert_same(a, b, f"result {i}")
        else:
            assert_as_exact_on_average(a, c, b, f"result {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, K, D", [(256, 65536, 128), (37, 4099, 100), (1, 5, 16), (64, 3000, 600)])
def test_info_nce(B, K, D, dtype):
    q, k, queue = unit(B, D, dtype=dtype).requires_grad_(), unit(B, D, dtype=dtype), unit(K, D, dtype=dtype)
    agrees(lambda q, k, queue: info_nce(q, k, queue, 0.2).loss, q, k, queue)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, M, D", [(1024, 4096, 256), (33, 70, 40)])
def test_in_batch(B, M, D, dtype):
    q, keys = unit(B, D, dtype=dtype).requires_grad_(), unit(M, D, dtype=dtype).requires_grad_()
    agrees(lambda q, keys: batch_info_nce(q, keys, 0.2, 7).loss, q, keys)
    agrees(lambda z1, z2: nt_xent(z1, z2, 0.5), q, unit(B, D, dtype=dtype).requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "L, H, E", [(50, 12, 64), (65, 3, 32), (197, 16, 32), (197, 12, 64), (257, 4, 80), (512, 2, 64)]
)
def test_attention(L, H, E, dtype):
    if dtype == torch.float32 and E > 64:
        pytest.skip("goes to torch")
    qkv = noise(4, L, 3, H, E, dtype=dtype).requires_grad_()
    agrees(lambda qkv: attention(*qkv.unbind(2)), qkv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masking(dtype):
    noises = torch.rand(64, 196, device=DEVICE)
    agrees(lambda n: random_masking(n, 49), noises)
    agrees(lambda n: random_masking(n, 300), torch.rand(4, 1568, device=DEVICE))
    masking = random_masking(noises, 49)
    x, pos = noise(64, 196, 768, dtype=dtype).requires_grad_(), noise(196, 768, dtype=dtype)
    agrees(lambda x, ids, pos: keep_tokens(x, ids, pos), x, masking.ids_keep, pos, exact=True)
    x, token, pos = (
        noise(64, 50, 512, dtype=dtype),
        noise(512, dtype=dtype).requires_grad_(),
        noise(197, 512, dtype=dtype),
    )
    agrees(lambda x, t, ids, pos: restore_tokens(x, t, ids, pos), x.requires_grad_(), token, masking.ids_restore, pos)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patches(dtype):
    images, masking = noise(16, 3, 224, 160, dtype=dtype), random_masking(torch.rand(16, 140, device=DEVICE), 35)
    for layout in (images, images.contiguous(memory_format=torch.channels_last)):
        agrees(lambda x: patchify(x, 16), layout.requires_grad_(), exact=True)
        agrees(lambda x: unpatchify(patchify(x, 16), 16, 224, 160), layout, exact=True)
        agrees(lambda x, ids: keep_patches(x, ids, 16), layout, masking.ids_keep, exact=True)
        pred = noise(16, 105, 768, dtype=dtype).requires_grad_()
        for norm in (False, True):
            agrees(lambda p, x, ids, n=norm: masked_patch_mse(p, x.detach(), ids, 16, n), pred, layout.detach(),
                   masking.ids_masked)  # fmt: skip


def test_queue():
    queue, ptr = noise(1000, 128), torch.tensor([900], device=DEVICE)
    keys = noise(256, 128)
    expected = queue.clone()
    expected[(torch.arange(256, device=DEVICE) + 900) % 1000] = keys
    enqueue_(queue, ptr, keys)
    assert_same(queue, expected)
    assert ptr.item() == 156


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ema(dtype):
    sizes = [(768, 3072), (768,), (3, 3, 7, 7), (), (1001,)]
    targets, sources = [noise(*size) for size in sizes], [noise(*size, dtype=dtype) for size in sizes]
    shadows = [x.bfloat16() for x in targets]
    expected = [torch.lerp(t, s.float(), 0.01) for t, s in zip(targets, sources)]
    ema_update_(targets, sources, 0.99, shadows)
    for target, wanted, shadow in zip(targets, expected, shadows):
        torch.testing.assert_close(target, wanted)
        assert_same(shadow, target.bfloat16())


def test_under_autocast_and_compiled():
    q, k, queue = unit(64, 128).requires_grad_(), unit(64, 128), unit(4096, 128)
    compiles(lambda q, k, queue: info_nce(q, k, queue, 0.2), q, k, queue)
    qkv = noise(2, 50, 3, 4, 64).requires_grad_()
    compiles(lambda qkv: attention(*qkv.unbind(2)), qkv)
    for scope in (contextlib.nullcontext(), torch.autocast("cuda", torch.bfloat16)):
        with scope:
            assert info_nce(q, k, queue, 0.2).loss.dtype == torch.float32


def test_memory_does_not_grow_with_the_queue():
    """O(B·D) and partial results of a card's size, where plain torch makes logits of 268 MB."""
    q, k, queue = unit(256, 128).requires_grad_(), unit(256, 128), unit(262_144, 128)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    info_nce(q, k, queue, 0.2).loss.mean().backward()
    assert torch.cuda.max_memory_allocated() - before < 64e6


def test_a_second_stream_and_no_wait_for_the_host():
    """The ops run under torch's sync detector, which raises where the host would wait for the GPU."""
    q, k, queue = unit(64, 128).requires_grad_(), unit(64, 128), unit(4096, 128)
    ptr, mask_noise = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.rand(8, 196, device=DEVICE)
    info_nce(q, k, queue, 0.2).loss.mean().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            info_nce(q, k, queue, 0.2).loss.mean().backward()
            enqueue_(queue, ptr, k)
            random_masking(mask_noise, 49)
    finally:
        torch.cuda.set_sync_debug_mode("default")
