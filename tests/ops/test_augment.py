import itertools
import re

import pytest
import torch
import torchvision.transforms.v2.functional as F

from fastssl.ops import ColourLaw, augment, augment_, dispatch
from tests.support.close import assert_same
from tests.support.contract import opcheck, refused, sparse, torch_threads

ORDERS = torch.tensor(list(itertools.permutations(range(4))))
SIZES = [(1, 1), (1, 7), (6, 1), (5, 3), (8, 8), (33, 17), (20, 70), (224, 224)]
IDENTITY = (1.0, 1.0, 1.0, 0.0)
LAWS = {
    "torchvision": ColourLaw(),
    "moco v1": ColourLaw(grey_first=True),
    "byol": ColourLaw(additive=True, tensorflow=True),
    "simclr v2": ColourLaw(tensorflow=True),
    "all": ColourLaw(True, True, True),
}
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


def bytes_of(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def draws(batch, jitter=IDENTITY, order=(0, 1, 2, 3), grey=False, sigma=0.0, solarize=False, flip=False):
    """Parameters of augment_: a value for all images, or a tensor with one for each."""

    def column(value, dtype, *size):
        return torch.as_tensor(value, dtype=dtype).expand(batch, *size).clone()

    return (
        column(jitter, torch.float32, 4),
        column(order, torch.int64, 4),
        column(grey, torch.bool),
        column(sigma, torch.float32),
        column(solarize, torch.bool),
        column(flip, torch.bool),
    )


def random_draws(batch):
    """Random parameters that leave out each step for some images; strengths up to and beyond those of the methods."""
    strength = torch.tensor([2.0, 2.0, 2.0, 1.0]) * torch.rand(batch, 4) - torch.tensor([0.0, 0.0, 0.0, 0.5])
    jitter = torch.where(torch.rand(batch, 4) < 0.3, torch.tensor(IDENTITY), strength)
    order = ORDERS[torch.randint(0, 24, (batch,))]
    sigma = torch.where(torch.rand(batch) < 0.5, 0.1 + 1.9 * torch.rand(batch), 0)
    return jitter, order, torch.rand(batch) < 0.3, sigma, torch.rand(batch) < 0.3, torch.rand(batch) < 0.5


def truth(images, jitter, order, grey, sigma, solarize, flip, law=augment.TORCHVISION):
    """The formula in float64, rounded once."""
    result = images.clone()
    columns = (column.tolist() for column in (jitter, order, grey, sigma, solarize, flip))
    for image, factors, steps, is_grey, blur, inverted, mirrored in zip(result, *columns):
        values = augment.jitter_image(image.double(), factors, steps, is_grey, law)
        values = (augment.blur_image(values, blur, law) if blur > 0 else values).round()
        values = torch.where(values >= 128, 255 - values, values) if inverted else values
        image.copy_(values.flip(-1) if mirrored else values)
    return result


def distance(a, b):
    return (a.int() - b.int()).abs()


def assert_rounds_like_torch(images, *args):
    """Between two integers float32 may round the other way: no more often in the kernel than in plain torch."""
    with torch_threads(1), dispatch.reference():  # torch's many short ops are slower on two threads
        exact, plain = truth(images, *args), augment_(images.clone(), *args)
    result = images.clone()
    assert augment_(result, *args) is result
    off, plain_off = distance(result, exact), distance(plain, exact)
    assert off.max() <= 1, f"{int((off > 1).sum())} bytes of {off.numel()} are off by up to {int(off.max())}"
    allowed = int((plain_off > 0).sum()) + 3 + 2e-5 * off.numel()  # random images have about 1e-5 in either
    assert (off > 0).sum() <= allowed, f"{int((off > 0).sum())} bytes of {off.numel()} are off, {allowed:.0f} allowed"


@pytest.mark.parametrize("size", SIZES, ids=str)
@every_law
def test_all_steps_are_the_formula(size, law):
    batch = 6 if size == (224, 224) else 40
    assert_rounds_like_torch(bytes_of(batch, 3, *size), *random_draws(batch), law)


@every_law
def test_every_order(law):
    args = draws(24, jitter=(1.3, 0.6, 1.5, 0.2), order=ORDERS, grey=torch.arange(24) % 3 == 0)
    assert_rounds_like_torch(bytes_of(1, 3, 12, 21).repeat(24, 1, 1, 1), *args, law)
    assert len(truth(bytes_of(1, 3, 12, 21).repeat(24, 1, 1, 1), *args).unique(dim=0)) > 20  # orders do differ


@pytest.mark.parametrize("step", range(4), ids=["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("law", [LAWS["torchvision"], LAWS["byol"]], ids=["torchvision", "byol"])
def test_each_step_of_jitter_at_all_strengths(step, law):
    """Every value of a byte, and colours with two equal channels."""
    jitter = torch.tensor(IDENTITY).repeat(24, 1)
    jitter[:, step] = torch.linspace(-0.5, 0.5, 24) if step == 3 else torch.linspace(0, 2, 24)
    corners = torch.tensor(list(itertools.product((0, 1, 100, 254, 255), repeat=3)), dtype=torch.uint8)
    ramp = torch.arange(256, dtype=torch.uint8)
    pixels = torch.cat([corners.T, ramp.expand(3, -1), torch.stack([ramp, ramp.flip(0), ramp[torch.randperm(256)]])], 1)
    assert_rounds_like_torch(pixels[None, :, None].repeat(24, 1, 1, 1), *draws(24, jitter=jitter), law)


@pytest.mark.parametrize("sigma", [0.1, 0.34, 1 / 3, 1.0, 2.0, 7.0, 1e6])
@pytest.mark.parametrize("size", [(2, 40), (40, 2), (9, 64), (230, 5)], ids=str)
@pytest.mark.parametrize("law", [LAWS["torchvision"], LAWS["byol"]], ids=["torchvision", "byol"])
def test_blur_of_any_radius(size, sigma, law):
    assert_rounds_like_torch(bytes_of(4, 3, *size), *draws(4, sigma=sigma, grey=torch.tensor([True, False] * 2)), law)


def test_ties_round_to_even():
    images = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256).clone()
    expected = (images.float() * 0.5).round_().to(torch.uint8)
    assert_same(augment_(images, *draws(1, jitter=(0.5, 1, 1, 0))), expected)


def test_solarize_begins_at_128():
    images = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256).clone()
    expected = torch.where(images < 128, images, 255 - images)
    assert_same(augment_(images, *draws(1, solarize=True)), expected)


PHOTO = torch.linspace(0, 255, 37) + 40 * torch.sin(torch.arange(29.0))[:, None]
PHOTO = (PHOTO + torch.tensor([0, 30, -30])[:, None, None]).clamp(0, 255).to(torch.uint8)
# {step: (parameters, torchvision's function, largest difference by rounding)}. torchvision truncates to integers, and
# rounds luma to an integer.
TORCHVISION = {
    "brightness": (dict(jitter=(1.3, 1, 1, 0)), lambda x: F.adjust_brightness(x, 1.3), 1),
    "contrast": (dict(jitter=(1, 0.6, 1, 0)), lambda x: F.adjust_contrast(x, 0.6), 1 + 0.4),
    "saturation": (dict(jitter=(1, 1, 1.7, 0)), lambda x: F.adjust_saturation(x, 1.7), 1 + 0.7),
    "hue": (dict(jitter=(1, 1, 1, 0.2)), lambda x: F.adjust_hue(x, 0.2), 1),
    "hue back": (dict(jitter=(1, 1, 1, -0.4)), lambda x: F.adjust_hue(x, -0.4), 1),
    "grayscale": (dict(grey=True), lambda x: F.rgb_to_grayscale(x, 3), 1),
    "blur": (dict(sigma=1.2), lambda x: F.gaussian_blur(x, [9, 9], [1.2, 1.2]), 1),
    "solarize": (dict(solarize=True), lambda x: F.solarize(x, 128), 0),
    "flip": (dict(flip=True), lambda x: F.horizontal_flip(x), 0),
}


@pytest.mark.parametrize("case", TORCHVISION)
def test_steps_are_torchvisions_on_tensors(case):
    args, theirs, rounding = TORCHVISION[case]
    images = torch.stack([PHOTO, bytes_of(3, 29, 37)])
    expected = torch.stack([theirs(image) for image in images])
    off = distance(augment_(images, *draws(2, **args)), expected)
    assert off.max() <= rounding
    if case == "blur":  # which rounds as ours
        assert (off > 0).float().mean() < 1e-3


@pytest.mark.parametrize("case", [case for case in TORCHVISION if "hue" not in case and case != "blur"])
def test_steps_are_torchvisions_on_pillow_images(case):
    """Without hue, which Pillow holds in 8 bits, and blur, which is box filters in Pillow."""
    args, theirs, rounding = TORCHVISION[case]
    expected = F.pil_to_tensor(theirs(F.to_pil_image(PHOTO)))
    assert distance(augment_(PHOTO[None].clone(), *draws(1, **args))[0], expected).max() <= rounding


def test_identity_parameters_leave_the_images_unchanged():
    for order in ORDERS[::5]:
        images = bytes_of(3, 3, 9, 35)
        expected = images.clone()
        assert_same(augment_(images, *draws(3, order=order)), expected)
        assert_same(augment_(images, *draws(3, order=order), LAWS["all"]), expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:, :, 2:-3, 5:-1],
        lambda x: x[::2, :, ::3, ::2],
        lambda x: x.mT,
        lambda x: x[:, :, :, 7:8],
        lambda x: x.permute(2, 1, 0, 3),
    ],
    ids=["channels last", "window", "every other", "transposed", "one column", "rows as batch"],
)
@pytest.mark.parametrize("only_bytes", [False, True], ids=["all steps", "flip and solarize"])
def test_any_strides(view, only_bytes):
    store = bytes_of(8, 3, 20, 40)
    images, untouched = view(store), store.clone()
    batch = len(images)
    args = (
        draws(batch, solarize=torch.rand(batch) < 0.5, flip=torch.rand(batch) < 0.7)
        if only_bytes
        else random_draws(batch)
    )
    expected = augment_(images.clone(memory_format=torch.contiguous_format), *args)
    assert_same(augment_(images, *args), expected)
    if images._base is store:  # bytes outside the view keep their values
        images.copy_(view(untouched))
        assert_same(store, untouched)


