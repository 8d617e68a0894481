import contextlib
import re

import pytest
import torch

from fastssl.ops import dispatch, ema, ema_update_
from tests.support.close import assert_exact, assert_same
from tests.support.contract import opcheck, refused, rejects, sparse, torch_threads

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


@pytest.mark.parametrize("backend", ["kernel", "plain torch"])
def test_targets_that_share_memory_are_refused(backend):
    store, t, s = torch.randn(40), torch.randn(3, 4), torch.randn(3, 4)
    shared = "must not share memory with"
    cases = {
        f"targets[1] {shared} targets[0]": ([t, t], [s, s.clone()], None),
        f"targets[1] {shared} targets[0], of which it is a part": (
            [store[:10], store[5:15]],
            [store[20:30], store[30:]],
            None,
        ),
        f"sources[0] {shared} targets[0]": ([store[:10]], [store[1:11]], None),
        f"sources[1] {shared} targets[0]": ([t, s], [s.clone(), t], None),
        f"shadows[0] {shared} targets[0]": ([t], [s], [t]),
        "targets[0] must have no two elements in one place of memory": ([t[:1].expand(3, 4)], [s], None),
        "shadows[0] must have no two elements in one place of memory": ([t], [s], [store[:1].expand(3, 4)]),
        "targets[0] must have no two elements": ([store.as_strided((3, 4), (2, 1))], [s], None),
    }
    for sentence, (targets, sources, shadows) in cases.items():
        before = [x.clone() for x in (store, t, s)]
        with contextlib.ExitStack() as stack:
            if backend == "plain torch":
                stack.enter_context(dispatch.reference())
            with pytest.raises(ValueError, match=re.escape("ema_update_: " + sentence.split(",")[0])):
                ema_update_(targets, sources, 0.5, shadows)
        for x, y in zip((store, t, s), before):
            assert torch.equal(x, y)


def test_views_that_share_no_element_are_updated():
    store, source = torch.randn(6, 8), torch.randn(6, 8)
    expected = torch.lerp(store, source, 0.5)
    ema_update_([store[:, :3], store[:, 3:]], [source[:, :3], source[:, 3:]], 0.5)
    torch.testing.assert_close(store, expected)
    ema_update_([store], [store], 0.5)  # a target that is its own source
    torch.testing.assert_close(store, expected)


def test_a_meta_tensor_among_others_is_refused():
    t, s = torch.zeros(3), torch.ones(3)
    sentence = "ema_update_: targets[1] must be on cpu like targets[0], got meta; call it once per device"
    refused(sentence, ValueError, ema_update_, [t, t.to("meta")], [s, s], 0.5)
    refused(
        "ema_update_: sources[0] must be on cpu like targets[0], got meta",
        ValueError,
        ema_update_,
        [t],
        [s.to("meta")],
        0.5,
    )
    assert (t == 0).all()
    ema_update_([t.to("meta")], [s.to("meta")], 0.5)


def test_error_sentences():
    t, s = torch.randn(3), torch.randn(3)
    refused("ema_update_: sources must hold 1 tensors like targets, got 2", ValueError, ema_update_, [t], [s, s], 0.9)
    rejects("ema_update_", "momentum", "1.5", ValueError, ema_update_, [t], [s], 1.5)
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
