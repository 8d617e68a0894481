"""Mutated arguments of every public op: one sentence, or the plain-torch body's result, and nothing changed."""

import random

import pytest
import torch
from torch import Tensor

from fastssl.ops import dispatch

from .ops import CALLS, LAYOUTS, Arguments, copied, mutations_of, public_ops, tensors_in

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
EPS = 1e-6  # the smallest eps of the calls in ops.py
REFUSALS = (ValueError, TypeError, RuntimeError)
OPS = public_ops()


def test_every_public_op_is_attacked():
    assert CALLS.keys() == OPS.keys()


class Outcome:
    """What a call did: its sentence, or its results with their gradients; and its arguments afterwards."""

    def __init__(self, name: str, arguments: Arguments):
        self.refusal, self.results, self.arguments, self.forward = None, [], copied_all(arguments), 0
        try:
            results = tensors_in(OPS[name](**self.arguments))
            self.forward = len(results)
            leaves = [x for x in tensors_in(self.arguments) if x.requires_grad]
            used = [x for x in results if x.requires_grad and x.grad_fn is not None]
            if used and leaves:
                total = sum(x.double().sum() for x in used)
                gradients = torch.autograd.grad(total, leaves, allow_unused=True)  # None: torch's own of empty batches
                results += [torch.zeros_like(leaf) if x is None else x for x, leaf in zip(gradients, leaves)]
            self.results = [x.detach() for x in results]
        except REFUSALS as error:
            self.refusal = error

    def written(self) -> list[Tensor]:
        return [x.detach() for x in tensors_in(self.arguments)]


def copied_all(arguments: Arguments) -> Arguments:
    return {name: copied(value) for name, value in arguments.items()}


# Ops that document that values of their parameters are not checked: a hue of 1e30 turns means nothing.
WITHOUT_CHECK_OF_VALUES = ("augment_",)


def check(name: str, attack: str, arguments: Arguments, ours: Outcome, plain: Outcome) -> None:
    what = f"{name}, {attack}"
    if ours.refusal is not None:
        sentence = str(ours.refusal)
        assert sentence.startswith(f"{name}: ") and "\n" not in sentence, f"{what}: no sentence: {sentence!r}"
        before = [x.detach() for x in tensors_in(arguments)]
        for x, y in zip(before, ours.written(), strict=True):
            assert x.is_meta or bits(x) == bits(y), f"{what}: refused, but an argument changed"
        return
    assert plain.refusal is None, f"{what}: accepted, but plain torch says {plain.refusal}"
    finite = all(x.is_meta or x.isfinite().all() for x in tensors_in(arguments))
    has_nan = any(x.isnan().any() for x in tensors_in(arguments) if not x.is_meta)
    extreme = is_extreme(arguments)
    if extreme and name in WITHOUT_CHECK_OF_VALUES:
        return
    count = ours.forward if extreme else len(ours.results)  # there gradients are differences of huge numbers
    for made, wanted in ((ours.results[:count], plain.results[:count]), (ours.written(), plain.written())):
        for i, (x, y) in enumerate(zip(made, wanted, strict=True)):
            if finite:
                assert_close(x, y, coarsest_dtype(arguments, y), f"{what}, tensor {i}")
            elif has_nan and i < ours.forward:
                assert_nan_passed_on(x, y, f"{what}, tensor {i}")


def is_extreme(arguments: Arguments) -> bool:
    tensors = [x for x in tensors_in(arguments) if x.is_floating_point() and not x.is_meta and x.numel()]
    largest = [x.abs().max().item() for x in tensors]
    values = [x for value in arguments.values() for x in (value if isinstance(value, tuple) else [value])]
    numbers = [abs(x) for x in values if isinstance(x, (int, float))]
    return any(x > 1e4 or 0 < x < EPS for x in numbers) or any(x > 1e4 for x in largest)


def coarsest_dtype(arguments: Arguments, result: Tensor) -> torch.dtype:
    """The dtype with the fewest bits of the arguments and a result: products of 16 bits round what has more, too."""
    dtypes = [x.dtype for x in (result, *tensors_in(arguments)) if x.is_floating_point()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps) if dtypes else result.dtype


def bits(x: Tensor) -> bytes:
    return x.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()


def assert_close(x: Tensor, wanted: Tensor, coarsest: torch.dtype, what: str) -> None:
    """Equal, to the rounding of the dtype `coarsest`, wherever plain torch's result is finite."""
    assert (x.dtype, x.shape) == (wanted.dtype, wanted.shape), f"{what}: {x.dtype} {list(x.shape)}"
    if wanted.is_meta or not wanted.numel():
        return
    if not wanted.is_floating_point():
        assert torch.equal(x, wanted), f"{what}: integers differ"
        return
    finite = wanted.isfinite()
    x, exact = x[finite].double(), wanted[finite].double()
    if not len(x):
        return
    assert x.isfinite().all(), f"{what}: not finite where plain torch is"
    error, size = (x - exact).abs().max().item(), exact.abs().max().item()
    assert error <= TOLERANCE[coarsest] * max(size, 0.1), f"{what}: {error:.2e} from plain torch's {size:.2e}"