def test_parameters_of_any_strides():
    images, args = bytes_of(6, 3, 10, 11), random_draws(6)
    spread = [torch.stack([column, column], -1)[..., 0] for column in args]
    assert not any(column.is_contiguous() for column in spread)
    assert_same(augment_(images.clone(), *spread), augment_(images, *args))


def test_offsets_beyond_32_bits():
    images = sparse((2, 3, 2, 2), (2**32 + 8, 2**30, 9, 3), torch.uint8)
    images.copy_(bytes_of(2, 3, 2, 2))
    args = draws(2, jitter=(0.7, 0.8, 1.2, 0.1), sigma=1.0, flip=True)
    expected = augment_(images.clone(memory_format=torch.contiguous_format), *args)
    assert_same(augment_(images, *args), expected)


@pytest.mark.parametrize("size", [(9, 35), (128, 96)], ids=str)
def test_the_same_on_one_thread_and_on_two(size):
    images, args = bytes_of(61, 3, *size), random_draws(61)
    results = []
    for threads in (1, 2):
        with torch_threads(threads):
            results.append(augment_(images.clone(), *args))
    assert_same(*results)


def test_an_image_does_not_depend_on_its_batch():
    images, args = bytes_of(10, 3, 13, 40), random_draws(10)
    together = augment_(images.clone(), *args)
    for b in range(10):
        assert_same(augment_(images[b : b + 1].clone(), *(column[b : b + 1] for column in args)), together[b : b + 1])


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 3, 0, 5), (2, 3, 5, 0)], ids=str)
def test_empty(shape):
    images = bytes_of(*shape)
    assert augment_(images, *draws(shape[0], jitter=(1.2, 1, 1, 0))) is images


