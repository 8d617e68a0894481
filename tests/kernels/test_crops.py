"""The Triton kernels of `resized_crops_` in the interpreter: the bytes of plain torch, and of torch's own resizing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastssl.data import device
from fastssl.data.augmentation import Augmentation, View
from fastssl.data.source import open_source
from fastssl.kernels import crops as kernels
from fastssl.ops import crops, dispatch, resized_crops_
from tests.kernels.interpreter import triton_on_cpu, watch
from tests.support import kernel_model as model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")

both = pytest.mark.parametrize("interpolation", crops.MODES)


def rgb(height, width):
    return torch.randint(256, (height, width, 3), dtype=torch.uint8)


def yuv(height, width):
    return torch.randint(256, (height * 3 // 2, width), dtype=torch.uint8)


def check(images, windows, size, interpolation):
    """The kernels' crops, after a check that they are those of plain torch to the bit."""
    windows = torch.tensor(windows)
    found = torch.full((len(images), 3, *size), 77, dtype=torch.uint8)
    expected = found.clone()
    with triton_on_cpu({f"images[{i}]": image for i, image in enumerate(images)}) as seen:
        assert resized_crops_(found, images, windows, interpolation) is found
    assert [name for name, _ in seen.launches] == ["crop_weights_kernel", "crop_rows_kernel", "crop_columns_kernel"]
    with dispatch.reference():
        resized_crops_(expected, images, windows, interpolation)
    assert torch.equal(found, expected)
    return found, seen


@both
@pytest.mark.parametrize("size", [(5, 9), (20, 13)], ids=str)
def test_bytes_of_a_ragged_batch(size, interpolation):
    """RGB and planes side by side, windows of odd places and sizes, larger and smaller than the crop."""
    images = [rgb(20, 31), yuv(18, 26), rgb(7, 9), yuv(40, 12), rgb(33, 33)[:, 3:20], yuv(2, 2)]
    windows = [[1, 2, 17, 25], [3, 5, 11, 13], [0, 0, 7, 9], [1, 1, 38, 10], [4, 3, 20, 11], [1, 1, 1, 1]]
    found, _ = check(images, windows, size, interpolation)
    for image, (top, left, height, width), crop in zip(images, windows, found):
        if image.ndim == 3 and interpolation != "lanczos":  # torch lacks it
            window = image.permute(2, 0, 1)[None, :, top : top + height, left : left + width]
            assert torch.equal(F.interpolate(window, size, mode=interpolation, antialias=True)[0], crop)


@both
def test_every_scale(interpolation):
    """From a window of one pixel to one of 30 times the crop; at some scales a kernel ends between two pixels."""
    image = rgb(4, 90)
    widths = [1, 2, 3, 4, 5, 7, 15, 31, 90]
    check([image] * len(widths), [[1, 90 - w, 3, w] for w in widths], (3, 3), interpolation)


@both
def test_windows_that_begin_and_end_inside_of_pixels(interpolation):
    """As in an image that was reduced by 2, 4 or 8 when it was decoded."""
    images, kernel, size = [rgb(12, 15), yuv(12, 14), rgb(3, 3), rgb(9, 9)], crops.MODES.index(interpolation), (7, 8)
    windows = [[1.125, 2.5, 9.75, 11.875], [0.25, 3.875, 11.5, 8.0], [1.5, 0.5, 1.0, 2.5], [0.7, 0.1, 1.3 + 1e-9, 2.9]]
    found, expected = (torch.zeros(4, 3, *size, dtype=torch.uint8) for _ in range(2))
    with watch({f"images[{i}]": image for i, image in enumerate(images)}):
        kernels.resized_crops_(found, images, torch.tensor(windows, dtype=torch.float64), kernel)
    for image, window, crop in zip(images, windows, expected):
        if image.ndim == 3:
            crop.copy_(crops.resample_plane(image.permute(2, 0, 1), window, size, kernel))
        else:
            halves = [number / 2 for number in window]
            parts = zip(crops.planes_of(image), (window, halves, halves))
            crop.copy_(crops.rgb_of_ycbcr(*(crops.resample_plane(plane, w, size, kernel) for plane, w in parts)))
    assert torch.equal(found, expected)


