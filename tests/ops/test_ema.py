import pytest
import torch

from fastssl.ops import dispatch, ema, ema_update_
from tests.support.close import assert_exact, assert_same
from tests.support.contract import opcheck, refused, sparse, torch_threads

SIZES = [(), (1,), (13,), (63, 7), (1000, 33), (0, 4), (40, 1000)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def pair(size, source_dtype, target_dtype=torch.float32):
    return torch.randn(size, dtype=target_dtype), torch.randn(size).to(source_dtype)


@pytest.mark.parametrize("source_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.999, 1.0])
def test_ema_is_the_formula(source_dtype, target_dtype, momentum):
    targets, sources = map(list, zip(*(pair(size, source_dtype, target_dtype) for size in SIZES)))
    shadows = [t.to(torch.bfloat16).fill_(7) for t in targets]
    truth = [momentum * t.double() + (1 - momentum) * s.double() for t, s in zip(targets, sources)]
    plain = [t.clone() for t in targets]
    with dispatch.reference():
        ema_update_(plain, sources, momentum)
    ema_update_(targets, sources, momentum, shadows)
    for target, exact, torch_made, shadow in zip(targets, truth, plain, shadows):
        assert_exact(target, exact, torch_made, "target")
        assert_same(shadow, target.to(torch.bfloat16), "shadow")


@pytest.mark.parametrize("shadow_dtype", DTYPES, ids=str)
def test_shadows_round_to_nearest_even(shadow_dtype):
    target = torch.tensor([1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 65504.0, -0.0, float("nan"), float("inf"), 1e-41])
    shadow = torch.zeros(8).to(shadow_dtype)
    ema_update_([target], [target.clone()], 0.5, [shadow])
    assert_same(shadow, target.to(shadow_dtype))
    assert shadow[5].isnan() or shadow_dtype == torch.float64


@pytest.mark.parametrize(
    "view",
    [lambda x: x.t(), lambda x: x[::2], lambda x: x[:, 3:9], lambda x: x.contiguous(memory_format=torch.channels_last)],
    ids=["transposed", "every other row", "columns", "channels last"],
)
def test_ema_of_any_strides(view):
    size = (4, 3, 8, 10) if "channels" in str(view.__code__.co_names) else (64, 36)
    for target_view, source_view in (
        (view, view),
        (view, lambda x: view(x).clone()),
        (lambda x: view(x).clone(), view),
    ):
        store, source = torch.randn(size), source_view(torch.randn(size))
        target = target_view(store)
        expected = torch.lerp(target, source, 0.25)
        untouched = store.clone()
        ema_update_([target], [source], 0.75)
        torch.testing.assert_close(target, expected)
        if target._base is store:  # cells outside the view keep their values
            target.copy_(target_view(untouched))
            assert torch.equal(store, untouched)


def test_ema_of_an_expanded_source():
    target, source = torch.randn(5, 6), torch.randn(6).expand(5, 6)
    expected = torch.lerp(target, source, 0.1)
    ema_update_([target], [source], 0.9)
    torch.testing.assert_close(target, expected)


def test_offsets_beyond_32_bits():
    target, source = sparse((3, 2), (2**30 + 8, 1)), torch.randn(3, 2)
    ema_update_([target], [source], 0.25)
    torch.testing.assert_close(target, 0.75 * source)


def test_same_bits_on_one_thread_and_on_two():
    results = []
    for threads in (1, 2):
        torch.manual_seed(0)
        targets, sources = map(list, zip(*(pair(size, torch.bfloat16) for size in SIZES)))
        with torch_threads(threads):
            ema_update_(targets, sources, 0.99)
        results.append(targets)
    for one, two in zip(*results):
        assert_same(two, one)


def test_ema_takes_parameters():
    module = torch.nn.Linear(3, 4)
    ema_update_(list(module.parameters()), [torch.zeros_like(p) for p in module.parameters()], 0.0)
    assert all((p == 0).all() for p in module.parameters())


def test_contract():
    opcheck(ema._ema_update_, [torch.randn(3), torch.randn(2, 2)], [torch.randn(3), torch.randn(2, 2)], 0.9, [])
    opcheck(ema._ema_update_, [torch.randn(3)], [torch.randn(3)], 0.9, [torch.randn(3).bfloat16()])


def test_ema_compiles():
    def step(target, source):
        ema_update_([target], [source], 0.9)
        return target + 1

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        args = torch.randn(4, 3), torch.randn(4, 3)
        results.append((function(*args), *args))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager)


def test_error_sentences():
    t, s = torch.randn(3), torch.randn(3)
    refused("ema_update_: sources must hold 1 tensors like targets, got 2", ValueError, ema_update_, [t], [s, s], 0.9)
    refused("ema_update_: momentum must be between 0 and 1, got 1.5", ValueError, ema_update_, [t], [s], 1.5)
    refused(
        "ema_update_: sources[0] must have shape [3] like targets[0], got [1, 3]",
        ValueError,
        ema_update_,
        [t],
        [s[None]],
        0.9,
    )
    refused(
        "ema_update_: targets[0] must be float32 or float64 (an update vanishes in 16 bits: pass float32 targets, "
        "16-bit shadows), got bfloat16",
        TypeError,
        ema_update_,
        [t.bfloat16()],
        [s],
        0.9,
    )
    refused(
        "ema_update_: sources[0] must be float32, float64, bfloat16 or float16, got int64",
        TypeError,
        ema_update_,
        [t],
        [s.long()],
        0.9,
    )