def assert_nan_passed_on(x: Tensor, wanted: Tensor, what: str) -> None:
    """A NaN in an argument is not lost: where plain torch's result has one, the op's is not finite."""
    assert (x.dtype, x.shape) == (wanted.dtype, wanted.shape), f"{what}: {x.dtype} {list(x.shape)}"
    if wanted.is_floating_point() and not wanted.is_meta:
        assert not x[wanted.isnan()].isfinite().any(), f"{what}: finite where plain torch has NaN"


def attack(name: str, attacks: list[tuple[str, Arguments]]) -> None:
    """Makes all calls, then the same in plain torch, and collects what breaks the rule."""
    ours = [Outcome(name, arguments) for _, arguments in attacks]
    with dispatch.reference():
        plain = [Outcome(name, arguments) for _, arguments in attacks]
    broken = []
    for (kind, arguments), made, wanted in zip(attacks, ours, plain):
        try:
            check(name, kind, arguments, made, wanted)
        except AssertionError as error:
            broken.append(str(error).split("\n")[0])
    assert not broken, f"{len(broken)} of {len(attacks)}:\n" + "\n".join(broken)


def single_mutations(arguments: Arguments) -> list[tuple[str, Arguments]]:
    return [
        (f"{argument} = {kind}", arguments | {argument: value})
        for argument in arguments
        for kind, value in mutations_of(arguments[argument]).items()
    ]


def pairs_of_mutations(arguments: Arguments, n: random.Random, count: int) -> list[tuple[str, Arguments]]:
    singles = [
        (argument, *mutation) for argument in arguments for mutation in mutations_of(arguments[argument]).items()
    ]
    made = []
    for _ in range(count):
        (a, kind_a, value_a), (b, kind_b, value_b) = n.sample(singles, 2)
        made.append((f"{a} = {kind_a}, {b} = {kind_b}", arguments | {a: value_a, b: value_b}))
    return made


def needing_gradients(arguments: Arguments) -> Arguments:
    """The arguments, of which those that are floating tensors require a gradient, in half of the ops' calls."""
    constant = ("k", "queue", "images", "noise", "jitter", "sigma", "keys_of_queue", "ptr", "bank")
    return {
        name: value.clone().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point() and name not in constant
        else value
        for name, value in arguments.items()
    }


def arguments_of(name: str, n: random.Random) -> Arguments:
    arguments = CALLS[name](n)
    constant = name in ("augment_", "enqueue_", "ema_update_", "prototype_lse", "update_bank_")
    return arguments if constant or n.random() < 0.5 else needing_gradients(arguments)


@pytest.mark.parametrize("name", OPS)
def test_mutated_arguments(name, seed):
    """A share of the mutations, chosen by the seed."""
    n = random.Random(seed)
    arguments = arguments_of(name, n)
    singles = single_mutations(arguments)
    attack(name, n.sample(singles, min(60, len(singles))) + pairs_of_mutations(arguments, n, 10))


@pytest.mark.exhaustive
@pytest.mark.parametrize("round", range(8))
@pytest.mark.parametrize("name", OPS)
def test_every_mutation(name, round, seed):
    n = random.Random(100 * seed + round)
    arguments = arguments_of(name, n)
    attack(name, single_mutations(arguments) + pairs_of_mutations(arguments, n, 300))


@pytest.mark.parametrize("name", OPS)
def test_layouts_change_nothing(name, seed):
    """Every tensor as a view with other strides: the bits of a contiguous copy's result, and of its gradients."""
    arguments = CALLS[name](random.Random(seed))
    if name != "prototype_lse":
        arguments = needing_gradients(arguments)
    if name in ("augment_", "enqueue_", "ema_update_", "resized_crops_", "update_bank_"):
        pytest.skip("an op in place: the mutations cover its layouts")
    for argument, value in arguments.items():
        if not isinstance(value, Tensor):
            continue
        for kind, layout in LAYOUTS.items():
            view = layout(value.detach()).requires_grad_(value.requires_grad)
            copy = view.detach().clone(memory_format=torch.contiguous_format).requires_grad_(value.requires_grad)
            made, wanted = (Outcome(name, arguments | {argument: x}) for x in (view, copy))
            assert made.refusal is None, f"{name}, {argument} {kind}: {made.refusal}"
            for i, (x, y) in enumerate(zip(made.results, wanted.results, strict=True)):
                torch.testing.assert_close(x, y, msg=lambda m, i=i: f"{name}, {argument} {kind}, tensor {i}: {m}")  # noqa: B023


@pytest.mark.parametrize("name", OPS)
def test_a_meta_tensor_among_others_is_refused(name, seed):
    """torch sends a call with any meta tensor to the shape inference, which would do nothing without a word."""
    arguments = CALLS[name](random.Random(seed))
    if len(tensors_in(arguments)) == 1:
        return
    for argument, value in arguments.items():
        if (name, argument) == ("augment_", "images"):  # its parameters are on the CPU, whatever the device of images
            continue
        for kind, mutated in mutations_of(value).items():
            if "meta" in kind:
                outcome = Outcome(name, arguments | {argument: mutated})
                assert str(outcome.refusal).startswith(f"{name}: "), f"{argument} {kind}: {outcome.refusal}"
