"""Assertions on exactness: the error of a result may not exceed that of plain torch in the same dtype."""

import torch
from torch import Tensor

# Error allowed for rounding the exact result once, relative to its largest value: half a unit in the last place, and
# more for float32 and float64, where plain torch's own error can happen to be zero.
FLOOR = {torch.float64: 1e-14, torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_exact(result: Tensor, truth: Tensor, plain: Tensor, what: str = "result") -> None:
    """|result − truth| ≤ max |plain − truth| + one rounding, where `truth` is float64 and `plain` is plain torch's
    result in the dtype of `result`."""
    assert result.dtype == plain.dtype, f"{what}: dtype {result.dtype}, plain torch has {plain.dtype}"
    assert result.shape == plain.shape, f"{what}: shape {list(result.shape)}, plain torch has {list(plain.shape)}"
    if result.numel() == 0:
        return
    error, allowed = (result.double() - truth).abs().max(), (plain.double() - truth).abs().max()
    floor = FLOOR[result.dtype] * truth.abs().max()
    assert error <= allowed + floor, f"{what}: error {error:.3e}, plain torch makes {allowed:.3e} + floor {floor:.3e}"


def assert_same(result: Tensor, expected: Tensor, what: str = "result") -> None:
    """Asserts that both are equal bit for bit, with NaN equal to NaN."""
    assert result.dtype == expected.dtype, f"{what}: dtype {result.dtype}, expected {expected.dtype}"
    assert result.shape == expected.shape, f"{what}: shape {list(result.shape)}, expected {list(expected.shape)}"
    assert torch.equal(result.nan_to_num(), expected.nan_to_num()), f"{what}: values differ"


def assert_as_exact_on_average(
    result: Tensor, truth: Tensor, plain: Tensor, what: str = "result", largest: float = 2.0
) -> None:
    """The root mean square error is at most plain torch's and one rounding, the largest at most `largest` times its.

    For sums of many terms, where it is chance which of two orders of summation has the larger maximum error.
    """

    def errors(x: Tensor) -> tuple[Tensor, Tensor]:
        difference = x.double() - truth
        return difference.square().mean().sqrt(), difference.abs().max()

    assert (result.dtype, result.shape) == (plain.dtype, plain.shape), f"{what}: {result.dtype} {list(result.shape)}"
    if result.numel() == 0:
        return
    (mean, most), (plain_mean, plain_most) = errors(result), errors(plain)
    floor = FLOOR[result.dtype] * truth.square().mean().sqrt()
    assert mean <= plain_mean + floor, (
        f"{what}: mean error {mean:.3e}, plain torch {plain_mean:.3e} + floor {floor:.3e}"
    )
    floor = FLOOR[result.dtype] * truth.abs().max()
    allowed = largest * plain_most + floor
    assert most <= allowed, f"{what}: error {most:.3e}, plain torch {plain_most:.3e}, floor {floor:.3e}"
