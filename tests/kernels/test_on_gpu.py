"""The public ops on a GPU, compared with float64 and plain torch: the interpreter has no races between warps, no tensor
cores and no full sizes."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import (
    Running,
    attention,
    augment_,
    batch_info_nce,
    batch_norm,
    bias_gelu,
    block_mask,
    dispatch,
    ema_update_,
    enqueue_,
    info_nce,
    keep_patches,
    keep_tokens,
    linear_cross_entropy,
    masked_patch_mse,
    normalise,
    nt_xent,
    pairwise_sigmoid,
    patchify,
    prototype_lse,
    random_masking,
    residual_norm,
    resized_crops_,
    restore_tokens,
    soft_cross_entropy,
    unpatchify,
)
from fastssl.ops.prototypes import PrototypeTargets
from tests.ops.test_augment import LAWS, bytes_of, distance, random_draws, truth
from tests.support.close import assert_as_exact_on_average, assert_same
from tests.support.contract import compiles, tensors_of

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


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
    """Bit-equal to plain torch (`exact`), or no larger error against float64. The same bits at a second call."""
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
@pytest.mark.parametrize("B, K, D", [(256, 65536, 128), (37, 4099, 100), (8, 40, 16), (64, 3000, 600)])
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
@pytest.mark.parametrize("B, M, D", [(1024, 4096, 512), (33, 70, 40), (64, 300, 600)])
def test_pairs(B, M, D, dtype):
    q, keys = unit(B, D, dtype=dtype).requires_grad_(), unit(M, D, dtype=dtype).requires_grad_()
    agrees(lambda q, keys: pairwise_sigmoid(q, keys, 10.0, -10.0, 7), q, keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "N, P, D, E, G",
    [(640, 4096, 256, 256, 2), (3771, 2048, 256, 384, None), (37, 4099, 100, 40, 3), (64, 300, 600, 64, None)],
)
def test_prototypes(N, P, D, E, G, dtype):
    student, weight = unit(N, D, dtype=dtype).requires_grad_(), unit(P, D, dtype=dtype).requires_grad_()
    M = N if G is None else 128
    teacher, teacher_weight = unit(M, E, dtype=dtype), unit(P, E, dtype=dtype)
    rows = None if G is None else torch.randint(-1, M, (N, G), device=DEVICE)
    centre = noise(P) / 10
    with dispatch.reference():
        row_offset = -prototype_lse(teacher, teacher_weight, 0.07, centre)

    def loss(student, weight, teacher, teacher_weight, row_offset, centre):
        return soft_cross_entropy(
            student, weight, 0.1, PrototypeTargets(teacher, teacher_weight, 0.07, row_offset, centre), rows
        )

    agrees(loss, student, weight, teacher, teacher_weight, row_offset, centre)
    for dim, offset in ((1, centre), (0, row_offset)):
        agrees(lambda x, w, o, dim=dim: prototype_lse(x, w, 0.07, o, dim), teacher, teacher_weight, offset)
    target = torch.randint(P, (N,), device=DEVICE)
    target[::5] = -100
    agrees(lambda x, w: linear_cross_entropy(x, w, 0.1, target), student, weight)


def test_memory_of_prototypes():
    """O((N + P)·D) and partial results by the size of the card; a matrix of logits alone is 0.99 GB in float32."""
    student, weight = unit(3771, 256, dtype=torch.bfloat16), unit(65_536, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        targets = PrototypeTargets(
            student, weight, 0.07, -prototype_lse(student, weight, 0.07), torch.zeros_like(weight[:, 0])
        )
    leaves = student.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    soft_cross_entropy(*leaves, 0.1, targets).mean().backward()
    assert torch.cuda.max_memory_allocated() - before < 250e6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "L, H, E", [(50, 12, 64), (65, 3, 32), (197, 16, 32), (197, 12, 64), (257, 4, 80), (512, 2, 64)]
)
def test_attention(L, H, E, dtype):
    if dtype.itemsize > 2 and E > 64:
        pytest.skip("goes to torch")
    qkv = noise(4, L, 3, H, E, dtype=dtype).requires_grad_()
    agrees(lambda qkv: attention(*qkv.unbind(2)), qkv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("L, E", [(197, 64), (50, 64), (197, 32)])
def test_attention_without_gradient(L, E, dtype):
    """Where cuDNN's forward pass runs on some cards."""
    agrees(lambda qkv: attention(*qkv.unbind(2)), noise(4, L, 3, 12, E, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("L, D", [(50, 768), (197, 512), (3, 5), (7, 100), (2, 16384)])
def test_residual_norm(L, D, dtype):
    x, delta = noise(16, L, D).requires_grad_(), noise(16, L, D).requires_grad_()
    weight, bias = noise(D).requires_grad_(), noise(D).requires_grad_()
    agrees(
        lambda x, d, w, b: residual_norm(x, d, w, b, dtype=x.dtype)[::-1],
        *(t.detach().to(dtype).requires_grad_() for t in (x, delta, weight, bias)),
    )
    agrees(lambda x, w, b: residual_norm(x, None, w, b)[1], x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K", [(256 * 50, 3072), (197, 2048), (3, 5), (1000, 100)])
def test_bias_gelu(M, K, dtype):
    agrees(lambda x, b: bias_gelu(x, b), noise(M, K, dtype=dtype).requires_grad_(), noise(K).requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, splits", [((16, 64, 56, 56), 4), ((8, 70, 13, 13), 1), ((64, 2048, 7, 7), 1)], ids=str)
def test_batch_norm(shape, splits, dtype):
    """Without the ReLU, whose gradient depends on rounding where the result is close to 0."""

    def function(x, weight, bias, residual):
        running = Running(torch.zeros_like(weight), torch.ones_like(weight), 0.1)
        return batch_norm(x, weight, bias, running, 1e-5, splits, False, residual)

    x, residual = (noise(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = noise(shape[1]).requires_grad_(), noise(shape[1]).requires_grad_()
    agrees(function, x.requires_grad_(), weight, bias, residual.requires_grad_())


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_augment(law):
    """Rounds another way than float64 no more often than plain torch, on any GPU, by one at most."""
    images, args = bytes_of(32, 3, 224, 160), random_draws(32)
    exact, result = truth(images, *args, law), images.to(DEVICE)
    augment_(result, *args, law)
    off = distance(result.cpu(), exact)
    assert off.max() <= 1 and (off > 0).sum() <= 3 + 1e-4 * off.numel()
    again = augment_(images.to(DEVICE), *args, law)
    assert_same(again, result, "the same call again")


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
            agrees(
                lambda p, x, ids, n=norm: masked_patch_mse(p, x.detach(), ids, 16, n),
                pred,
                layout.detach(),
                masking.ids_masked,
            )


@pytest.mark.parametrize("grid", [(14, 14), (37, 37), (64, 64), (3, 5)], ids=str)
def test_block_mask(grid):
    """The masks of the CPU, bit for bit: the exponential and the root of another library make no difference."""
    length = grid[0] * grid[1]
    seed, count = torch.randint(2**62, (2048,)), (torch.rand(2048, dtype=torch.float64) * length).floor()
    for options in ({"min_patches": 4, "max_patches": length / 2}, {"min_patches": max(1, length // 9), "stream": 3}):
        masks = block_mask(seed.to(DEVICE), count.to(DEVICE), grid, **options)
        assert torch.equal(masks.cpu(), block_mask(seed, count, grid, **options))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(224, 224), (96, 100), (7, 300)], ids=str)
def test_resized_crops(size, interpolation):
    """The bytes of a CPU: RGB and planes of 64 sizes, at scales from 1/10 to 10."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.randint(1, 450, (64, 2), generator=generator) * 2
    images = [
        torch.randint(256, (h * 3 // 2, w) if i % 3 else (h, w, 3)).byte() for i, (h, w) in enumerate(sides.tolist())
    ]
    corner = (torch.rand(64, 2) * sides).long()
    extent = (torch.rand(64, 2) * (sides - corner)).long() + 1
    windows = torch.cat([corner, torch.minimum(extent, sides - corner)], 1)
    out = torch.zeros(64, 3, *size, dtype=torch.uint8)
    found = resized_crops_(out.to(DEVICE), [image.to(DEVICE) for image in images], windows, interpolation)
    with dispatch.reference():
        assert_same(found.cpu(), resized_crops_(out, images, windows, interpolation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_normalise(dtype):
    pixels = torch.randint(256, (9, 3, 224, 225), dtype=torch.uint8)
    numbers = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    with dispatch.reference():
        expected = normalise(pixels, *numbers, dtype)
    assert_same(normalise(pixels.to(DEVICE), *numbers, dtype).cpu(), expected)


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
    """O(B·D) and partial results by the size of the card; plain torch makes logits of 268 MB."""
    q, k, queue = unit(256, 128).requires_grad_(), unit(256, 128), unit(262_144, 128)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    info_nce(q, k, queue, 0.2).loss.mean().backward()
    assert torch.cuda.max_memory_allocated() - before < 64e6


def test_strides_mixed_dtypes_and_empty_tensors():
    q, queue = unit(40, 18)[:, ::2].requires_grad_(), unit(100, 12)[::2, 3:]
    agrees(lambda q, k, queue: info_nce(q, k, queue, 0.2).loss, q, unit(9, 40).T, queue)
    wide = queue.double()
    agrees(lambda q, k, queue: info_nce(q, k, queue, 0.2).loss, q, unit(40, 9).bfloat16(), wide)
    heads_first = noise(2, 3, 50, 16).transpose(1, 2).requires_grad_()
    agrees(lambda q: attention(q, q, q).sum((0, 1)), heads_first)  # an expanded gradient
    agrees(lambda x: keep_tokens(x, torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)), noise(2, 5, 7), exact=True)
    assert info_nce(noise(0, 8), noise(0, 8), queue[:, :8], 0.2).loss.shape == (0,)


def every_op(q, k, queue, ptr, noises, x, images, targets, sources):
    """One call of each op; only the queue and the targets change."""
    masking = random_masking(noises, 49)
    seed, target = torch.arange(8, device=DEVICE), torch.arange(64, device=DEVICE)
    masked = block_mask(seed, seed * 20, (14, 14), 4)
    soft = PrototypeTargets(k, queue, 0.2, -prototype_lse(k, queue, 0.2), queue[:, 0])
    loss = soft_cross_entropy(q, queue, 0.2, soft).mean() + linear_cross_entropy(q, queue, 0.2, target).mean()
    loss = loss + info_nce(q, k, queue, 0.2).loss.mean() + batch_info_nce(q, k, 0.2).loss.mean()
    loss = loss + nt_xent(q, k, 0.2).mean()
    kept = keep_tokens(x, masking.ids_keep)
    restored = restore_tokens(kept, x[0, 0], masking.ids_restore, prefix=0)
    pixels = keep_patches(images, masking.ids_masked, 16)
    loss = loss + masked_patch_mse(pixels + 0.1, images, masking.ids_masked, 16, True)
    loss = loss + attention(*restored.reshape(8, 196, 3, 2, 32).unbind(2)).square().mean()
    (dq,) = torch.autograd.grad(loss, q)
    enqueue_(queue, ptr, k)
    ema_update_(targets, sources, 0.9)
    return [loss.detach(), dq, queue, ptr, masked, *targets]


def test_side_stream_without_synchronisation():
    """Under torch's sync debug mode, which raises if the host waits for the GPU; the same values on both streams."""
    q, k, queue, noises = (
        unit(64, 128).requires_grad_(),
        unit(64, 128),
        unit(4096, 128),
        torch.rand(8, 196, device=DEVICE),
    )
    x, images, source = noise(8, 196, 192), noise(8, 3, 224, 224), noise(1000)

    def state():
        return [
            q,
            k,
            queue.clone(),
            torch.zeros(1, dtype=torch.int64, device=DEVICE),
            noises,
            x,
            images,
            [source * 0],
            [source],
        ]

    first, second = state(), state()
    expected = every_op(*first)  # compiles, and makes the table of addresses
    every_op(*second)
    second[2].copy_(queue), second[3].zero_(), second[7][0].zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            results = every_op(*second)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for result, wanted in zip(results, expected, strict=True):
        assert_same(result, wanted)