@both
def test_extreme_values(interpolation):
    """Checks of black and white: the cubic goes below 0 and above 255, and colours leave the range of bytes."""
    checks = (torch.arange(12)[:, None] // 2 + torch.arange(18) // 3) % 2 * 255
    planes = torch.randint(2, (18, 18), dtype=torch.uint8) * 255
    found, _ = check([checks[..., None].repeat(1, 1, 3).byte(), planes], [[0, 0, 12, 18]] * 2, (7, 20), interpolation)
    assert (found == 0).any() and (found == 255).any()


def test_several_blocks_and_one_image_in_memory():
    """As the loader calls it: views of one flat buffer, crops that several programs make, a part of a larger batch."""
    flat, batch = torch.randint(256, (40 * 50 * 3 + 61 * 8 * 3,), dtype=torch.uint8), torch.zeros(4, 3, 12, 150).byte()
    images = [flat[: 40 * 50 * 3].view(40, 50, 3), flat[40 * 50 * 3 :].view(61, 8, 3)]
    windows, batch = torch.tensor([[2, 3, 30, 40], [5, 0, 50, 8]]), batch
    with triton_on_cpu({"flat": flat}):
        resized_crops_(batch[1:3], images, windows)
    expected = torch.zeros_like(batch[1:3])
    with dispatch.reference():
        resized_crops_(expected, images, windows)
    assert torch.equal(batch[1:3], expected) and not batch[::3].any()


def test_windows_outside_of_their_image_are_refused_before_anything_is_written():
    images, out = [rgb(5, 6), yuv(4, 6)], torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    for wrong in ([0, 0, 5, 6], [-1, 0, 2, 2], [0, 0, 0, 2], [0, 5, 2, 2]):
        sentence = (
            rf"^resized_crops_: windows\[1\] must be inside its image of 4×6 pixels.*got \[{wrong[0]}, {wrong[1]}"
        )
        with triton_on_cpu(), pytest.raises(RuntimeError, match=sentence):
            resized_crops_(out, images, torch.tensor([[0, 0, 5, 6], wrong]))
    with triton_on_cpu(), pytest.raises(RuntimeError, match=r"windows\[0\] must be inside"):
        resized_crops_(out, images, torch.tensor([[0, torch.nan, 2, 2], [0, 0, 2, 2]], dtype=torch.float64))
    assert not out.any()
    with triton_on_cpu() as seen:
        resized_crops_(out[:0], [], torch.zeros(0, 4, dtype=torch.int64))
    assert not seen.launches


@both
def test_bytes_are_those_of_the_model(interpolation):
    """Each pixel of a window is loaded once for each weight, and from memory once."""
    images, windows = [rgb(24, 30), rgb(20, 20)], [[2, 2, 20, 24], [0, 0, 20, 20]]
    _, seen = check(images, windows, (8, 8), interpolation)
    counted = model.resized_crops_([(20, 24), (20, 20)], (8, 8), crops.MODES.index(interpolation))
    pixels = ("crop_rows_kernel.memory_ptr", "crop_rows_kernel.images[1]")
    scratch = ("crop_rows_kernel.scratch_ptr", "crop_columns_kernel.scratch_ptr", "crop_columns_kernel.out_ptr")
    assert sum(seen.distinct[name] for name in (*pixels, *scratch)) == counted.moved
    assert sum(seen.requested[name] for name in (*pixels, *scratch)) <= counted.requested


def test_the_plan_gives_each_plane_its_own_scratch_memory():
    images = [rgb(20, 30), yuv(20, 30)]
    windows = torch.tensor([[0, 0, 10, 12], [1, 1, 10, 12]])
    axes, planes, table, weights, scratch = kernels.plan(images, windows, (4, 5), 0)
    assert planes[:, 4:6].tolist() == [[3, 10], [1, 10], [2, 6]]
    assert planes[:, 7].tolist() == [0, 30, 40] and scratch == 30 + 10 + 12
    assert table[:, 1:4].tolist() == [[0, 10, 20], [30, 40, 46]]
    assert weights == int((axes[:, 4] * axes[:, 3]).sum())
    assert axes[4:, 0].view(torch.float64).tolist() == [0.5, 0.5] and axes[4:, 2].tolist() == [7, 6]


def test_views_of_the_engine_that_crops_on_the_device():
    """What it does with a batch of decoded images, in the interpreter: crops to the bit, colours within rounding."""
    source = open_source("shapes:count=4,size=32")
    view = View((12, 16), crop=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), blur_p=0.5, solarize_p=0.3, flip_p=0.5)
    augmentation = Augmentation((view, View((9, 9))))
    engine = device.Engine(
        source, augmentation, 0, workers=0, device=torch.device("cpu"), fill_in=True, batch_size=len(source)
    )
    decoded = device.decode_batch(source, augmentation, 0, 0, np.arange(4), True)
    expected = engine._make_views(decoded).views
    with triton_on_cpu({"memory": decoded.memory}) as seen:
        found = engine._make_views(decoded).views
    names = {name for name, _ in seen.launches}
    assert {"crop_weights_kernel", "crop_rows_kernel", "crop_columns_kernel", "augment_kernel"} <= names
    off = [(a.int() - b.int()).abs() for a, b in zip(found, expected)]
    assert not off[1].any() and (off[0] > 1).float().mean() < 2e-3 and (off[0] > 0).float().mean() < 1e-2
