"""The Triton kernel of `normalise` in the interpreter: the floats of plain torch, to the bit."""

import pytest
import torch

from fastssl.ops import dispatch, normalise
from tests.kernels.interpreter import triton_on_cpu
from tests.support import kernel_model as model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check(pixels, dtype):
    with triton_on_cpu() as seen:
        found = normalise(pixels, MEAN, STD, dtype)
    with dispatch.reference():
        assert torch.equal(found, normalise(pixels, MEAN, STD, dtype))
    assert found.dtype == dtype and found.is_contiguous()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_byte_of_every_channel(dtype):
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    seen = check(pixels, dtype)
    assert seen.bytes == model.normalise(pixels.numel(), dtype.itemsize).requested


def test_several_blocks_strides_and_no_images():
    images = torch.randint(256, (2, 3, 70, 66), dtype=torch.uint8)
    check(images, torch.float32)
    check(images.to(memory_format=torch.channels_last), torch.bfloat16)
    check(images[:, :, ::2, 1:], torch.float16)
    assert not check(images[:0], torch.float32).launches
    assert not check(images[:, :, :0], torch.float32).launches
