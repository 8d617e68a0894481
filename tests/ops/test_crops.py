import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastssl.ops import crops, dispatch, resized_crops_
from tests.support.close import assert_same
from tests.support.contract import opcheck, refused, rejects, sparse, torch_threads

every_mode = pytest.mark.parametrize("mode", crops.MODES)
torchs_modes = pytest.mark.parametrize("mode", crops.MODES[:2])
# (height, width) of the image, window, (h, w) of the result
CASES = {
    "the whole image": ((37, 53), (0, 0, 37, 53), (37, 53)),
    "down": ((90, 120), (7, 11, 70, 90), (31, 40)),
    "up": ((40, 60), (10, 20, 9, 13), (64, 130)),
    "down and up": ((90, 60), (1, 2, 80, 17), (20, 70)),
    "one pixel": ((20, 30), (19, 29, 1, 1), (33, 65)),
    "one row": ((20, 30), (5, 0, 1, 30), (3, 12)),
    "one column": ((20, 30), (0, 7, 20, 1), (12, 3)),
    "to one pixel": ((70, 300), (3, 5, 61, 290), (1, 1)),
    "strongly down": ((300, 400), (1, 1, 298, 397), (9, 21)),
    "the last columns": ((30, 40), (2, 33, 20, 7), (17, 16)),
    "an image of one pixel": ((2, 2), (1, 1, 1, 1), (5, 5)),
    "narrower than a vector": ((50, 4), (3, 0, 40, 3), (20, 20)),
    "as wide as two vectors": ((20, 200), (0, 50, 20, 150), (10, 128)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def bytes_of(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def photograph(height, width):
    """Smooth bytes [H, W, 3], of which neighbours differ little."""
    coarse = torch.rand(1, 3, 5, 6)
    values = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0]
    return values.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).contiguous()


def planes_of(image):
    """Planes [3·H/2, W] of an image [H, W, 3] by Pillow, colours averaged over 2 × 2 pixels."""
    luma, *chroma = Image.fromarray(image.numpy()).convert("YCbCr").split()
    parts = [np.asarray(luma), *(np.asarray(plane.reduce(2)) for plane in chroma)]
    return torch.from_numpy(np.concatenate([part.ravel() for part in parts]).reshape(-1, image.shape[1]))


def crop(images, windows, size, mode="bilinear"):
    out = torch.full((len(images), 3, *size), 77, dtype=torch.uint8)
    are_whole = all(isinstance(number, int) for window in windows for number in window)
    windows = torch.tensor(windows, dtype=torch.int64 if are_whole else torch.float64)
    assert resized_crops_(out, images, windows, mode) is out
    return out


def plain(images, windows, size, mode="bilinear"):
    with torch_threads(1), dispatch.reference():
        return crop(images, windows, size, mode)


def by_torch(image, window, size, mode):
    top, left, height, width = window
    cropped = image.permute(2, 0, 1)[None, :, top : top + height, left : left + width]
    if size[1] > 1:
        return F.interpolate(cropped, size, mode=mode, antialias=True)
    # torch's code without vector instructions is wrong for a single column, which therefore has a copy beside it
    column = F.interpolate(cropped, (height, 1), mode=mode, antialias=True)
    return F.interpolate(torch.cat([column] * 2, 3), (size[0], 2), mode=mode, antialias=True)[..., :1]


def by_pillow(image, window, size):
    """Along the rows, then along the columns: one call of Pillow 13 begins with the cheaper axis."""
    top, left, height, width = window
    rows = Image.fromarray(image.numpy()).resize(
        (size[1], image.shape[0]), Image.Resampling.LANCZOS, (left, 0, left + width, image.shape[0])
    )
    both = rows.resize(size[::-1], Image.Resampling.LANCZOS, (0, top, size[1], top + height))
    return torch.from_numpy(np.array(both)).permute(2, 0, 1)[None]


@every_case
@torchs_modes
def test_rgb_is_torchs_resampling_to_the_bit(case, mode):
    size, window, result = case
    image = bytes_of(*size, 3)
    expected = by_torch(image, window, result, mode)
    assert_same(crop([image], [window], result, mode), expected)
    assert_same(plain([image], [window], result, mode), expected)


@every_case
def test_lanczos_is_pillows_but_for_rounding(case):
    """Pillow's weights have more bits, 22 after the point; where an image is enlarged, the second pass has both."""
    size, window, result = case
    for image in (photograph(*size), bytes_of(*size, 3)):
        made = crop([image], [window], result, "lanczos")
        assert_same(made, plain([image], [window], result, "lanczos"))
        top, left, height, width = window
        box = image[top : top + height, left : left + width].contiguous()
        off = (made.int() - by_pillow(box, (0, 0, height, width), result).int()).abs()
        assert off.max() <= 2 and off.float().mean() < 0.02


def test_lanczos_inside_of_pixels_is_pillows_but_for_rounding():
    """Pillow's box may begin and end inside of pixels, too; it cuts the kernel at the image, not at the box."""
    image = photograph(64, 80)
    for window, size in (([0.5, 0.25, 63.5, 79.5], (30, 41)), ([0.0, 0.0, 63.25, 79.75], (90, 100))):
        inner = crop([image], [window], size, "lanczos")[..., 9:-9, 9:-9].int()
        off = (inner - by_pillow(image, window, size)[..., 9:-9, 9:-9].int()).abs()
        assert off.max() <= 2 and off.float().mean() < 0.02


def test_the_kernel_of_lanczos():
    """sinc(x) · sinc(x / 3) by NumPy, in double precision: weights are rounded to 2^-15 of the largest."""
    x = torch.linspace(0, 4, 4001, dtype=torch.float64)
    expected = np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)
    assert np.abs(crops._kernel(x, 2).numpy() - expected).max() < 1e-15


