"""Large products: every library gives the product, and copies of weights are those of the weights."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from fastssl.ops import dispatch, linear
from tests.support.close import assert_as_exact_on_average, assert_same
from tests.support.contract import opcheck

module = importlib.import_module("fastssl.ops.products")
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(module, "FEWEST", 1)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 3, 2), (70, 33, 45), (131, 515, 77), (0, 3, 2), (4, 0, 3)], ids=str)
def test_error_is_at_most_torch_s(monkeypatch, size, dtype, inner):
    """Also with transposed matrices, as in the backward pass."""
    monkeypatch.setattr(module, "has_inner_product", lambda dtype: inner)
    rows, depth, columns = size
    a, b, bias = (
        torch.randn(rows, depth).to(dtype),
        torch.randn(columns, depth).to(dtype),
        torch.randn(columns).to(dtype),
    )
    for left, right in ((a, b), (a.T.contiguous().T, b), (a, b.T.contiguous().T)):
        for third in (None, bias, torch.stack([bias, -bias], 1)[:, 0]):
            found = module.product(left, right, third)
            truth = F.linear(*(None if t is None else t.double() for t in (left, right, third)))
            assert found.dtype == dtype and found.is_contiguous() and found.shape == truth.shape
            assert_as_exact_on_average(found, truth, F.linear(left, right, third), "product")


def test_contract():
    for dtype in FLOATS:
        opcheck(module.product, torch.randn(6, 5).to(dtype), torch.randn(4, 5).to(dtype), torch.randn(4).to(dtype))
        opcheck(module.product, torch.randn(6, 5).to(dtype), torch.randn(5, 4).to(dtype).T)


def test_processors_with_the_inner_product(monkeypatch):
    assert dispatch.processor_maker() in ("intel", "amd", "other")
    for native, with_inner in ((True, {torch.float32, torch.bfloat16}), (False, {torch.float32})):
        monkeypatch.setattr(module, "is_native", lambda dtype, native=native: native)
        for maker, dtypes in (("amd", with_inner), ("other", with_inner), ("intel", set()), (None, set())):
            assert module.inner_product_dtypes(maker) == dtypes
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert module.inner_product_dtypes("other") == set()
    monkeypatch.undo()
    here = module.inner_product_dtypes(dispatch.processor_maker())
    assert {dtype for dtype in FLOATS if module.has_inner_product(dtype)} == here


@pytest.mark.parametrize("capability, counts", [("AVX512", (3, 2)), ("AVX2", (1, 0))])
def test_products_by_the_inner_product(monkeypatch, capability, counts):
    """Forward, gradient of x, gradient of the weight: which of them, in float32 and in bfloat16."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for dtype, count in zip((torch.float32, torch.bfloat16), counts, strict=True):
        x, weight, dy = (torch.randn(size).to(dtype) for size in ((6, 5), (4, 5), (6, 4)))
        chosen = [module._prefers_inner_product(*both) for both in ((x, weight), (dy, weight.T), (dy.T, x.T))]
        assert chosen == [True] * count + [False] * (3 - count)


def test_rounded_weights():
    rounded = module.RoundedWeights()
    weight = Parameter(torch.randn(6, 8))
    assert module.rounded(weight, torch.float32) is weight
    with rounded:
        copy = module.rounded(weight, torch.bfloat16)
        assert module.rounded(weight, torch.bfloat16) is copy
        assert_same(copy, weight.detach().bfloat16())
        assert module.rounded(weight, torch.float16).dtype == torch.float16
        assert module.rounded(weight * 1, torch.bfloat16).requires_grad  # a computed weight has no copy
    assert module.rounded(weight, torch.bfloat16) is not module.rounded(weight, torch.bfloat16)


def test_changed_weights_are_noticed():
    rounded = module.RoundedWeights()
    weight = Parameter(torch.randn(6, 8))

    def current():
        with rounded, torch.no_grad():
            assert_same(module.rounded(weight, torch.bfloat16), weight.bfloat16())

    current()
    with torch.no_grad():
        weight.mul_(2)
    current()
    weight.data = torch.randn(6, 8)
    current()
    weight.data.mul_(3)  # not counted by autograd: hence `refresh`, which the trainer calls before each step
    rounded.refresh()
    current()
    weight.data = torch.randn(6, 8)
    rounded.refresh()
    current()


def test_gradients_with_rounded_weights(monkeypatch):
    x, weight, upstream = torch.randn(70, 8), Parameter(torch.randn(6, 8)), torch.randn(70, 6)
    rounded, gradients = module.RoundedWeights(), []
    for context in (rounded, rounded, torch.enable_grad()):
        leaf = x.clone().requires_grad_()
        with context:
            with torch.autocast("cpu", torch.bfloat16):
                y = linear(leaf, weight, gelu=True)
            gradients.append(torch.autograd.grad(y, (leaf, weight), upstream.bfloat16()))
    for found in gradients[1:]:
        for one, two in zip(found, gradients[0], strict=True):
            assert_same(one, two)
    assert len(rounded._copies) == 1  # forward and backward, in both calls


def test_copies_of_unused_weights_are_dropped():
    rounded, weights = module.RoundedWeights(), [Parameter(torch.randn(6, 8)) for _ in range(2)]
    with rounded:
        for weight in weights:
            module.rounded(weight, torch.bfloat16)
        rounded.refresh()
        module.rounded(weights[1], torch.bfloat16)
        rounded.refresh()
    assert list(rounded._copies) == [id(weights[1])]
    with module.RoundedWeights(keep=False) as none:
        assert_same(module.rounded(weights[0], torch.bfloat16), weights[0].detach().bfloat16())
    assert not none._copies


def test_computed_weights_have_no_copies():
    """Each is a tensor of its own, which a copy would keep in memory until the next step."""
    rounded, weight = module.RoundedWeights(), Parameter(torch.randn(6, 8))
    with rounded, torch.no_grad():
        assert_same(module.rounded(weight * 2, torch.bfloat16), (weight * 2).bfloat16())
        module.rounded(weight[:3], torch.bfloat16)
    assert not rounded._copies


def test_recomputed_blocks_have_one_copy_a_weight():
    rounded, weight, x = module.RoundedWeights(), Parameter(torch.randn(6, 8)), torch.randn(70, 8)
    for _ in range(2):
        rounded.refresh()
        with rounded, torch.autocast("cpu", torch.bfloat16):
            checkpoint(linear, x, weight, use_reentrant=False).sum().backward()
        assert list(rounded._copies) == [id(weight)]


def test_copies_made_in_inference_mode():
    """They serve the training after it; parameters that were made there, without a version counter, have none."""
    rounded, weight = module.RoundedWeights(), Parameter(torch.randn(6, 8))
    with torch.inference_mode(), rounded:
        copy = module.rounded(weight, torch.bfloat16)
        module.rounded(Parameter(torch.randn(6, 8), requires_grad=False), torch.bfloat16)
    assert not copy.is_inference()
    assert list(rounded._copies) == [id(weight)]
    rounded.refresh()
    with rounded:
        assert module.rounded(weight, torch.bfloat16) is copy


def test_a_context_may_be_entered_twice():
    rounded, weight = module.RoundedWeights(), Parameter(torch.randn(6, 8))
    with rounded:
        with rounded:
            copy = module.rounded(weight, torch.bfloat16)
        assert module.rounded(weight, torch.bfloat16) is copy
    assert module.rounded(weight, torch.bfloat16) is not copy
