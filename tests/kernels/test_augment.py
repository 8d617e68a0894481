"""The Triton kernels of `augment_` in the interpreter: bytes of the formula in float64, as for the C++ kernel."""

import pytest
import torch

from fastssl.kernels import augment as kernels
from fastssl.ops import augment_, dispatch
from fastssl.ops.augment import TORCHVISION
from tests.kernels.interpreter import triton_on_cpu, watch
from tests.ops.test_augment import LAWS, bytes_of, distance, draws, random_draws, truth

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")

every_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


def check(images, *args, law=TORCHVISION):
    """At most one byte in a thousand, and one byte by one, rounds another way than in float64."""
    result = images.clone()
    with watch():
        kernels.augment_(result, *args, *law)
    off = distance(result, truth(images, *args, law))
    assert off.max() <= 1 and (off > 0).sum() <= 3 + 1e-3 * off.numel()
    return result


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (5, 3), (33, 17), (20, 70)], ids=str)
@every_law
def test_all_steps_are_the_formula(size, law):
    check(bytes_of(12, 3, *size), *random_draws(12), law=law)


@pytest.mark.parametrize("step", range(4), ids=["brightness", "contrast", "saturation", "hue"])
@every_law
def test_each_step_of_the_jitter(step, law):
    jitter = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(6, 1)
    jitter[:, step] = torch.linspace(-0.5, 0.5, 6) if step == 3 else torch.linspace(0, 2, 6)
    changed = check(bytes_of(1, 3, 9, 30).repeat(6, 1, 1, 1), *draws(6, jitter=jitter), law=law)
    assert len(changed.unique(dim=0)) >= 5  # half a turn of the hue is the same in both directions


@pytest.mark.parametrize("sigma", [0.1, 1.0, 7.0, 1e6])
@every_law
def test_blur_of_any_radius(sigma, law):
    check(bytes_of(3, 3, 9, 14), *draws(3, sigma=torch.tensor([sigma, 0.0, sigma]), flip=True), law=law)


def test_several_blocks_and_strides():
    images = bytes_of(2, 3, 40, 120)
    check(images.transpose(2, 3), *random_draws(2))
    wide = images.repeat_interleave(2, 3)
    kernels.augment_(wide[..., ::2], *draws(2, solarize=True), *TORCHVISION)
    assert torch.equal(wide[..., 1::2], images)  # pixels between the strides stay


def test_ties_round_to_even():
    images = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256).clone()
    expected = (images.float() * 0.5).round_().to(torch.uint8)
    assert torch.equal(check(images, *draws(1, jitter=(0.5, 1, 1, 0))), expected)


def test_public_op():
    images, args = bytes_of(4, 3, 12, 10), random_draws(4)
    expected, found = images.clone(), images.clone()
    with dispatch.reference():
        augment_(expected, *args)
    with triton_on_cpu() as seen:
        augment_(found, *args)
    assert "augment_kernel" in [kernel for kernel, _ in seen.launches]
    assert distance(found, expected).max() <= 1


def test_no_images_and_wrong_orders():
    kernels.augment_(bytes_of(0, 3, 4, 4), *draws(0), *TORCHVISION)
    kernels.augment_(bytes_of(2, 3, 0, 4), *draws(2), *TORCHVISION)
    with triton_on_cpu(), pytest.raises(RuntimeError, match="order must be between 0 and 3, got 4"):
        augment_(bytes_of(1, 3, 4, 4), *draws(1, order=(0, 1, 2, 4)))
