import itertools

import pytest
import torch

from fastssl.kernels import queue as kernels
from fastssl.kernels import tile
from fastssl.ops import dispatch, enqueue_
from fastssl.ops import queue as module
from tests.kernels.contract import launched
from tests.kernels.interpreter import triton_on_cpu, watch
from tests.support import kernel_model as model
from tests.support.close import assert_same
from tests.support.contract import sparse

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def check(queue, start, keys):
    """Compares queue and pointer with those of plain torch."""
    queues, pointers = [queue.clone(), queue], [torch.tensor([start]), torch.tensor([start])]
    with dispatch.reference():
        module._enqueue_(queues[0], pointers[0], keys)
    with watch():
        kernels.enqueue_(queues[1], pointers[1], keys)
    assert_same(queues[1], queues[0], "queue")
    assert pointers[1].tolist() == pointers[0].tolist()


@pytest.mark.parametrize("width", [1, 7, 33, 130, 192])
@pytest.mark.parametrize(("length", "arriving"), [(1, 5), (13, 4), (13, 13), (16, 9), (63, 100), (9, 0)])
def test_the_queue_wraps(length, arriving, width):
    """With the pointer at its start, middle and end; more keys than fit; none."""
    for start in {0, length // 2, length - 1}:
        queue = torch.randn(length, width)
        before, keys = queue.clone(), torch.randn(arriving, width)
        check(queue, start, keys)
        for i in range(arriving):
            before[(start + i) % length] = keys[i]
        assert torch.equal(queue, before)


@pytest.mark.parametrize("start", [-1, -16, -17, -40, 16, 50, 2**62, -(2**62)])
def test_a_pointer_out_of_range_wraps(start):
    check(torch.randn(16, 5), start, torch.randn(9, 5))
    check(torch.randn(16, 5), start, torch.randn(16, 5))
    check(torch.randn(16, 5), start, torch.randn(23, 5))


def test_mixed_dtypes():
    """float64 to 16 bits is rounded through float32, as torch does: these values differ from direct rounding."""
    near = 2.0**-30 * torch.arange(-3, 4).double()
    keys = torch.cat([1 + 2.0**-8 + near, 1 + 2.0**-11 + near, torch.tensor([1e30, -1e-30, 7.0])])
    for queue, given in itertools.product(DTYPES, DTYPES):
        check(torch.randn(7, 17).to(queue), 5, keys.expand(4, 17).to(given))


def test_any_strides():
    keys = torch.randn(9, 6)
    for layout in (keys.T.contiguous().T, keys[:, ::2].repeat(1, 2), keys[:1].expand(9, 6), keys[:, :1].expand(9, 6)):
        check(torch.randn(7, 20)[:, 3:9], 4, layout)
        check(torch.randn(20, 6)[::2], 4, layout)
    check(torch.randn(8, 2)[:, 1:], 4, torch.randn(2, 5).T[:, 1:])


def test_offsets_beyond_31_bits():
    """Rows of queue and keys times a stride that fits 32 bits, so that the offset does not."""
    far, rows = sparse((4, 4), (2**30, 1), torch.float16), torch.randn(4, 4).half()
    keys = sparse((4, 4), (2**30, 1), torch.float16).copy_(rows)
    pointer = torch.tensor([3])
    with watch():
        kernels.enqueue_(far, pointer, keys)
    assert torch.equal(far, rows[[1, 2, 3, 0]]) and pointer.item() == 3


def test_public_op():
    queue, ptr, keys = torch.randn(16, 33), torch.tensor([12]), torch.randn(9, 33)
    expected, moved = queue.clone(), ptr.clone()
    with dispatch.reference():
        enqueue_(expected, moved, keys)
    version = queue._version
    with triton_on_cpu() as seen:
        enqueue_(queue, ptr, keys)
    assert torch.equal(queue, expected) and torch.equal(ptr, moved) and queue._version > version
    # Two launches: in one, some programs would read the pointer after it moved.
    assert [kernel for kernel, _ in seen.launches] == ["enqueue_kernel", "advance_pointer_kernel"]


@pytest.mark.parametrize("arch", tile.ARCHITECTURES)
def test_every_configuration(arch):
    with tile.assume_card(arch):
        check(torch.randn(50, 130).bfloat16(), 41, torch.randn(37, 130))


@pytest.mark.parametrize("sizes", [(64, 33, 20), (10, 128, 37), (64, 600, 9), (8, 4, 0)])
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_bytes_are_those_of_the_model(sizes, arch):
    K, D, N = sizes
    for queue, keys in ((torch.float32, torch.float32), (torch.bfloat16, torch.float64)):
        args = torch.randn(K, D).to(queue), torch.tensor([5]), torch.randn(N, D).to(keys)
        with tile.assume_card(arch):
            _, count = launched(lambda *args: [kernels.enqueue_(*args)], *args)
        assert count == model.enqueue_(K, D, N, queue.itemsize, keys.itemsize, arch).requested


@pytest.mark.parametrize("arch", tile.ARCHITECTURES)
def test_bytes_are_near_the_least_in_moco(arch):
    for queue, keys in ((4, 4), (2, 2), (2, 4)):
        counted = model.enqueue_(65536, 128, 256, queue, keys, arch)
        assert counted.least <= counted.moved <= 1.1 * counted.least


def test_bytes_of_ema_update():
    assert model.ema_update_(10, 4)[:3] == (120, 120, 120)
    assert model.ema_update_(10, 2, 2)[:3] == (120, 120, 120)