@every_case
@every_mode
def test_planes_are_the_formula_to_the_bit(case, mode):
    (height, width), window, result = case
    image = bytes_of((height + 1) // 2 * 3, (width + 1) // 2 * 2)
    assert_same(crop([image], [window], result, mode), plain([image], [window], result, mode))


def drawn_window(n, height, width):
    h, w = n.choice([1, n.randint(1, height), height]), n.choice([1, n.randint(1, width), width])
    return [n.randint(0, height - h), n.randint(0, width - w), h, w]


@pytest.mark.parametrize("kind", ["rgb", "planes"])
@every_mode
def test_sizes_and_windows_of_all_kinds(kind, mode, seed):
    n = random.Random(seed)
    for _ in range(60):
        height, width = (2 * n.randint(1, n.choice([4, 12, 60])) for _ in range(2))
        images = [bytes_of(height, width, 3) if kind == "rgb" else bytes_of(height // 2 * 3, width)] * 2
        windows, size = [drawn_window(n, height, width) for _ in images], (n.randint(1, 80), n.randint(1, 150))
        made, what = crop(images, windows, size, mode), f"{height}×{width}, {windows} to {size}"
        if kind == "planes" or mode == "lanczos":
            assert_same(made, plain(images, windows, size, mode), what)
        else:
            assert_same(made, torch.cat([by_torch(images[0], w, size, mode) for w in windows]), what)


@pytest.mark.exhaustive
@torchs_modes
def test_every_size_up_to_40(mode):
    row = bytes_of(40, 4, 3)
    for length in range(1, 41):
        for size in range(1, 41):
            window = [40 - length, 1, length, 3]
            assert_same(crop([row], [window], (size, 2), mode), by_torch(row, window, (size, 2), mode))
            turned = row.transpose(0, 1).contiguous()
            window = [1, 40 - length, 3, length]
            assert_same(crop([turned], [window], (2, size), mode), by_torch(turned, window, (2, size), mode))


@pytest.mark.parametrize("offset", [0, 0.5])
@every_mode
def test_weights_are_the_kernel_and_add_up_to_one(offset, mode):
    """In float64, beside an integral over the kernel's formula: halves of pixels move the centres, nothing else."""
    length, size = 23.5, 10
    weights, bits = crops.axis_weights(offset, length, size, crops.MODES.index(mode))
    assert weights.shape == (10, 24)
    assert weights.max() < 2**15 <= 2 * weights.max() + 2
    assert (weights.sum(1) / 2**bits - 1).abs().max() < 24 / 2**bits
    centres = (weights * (torch.arange(24) + 0.5)).sum(1) / weights.sum(1)
    expected = offset + length / size * (torch.arange(10) + 0.5)
    assert (centres - expected)[3:-3].abs().max() < 0.05  # in the middle, where the window cuts no kernel


def test_a_constant_stays_constant():
    for value in (0, 1, 128, 254, 255):
        for size in ((7, 9), (90, 200)):
            made = crop([torch.full((41, 67, 3), value, dtype=torch.uint8)], [[2, 3, 37, 59]], size, "bicubic")
            assert (made == value).all()


@every_mode
def test_planes_of_a_photograph_are_close_to_its_rgb(mode):
    """The same window of both; colours have half the resolution, and are rounded once more."""
    image = photograph(120, 160)
    for window, size in (([10, 21, 90, 101], (48, 64)), ([11, 20, 31, 37], (96, 96)), ([0, 0, 120, 160], (30, 40))):
        made, expected = (crop([x], [window], size, mode)[0].int() for x in (planes_of(image), image))
        off = (made - expected).abs()
        assert off.float().mean() < 1.2, (window, off.float().mean())
        assert off.max() <= 12, (window, off.max())


def test_odd_windows_of_planes_are_not_shifted():
    """A vertical edge in colour alone: its place in the result follows the window to half a pixel of colour."""
    planes = torch.full((48 // 2 * 3, 64), 128, dtype=torch.uint8)
    _, _, v = crops.planes_of(planes)
    v[:, 16:] = 200  # from luma column 32 on
    places = []
    for left in (8, 9, 10, 11):
        red = crop([planes], [[3, left, 40, 48]], (40, 48))[0, 0, 20].float()
        places.append(left + ((red.max() - red) / (red.max() - red.min())).sum().item())
    assert max(places) - min(places) < 0.05, places
    assert abs(places[0] - 32) < 0.05


def test_yuv_to_rgb_is_pillows_conversion():
    """Colours at the size of the planes: the integers of libjpeg."""
    levels = torch.tensor([0, 1, 2, 63, 64, 100, 127, 128, 129, 130, 191, 254, 255], dtype=torch.uint8)
    y, u, v = (x.reshape(-1) for x in torch.meshgrid(levels, levels, levels, indexing="ij"))
    count = len(y)
    # near another colour the result is a mean of both: each has 12 columns, of which one is compared
    wide = torch.cat([y[:, None].repeat(1, 12).view(-1).repeat(2), *(x[:, None].repeat(1, 6).view(-1) for x in (u, v))])
    made = crop([wide.view(3, 12 * count)], [[0, 0, 2, 12 * count]], (2, 12 * count))[0, :, 0, 5::12]
    colours = Image.merge("YCbCr", [Image.fromarray(x.numpy()[None]) for x in (y, u, v)]).convert("RGB")
    expected = torch.from_numpy(np.array(colours))[0].T
    assert (made.int() - expected.int()).abs().max() <= 1  # Pillow's own tables round some values otherwise
    assert_same(made, crops.rgb_of_ycbcr(y[None], u[None], v[None])[:, 0])


def test_images_of_different_sizes_and_kinds_in_one_call():
    images = [bytes_of(40, 50, 3), bytes_of(30, 44), bytes_of(200, 9, 3), bytes_of(3, 2)]
    windows = [[3, 4, 30, 40], [1, 3, 17, 19], [0, 0, 200, 9], [0, 1, 1, 1]]
    together = crop(images, windows, (24, 33))
    for b in range(4):
        assert_same(crop(images[b : b + 1], windows[b : b + 1], (24, 33)), together[b : b + 1])


def test_several_windows_of_one_image():
    image, windows = bytes_of(60, 70, 3), [[0, 0, 60, 70], [5, 6, 20, 30], [30, 1, 29, 60]]
    expected = torch.cat([by_torch(image, window, (32, 32), "bicubic") for window in windows])
    assert_same(crop([image] * 3, windows, (32, 32), "bicubic"), expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[3:, 5:-2],
        lambda x: x[::2],
        lambda x: x[:, ::2],
        lambda x: x.transpose(0, 1),
        lambda x: x.flip(2),
        lambda x: x[:1].expand_as(x),
        lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ],
    ids=["window", "every other row", "every other column", "turned", "flipped", "one row", "planes in memory"],
)
def test_images_of_any_strides(view):
    image = view(bytes_of(40, 60, 3))
    window = [2, 3, image.shape[0] - 4, image.shape[1] - 5]
    assert_same(crop([image], [window], (20, 30)), by_torch(image, window, (20, 30), "bilinear"))
    planes = bytes_of(60, 80)[:, 10:50]
    assert_same(crop([planes], [[1, 1, 20, 20]], (9, 9)), crop([planes.clone()], [[1, 1, 20, 20]], (9, 9)))


def test_rows_of_a_larger_batch():
    store = bytes_of(7, 3, 20, 30)
    untouched, image = store.clone(), bytes_of(50, 60, 3)
    rows = store[1::3]
    resized_crops_(rows, [image, image], torch.tensor([[0, 0, 50, 60], [9, 8, 7, 6]]), "bilinear")
    assert_same(store[1:2], by_torch(image, (0, 0, 50, 60), (20, 30), "bilinear"))
    assert_same(store[4:5], by_torch(image, (9, 8, 7, 6), (20, 30), "bilinear"))
    for row in (0, 2, 3, 5, 6):
        assert_same(store[row], untouched[row])


def test_windows_of_any_strides():
    image, windows = bytes_of(40, 50, 3), torch.tensor([[3, 4, 30, 40], [0, 0, 9, 10]])
    spread = torch.stack([windows, windows + 1000], -1)[..., 0]
    out, expected = (torch.zeros(2, 3, 8, 9, dtype=torch.uint8) for _ in range(2))
    resized_crops_(out, [image] * 2, spread)
    assert_same(out, resized_crops_(expected, [image] * 2, windows))


def test_offsets_beyond_32_bits():
    image = sparse((3, 20, 3), (2**33, 3, 1), torch.uint8)
    image.copy_(bytes_of(3, 20, 3))
    window = (0, 2, 3, 17)
    assert_same(crop([image], [window], (5, 9)), by_torch(image.clone(), window, (5, 9), "bilinear"))


@every_mode
def test_the_same_on_one_thread_and_on_two(mode):
    images = [bytes_of(90, 120, 3), bytes_of(90, 120)] * 20
    windows, results = [drawn_window(random.Random(i), 60, 120) for i in range(40)], []
    for threads in (1, 2):
        with torch_threads(threads):
            results.append(crop(images, windows, (40, 56), mode))
    assert_same(*results)


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (1, 3, 0, 5), (1, 3, 5, 0)], ids=str)
def test_empty(shape):
    out = bytes_of(*shape)
    windows = torch.tensor([[0, 0, 4, 4]] * shape[0], dtype=torch.int64).view(-1, 4)
    assert resized_crops_(out, [bytes_of(4, 4, 3)] * shape[0], windows) is out


def test_contract():
    windows = torch.tensor([[1, 2, 7, 6], [3, 3, 4, 5]])
    for kernel in range(3):
        out = torch.zeros(2, 3, 6, 7, dtype=torch.uint8)
        opcheck(crops._resized_crops_, out, [bytes_of(9, 8, 3), bytes_of(12, 10)], windows, kernel)


def test_it_compiles():
    def step(out, image, windows):
        return resized_crops_(out, [image, image], windows).float() / 255

    image, windows = bytes_of(40, 30, 3), torch.tensor([[1, 2, 30, 20], [0, 0, 9, 9]])
    out = torch.zeros(2, 3, 8, 9, dtype=torch.uint8)
    eager = step(out.clone(), image, windows)
    assert_same(torch.compile(step, fullgraph=True, backend="aot_eager")(out, image, windows), eager)
    assert_same(out.float() / 255, eager)


def test_error_sentences():
    out, image, windows = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), bytes_of(10, 12, 3), torch.tensor([[0, 0, 5, 5]])
    good = {"out": out, "images": [image], "windows": windows, "interpolation": "bilinear"}

    def refuses(sentence, error, **changed):
        refused(f"resized_crops_: {sentence}", error, resized_crops_, **(good | changed))

    refuses("out must have shape [B, 3, h, w], got [1, 4, 4]", ValueError, out=out[:, 0])
    refuses("out must be uint8, got float32", TypeError, out=out.float())
    refuses("images must be a list of tensors, got Tensor", TypeError, images=image)
    refuses("images must hold 1 tensors like out, got 2", ValueError, images=[image] * 2)
    refuses("images[0] must be a tensor, got ndarray", TypeError, images=[image.numpy()])
    refuses("images[0] must be uint8, got float32", TypeError, images=[image.float()])
    expected = "images[0] must be RGB [H, W, 3], or planes [3·H/2, W] of 4:2:0 with even H and W, got"
    refuses(f"{expected} [3, 10, 12]", ValueError, images=[bytes_of(3, 10, 12)])
    refuses(f"{expected} [10, 12]", ValueError, images=[bytes_of(10, 12)])
    refuses(f"{expected} [12, 11]", ValueError, images=[bytes_of(12, 11)])
    refuses("windows must have shape [B=1, 4], got [4]", ValueError, windows=windows[0])
    refuses("windows must be int64 or float64, got int32", TypeError, windows=windows.int())
    refuses("interpolation must be bilinear, bicubic or lanczos, got 'nearest'", ValueError, interpolation="nearest")
    strided = torch.zeros(1, 3, 4, 8, dtype=torch.uint8)[..., ::2]
    refuses(
        "out must have contiguous images that share no memory, got shape [1, 3, 4, 4] and strides [96, 32, 8, 2]",
        ValueError,
        out=strided,
    )
    rejects("resized_crops_", "out", "shape [2, 3, 4, 4] and strides [0, 16, 4, 1]", ValueError, resized_crops_,
            out.expand(2, 3, 4, 4), [image] * 2, windows.expand(2, 4))  # fmt: skip
    refused(
        "resized_crops_: images[0] must not share memory with out, got views of the same: pass images[0].clone()",
        ValueError,
        resized_crops_,
        image.view(-1)[:48].view(1, 3, 4, 4),
        [image],
        windows,
    )


@pytest.mark.parametrize("image", [bytes_of(10, 12, 3), bytes_of(15, 12)], ids=["rgb", "planes"])
@pytest.mark.parametrize(
    "window",
    [
        [-1, 0, 5, 5],
        [0, -1, 5, 5],
        [0, 0, 0, 5],
        [0, 0, 5, 0],
        [6, 0, 5, 5],
        [0, 8, 5, 5],
        [0, 0, 2**62, 5],
        [2**63 - 1, 0, 1, 1],
        [1, 1, -(2**63), 2],
    ],
    ids=str,
)
def test_windows_outside_their_image_are_refused_before_anything_is_written(image, window):
    out, windows = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([[0, 0, 5, 5], window])
    sentence = f"windows[1] must be inside its image of 10×12 pixels and have at least one, got {window}"
    for context in (torch_threads(1), dispatch.reference()):
        with context:
            refused(f"resized_crops_: {sentence}", RuntimeError, resized_crops_, out, [image] * 2, windows)
            assert not out.any()


def test_malformed_calls_of_the_op_itself_are_refused():
    """What the public function never passes on: nothing outside the arguments may be read."""
    out, image, windows = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), bytes_of(10, 12, 3), torch.tensor([[0, 0, 5, 5]])
    if not dispatch.has_kernel("resized_crops_", "cpu"):
        pytest.skip("needs the C++ kernel")
    for images in ([], [image[:, ::2]], [bytes_of(15, 24)[:, ::2]], [bytes_of(10, 12)], [image.int()]):
        with pytest.raises(RuntimeError, match=r"^resized_crops_: images"):
            crops._resized_crops_(out, images, windows, False)