def test_contract():
    for law in LAWS.values():
        opcheck(augment._augment_, bytes_of(3, 3, 5, 6), *random_draws(3), *law)


def test_it_compiles():
    def step(images, *args):
        return augment_(images, *args).float() / 255

    images, args = bytes_of(4, 3, 8, 9), random_draws(4)
    eager = step(images.clone(), *args)
    assert_same(torch.compile(step, fullgraph=True, backend="aot_eager")(images, *args), eager)
    assert_same(images.float() / 255, eager)


def test_error_sentences():
    x = bytes_of(2, 3, 4, 4)
    names = ("jitter", "order", "grey", "sigma", "solarize", "flip")

    def refuses(sentence, error, images=x, **changed):
        args = dict(zip(names, draws(2))) | changed
        refused(f"augment_: {sentence}", error, augment_, images, *args.values())

    refuses("images must have shape [B, 3, H, W], got [2, 4, 4]", ValueError, x[:, 0])
    refuses("images must have shape [B, 3, H, W], got [2, 1, 4, 4]", ValueError, x[:, :1])
    refuses("images must be uint8, got float32", TypeError, x.float())
    refuses("jitter must have shape [B=2, 4], got [2, 3]", ValueError, jitter=torch.ones(2, 3))
    refuses("jitter must be float32, got float64", TypeError, jitter=torch.ones(2, 4).double())
    refuses("order must have shape [B=2, 4], got [3, 4]", ValueError, order=torch.zeros(3, 4).long())
    refuses("order must be int64, got int32", TypeError, order=torch.zeros(2, 4).int())
    refuses("sigma must have shape [B=2], got [2, 1]", ValueError, sigma=torch.zeros(2, 1))
    refuses("sigma must be float32, got float64", TypeError, sigma=torch.zeros(2).double())
    for name in ("grey", "solarize", "flip"):
        refuses(f"{name} must have shape [B=2], got [1]", ValueError, **{name: torch.zeros(1).bool()})
        refuses(f"{name} must be bool, got uint8", TypeError, **{name: torch.zeros(2).byte()})
    refuses("flip must be a tensor of shape [B], got bool", TypeError, flip=True)
    for law, got in ((True, "True"), ("byol", "'byol'"), (ColourLaw(1), "ColourLaw(grey_first=1, ")):
        with pytest.raises(
            TypeError, match=rf"^augment_: law must be a ColourLaw of True and False, got {re.escape(got)}"
        ):
            augment_(x, *draws(2), law)


def test_an_order_out_of_range_raises():
    for wrong in (4, 2**40):
        with pytest.raises(RuntimeError, match=r"^augment_: order must be between 0 and 3, got"):
            augment_(bytes_of(1, 3, 4, 4), *draws(1, jitter=(0.5, 0.5, 0.5, 0.5), order=(0, 1, 2, wrong)))
