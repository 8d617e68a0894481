import pytest
import torch

from fastssl.ops import dispatch, normalise
from fastssl.ops.pixels import DTYPES, _normalise
from tests.support.close import assert_same
from tests.support.contract import compiles, equals_body, opcheck, refused, sparse, torch_threads

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def bytes_of(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def scaled(values):
    return (torch.tensor(values) * 255).tolist()


@every_dtype
def test_every_byte_is_the_formula(dtype):
    """Beside float64: x − 255·mean cancels, so an error is measured by the size of its terms."""
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    exact = (pixels.double() / 255 - mean) / std
    made = normalise(pixels, MEAN, STD, dtype)
    assert made.dtype == dtype
    error = (made.double() - exact).abs()
    assert (error <= 2e-7 * (1 / std) + torch.finfo(dtype).eps / 2 * exact.abs()).all()


@every_dtype
@pytest.mark.parametrize(
    "shape", [(1, 3, 1, 1), (2, 3, 5, 7), (3, 3, 33, 65), (1, 3, 70, 90), (5, 3, 224, 224)], ids=str
)
def test_the_kernel_is_plain_torch_to_the_bit(shape, dtype):
    equals_body(_normalise, bytes_of(*shape), scaled(MEAN), scaled(STD), dtype)


@every_dtype
def test_results_larger_than_the_caches(dtype):
    """They are written around them, from the first to the last value."""
    pixels = bytes_of(2, 3, 1223, 1201) if dtype == torch.float32 else bytes_of(2, 3, 1723, 1701)
    made = normalise(pixels, MEAN, STD, dtype)
    assert made.nbytes >= 16 << 20
    table = normalise(torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, 3, 1, 256), MEAN, STD, dtype)
    for c in range(3):
        assert_same(made[:, c], table[0, c, 0][pixels[:, c].int()])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:, :, 2:-3, 5:-1],
        lambda x: x[::2, :, ::3, ::2],
        lambda x: x.mT,
        lambda x: x[:1].expand_as(x),
    ],
    ids=["channels last", "window", "every other", "turned", "one image"],
)
@every_dtype
def test_any_strides(view, dtype):
    pixels = view(bytes_of(4, 3, 20, 41))
    made = normalise(pixels, MEAN, STD, dtype)
    assert made.is_contiguous()
    assert_same(made, normalise(pixels.clone(memory_format=torch.contiguous_format), MEAN, STD, dtype))


def test_offsets_beyond_32_bits():
    pixels = sparse((2, 3, 2, 2), (2**32 + 8, 2**30, 9, 3), torch.uint8)
    pixels.copy_(bytes_of(2, 3, 2, 2))
    assert_same(normalise(pixels, MEAN, STD), normalise(pixels.clone(), MEAN, STD))


@every_dtype
def test_extreme_numbers(dtype):
    """Where std is tiny or huge, results overflow or vanish as in plain torch."""
    pixels = bytes_of(2, 3, 9, 9)
    for mean, std in (((0, 0.5, 1), (1e-30, 1e-38, 1e36)), ((-1e30, 1e36, 0), (1e30, 1e-3, 1e-42))):
        made = normalise(pixels, mean, std, dtype)
        with dispatch.reference():
            assert_same(made, normalise(pixels, mean, std, dtype))


def test_the_same_on_one_thread_and_on_two():
    pixels, results = bytes_of(7, 3, 65, 67), []
    for threads in (1, 2):
        with torch_threads(threads):
            results.append(normalise(pixels, MEAN, STD, torch.bfloat16))
    assert_same(*results)


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 3, 0, 5), (2, 3, 5, 0)], ids=str)
def test_empty(shape):
    assert normalise(bytes_of(*shape), MEAN, STD).shape == shape


def test_contract():
    for dtype in DTYPES:
        opcheck(_normalise, bytes_of(2, 3, 4, 5), scaled(MEAN), scaled(STD), dtype)
    compiles(lambda x: normalise(x, MEAN, STD), bytes_of(2, 3, 4, 5))


def test_error_sentences():
    pixels = bytes_of(2, 3, 4, 4)

    def refuses(sentence, error, pixels=pixels, mean=MEAN, std=STD, dtype=torch.float32):
        refused(f"normalise: {sentence}", error, normalise, pixels, mean, std, dtype)

    refuses("pixels must have shape [B, 3, H, W], got [2, 4, 4]", ValueError, pixels[:, 0])
    refuses("pixels must be uint8, got float32", TypeError, pixels.float())
    refuses("dtype must be float32, bfloat16 or float16, got float64", TypeError, dtype=torch.float64)
    refuses("dtype must be float32, bfloat16 or float16, got 'float32'", TypeError, dtype="float32")
    refuses("mean must be three numbers, got 0.5", TypeError, mean=0.5)
    refuses("mean must be three numbers, got 2", ValueError, mean=(0.5, 0.5))
    refuses("mean[1] must be a number, got 'x'", TypeError, mean=(0.5, "x", 0.5))
    refuses("std must be above 0, got [0.2, 0, 0.2]", ValueError, std=(0.2, 0, 0.2))
    refuses("mean must be finite, and 255 times it in float32, got [nan, 0, 0]", ValueError, mean=(float("nan"), 0, 0))
    refuses("std must be finite, and 255 times it in float32, got [1e+38, 1, 1]", ValueError, std=(1e38, 1, 1))