@pytest.mark.parametrize("kind", ["rgb", "planes"])
@every_mode
def test_windows_that_begin_and_end_inside_of_pixels(kind, mode, seed):
    """As float64, up to the last bit before the end of the image; whole numbers give the bits of integers."""
    n = random.Random(seed)
    for _ in range(40):
        height, width = (2 * n.randint(1, 40) for _ in range(2))
        image = bytes_of(height, width, 3) if kind == "rgb" else bytes_of(height // 2 * 3, width)
        top, left = n.choice([0, n.uniform(0, height - 1)]), n.choice([n.uniform(0, width - 1), 0.1])
        h, w = (
            n.choice([height - top, n.uniform(1, height - top)]),
            n.choice([width - left, n.uniform(1, width - left)]),
        )
        size = (n.randint(1, 50), n.randint(1, 90))
        assert_same(crop([image], [[top, left, h, w]], size, mode), plain([image], [[top, left, h, w]], size, mode))
        whole = [int(top), int(left), int(h), int(w)]
        windows = torch.tensor([whole], dtype=torch.float64)
        out = torch.zeros(1, 3, *size, dtype=torch.uint8)
        assert_same(resized_crops_(out, [image], windows, mode), crop([image], [whole], size, mode))


def test_a_window_moves_its_pixels_by_parts_of_a_pixel():
    """A ramp, cut at its value: the crop begins where the window does."""
    ramp = torch.arange(100, dtype=torch.uint8)[None, :, None].expand(8, 100, 3).contiguous()
    for left in (10, 10.25, 10.5, 10.75):
        made = crop([ramp], [[1, left, 6, 60.0]], (6, 15))[0, 0, 3].float()
        expected = left + 4 * (torch.arange(15) + 0.5) - 0.5
        assert (made - expected)[1:-1].abs().max() <= 0.51


def test_windows_that_are_no_numbers_are_refused():
    out, image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), bytes_of(10, 12, 3)
    for bad in (float("nan"), float("inf"), -1e-9, 9.5, 1e300):
        for place in (0, 2):
            window = torch.tensor([[0.0, 0.0, 2.0, 2.0]], dtype=torch.float64)
            window[0, place] = bad if place == 0 or bad != 9.5 else 0.99
            with pytest.raises(RuntimeError, match=r"^resized_crops_: windows\[0\] must be inside its image of 10×12 "):
                resized_crops_(out, [image], window)
