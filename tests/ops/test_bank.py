import itertools

import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import bank as module
from fastssl.ops import dispatch, sampled_info_nce, sampled_nce, update_bank_
from tests.support.close import assert_as_exact_on_average, assert_same
from tests.support.contract import (
    compiles,
    gradcheck,
    opcheck,
    refused,
    refuses_second_derivative,
    rejects,
    sparse,
    torch_threads,
)
from tests.support.golden import part, read
from tests.support.memory import peak_memory

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 0, 1), (13, 63, 5, 7), (5, 20, 16, 128), (3, 9, 100, 33), (0, 3, 4, 5), (4, 7, 31, 0)]  # B, N, m, D


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def drawn(batch, rows, count):
    return torch.randint(rows, (batch, 1 + count))


def softmax_formula(q, bank, indices, tau):
    logits = torch.einsum("bd,bmd->bm", q, bank[indices]) / tau
    loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64), reduction="none")
    return loss, rank(logits, indices)


def rank(scores, indices):
    """Scores of the positive itself, drawn again, may be rounded otherwise."""
    return ((scores[:, 1:] > scores[:, :1]) & (indices[:, 1:] != indices[:, :1])).sum(1)


def nce_formula(q, bank, indices, tau, z, eps=1e-7):
    p = torch.einsum("bd,bmd->bm", q, bank[indices]).div(tau).exp() / z
    c = (indices.shape[1] - 1) / len(bank)
    loss = -(p[:, 0] / (p[:, 0] + c + eps)).log() - (c / (p[:, 1:] + c + eps)).log().sum(1)
    return loss, rank(p, indices), (p * z).sum(1).log()


@pytest.mark.parametrize("backend", ["kernel", "plain torch"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tau", [0.07, 0.5, 5.0])
def test_both_equal_their_formulas(backend, size, tau):
    batch, rows, count, width = size
    q, bank, indices = unit(batch, width).requires_grad_(), unit(rows, width), drawn(batch, rows, count)
    context = dispatch.reference() if backend == "plain torch" else torch.enable_grad()
    with context:
        results = sampled_info_nce(q, bank, indices, tau), sampled_nce(q, bank, indices, tau, 30.0)
        wanted = softmax_formula(q, bank, indices, tau), nce_formula(q, bank, indices, tau, 30.0)
        for ours, theirs in zip(results, wanted):
            for made, expected in zip(ours, theirs, strict=True):
                torch.testing.assert_close(made, expected, rtol=1e-11, atol=1e-11)
            assert ours.rank.dtype == torch.int64
            weights = torch.rand(batch).double()
            gradients = [torch.autograd.grad((r[0] * weights).sum(), q)[0] for r in (ours, theirs)]
            torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def test_a_draw_of_the_positive_itself_is_no_better_than_the_positive():
    q, bank = unit(64, 37).float(), unit(50, 37).float()
    indices = torch.randint(50, (64, 1)).expand(64, 40)
    for rank in (sampled_info_nce(q, bank, indices, 0.07).rank, sampled_nce(q, bank, indices, 0.07, 1.0).rank):
        assert not rank.any()


def test_gradients_also_of_the_temperature():
    q, bank, indices = unit(3, 4).requires_grad_(), unit(7, 4), drawn(3, 7, 5)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    gradcheck(lambda q, t: sampled_info_nce(q, bank, indices, t).loss, q, tau)
    gradcheck(lambda q, t: sampled_nce(q, bank, indices, t, 20.0).loss, q, tau)
    gradcheck(lambda t: sampled_nce(q.detach(), bank, indices, t.exp(), torch.tensor(9.0)).loss, tau)
    for function in (sampled_info_nce, lambda *args: sampled_nce(*args, 20.0)):
        refuses_second_derivative(lambda q, function=function: function(q, bank, indices, 0.3), q)


def forward_ops(q, bank, indices, tau, shift):
    results = (
        module._sampled_info_nce_fwd(q, bank, indices, tau, True),
        module._sampled_nce_fwd(q, bank, indices, tau, shift, True),
    )
    return [(f"op {i}, result {j}", x) for i, result in enumerate(results) for j, x in enumerate(result)]


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES[1:], DTYPES)), ids=str)
@pytest.mark.parametrize("size", [(13, 63, 5, 7), (32, 300, 200, 128), (9, 50, 333, 100)], ids=str)
def test_error_is_at_most_torch_s_in_float32(dtypes, size):
    batch, rows, count, width = size
    q, bank, indices = (
        unit(batch, width, dtype=dtypes[0]),
        unit(rows, width, dtype=dtypes[1]),
        drawn(batch, rows, count),
    )
    tau, shift = torch.tensor(0.07), torch.tensor(3.0)
    ours = forward_ops(q, bank, indices, tau, shift)
    with dispatch.reference():
        plain = forward_ops(q, bank, indices, tau, shift)
        truth = forward_ops(q.double(), bank.float().double(), indices, tau.double(), shift.double())
    for (name, result), (_, torch_made), (_, exact) in zip(ours, plain, truth, strict=True):
        if result.dtype == torch.int64:
            assert torch.equal(result, exact), name
        else:
            assert_as_exact_on_average(result, exact, torch_made, name)


@pytest.mark.parametrize("shift", [-40.0, -12.0, 0.0, 12.0, 40.0])
def test_noise_contrast_far_from_the_noise(shift):
    """Sums of log(1 + e) with e from 1e-24 to 1, where 1 + e is 1 in float32."""
    q, bank, indices = unit(4, 16, dtype=torch.float32), unit(30, 16, dtype=torch.float32), drawn(4, 30, 500)
    arguments = indices, torch.tensor(0.1), torch.tensor(shift)
    loss, _, _, dq = module._sampled_nce_fwd(q, bank, *arguments, True)
    with dispatch.reference():
        wanted, _, _, gradient = module._sampled_nce_fwd(q.double(), bank.double(), *arguments, True)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(dq.double(), gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_large_logits_do_not_overflow():
    q, bank, indices = 1000 * unit(4, 16, dtype=torch.float32), unit(30, 16, dtype=torch.float32), drawn(4, 30, 9)
    for function in (sampled_info_nce, lambda *args: sampled_nce(*args, 5.0)):
        leaf = q.clone().requires_grad_()
        loss = function(leaf, bank, indices, 0.01).loss
        exact = function(q.double(), bank.double(), indices, 0.01).loss
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-2)
        assert torch.autograd.grad(loss.sum(), leaf)[0].isfinite().all()


def test_the_number_of_threads_changes_no_bit():
    q, bank, indices = unit(37, 50, dtype=torch.float32), unit(90, 50, dtype=torch.float32), drawn(37, 90, 700)
    results = []
    for threads in (1, 2):
        with torch_threads(threads):
            results.append(forward_ops(q, bank, indices, torch.tensor(0.1), torch.tensor(2.0)))
    for (name, one), (_, two) in zip(*results):
        assert_same(one, two, name)


def test_any_strides():
    q, bank, indices = unit(6, 5), unit(9, 5), drawn(6, 9, 20)
    wide = torch.full((9, 8), torch.nan, dtype=torch.float64)
    wide[:, 2:7] = bank
    for a, b, c in ((q.T.contiguous().T, wide[:, 2:7], indices.T.contiguous().T), (q[:1].expand(6, 5), bank, indices)):
        for function in (sampled_info_nce, lambda *args: sampled_nce(*args, 5.0)):
            made, wanted = function(a, b, c, 0.2), function(a.clone(), b.contiguous(), c.contiguous(), 0.2)
            for x, y in zip(made, wanted):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_offsets_beyond_32_bits():
    bank = sparse((5, 2), (2**29 + 8, 1))
    update_bank_(bank, torch.tensor([4, 3]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]), 0.5)
    torch.testing.assert_close(bank[3:], torch.tensor([[0.0, 1.0], [0.6, 0.8]]))
    loss = sampled_info_nce(torch.tensor([[1.0, 0.0]]), bank, torch.tensor([[4, 3]]), 1.0).loss
    torch.testing.assert_close(loss, torch.tensor([0.6]).neg().exp().log1p())


@pytest.mark.parametrize("case", ["bank", "queue"])
def test_golden_steps_of_infomin(case):
    """Both forms of PyContrast: image and jigsaw features against the same negatives, with β = 0.5."""
    golden, meta = read("pirl_infomin")
    beta, steps = meta["beta"], {"bank": 2, "queue": 3}[case]
    memory = golden[f"{case}.state.memory"].double()
    for step in range(steps):
        expected = part(golden, f"{case}.step{step}.")
        names = ("feature", "jigsaw") if case == "bank" else ("q", "q_jigsaw")
        leaves = [expected[f"input.{name}"].double().requires_grad_() for name in names]
        if case == "bank":
            indices = expected["input.drawn"].clone()
            indices[:, 0] = expected["input.index"]
            losses = [sampled_info_nce(x, memory, indices, meta["T"]["bank"]).loss.mean() for x in leaves]
        else:
            from fastssl.ops import enqueue_, info_nce

            k = expected["input.k"].double()
            losses = [info_nce(x, k, memory, meta["T"]["queue"]).loss.mean() for x in leaves]
        loss = (1 - beta) * losses[0] + beta * losses[1]
        torch.testing.assert_close(loss.detach(), expected["loss"], rtol=1e-9, atol=1e-10)
        for name, gradient in zip(names, torch.autograd.grad(loss, leaves)):
            torch.testing.assert_close(gradient, expected[f"grad.{name}"], rtol=1e-9, atol=1e-10)
        if case == "bank":
            update_bank_(memory, expected["input.index"], leaves[0].detach(), meta["momentum"])
        else:
            enqueue_(memory, (expected["index"] - len(k)).remainder(len(memory)).reshape(1), k)
        torch.testing.assert_close(memory, expected["memory"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["kernel", "plain torch"])
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_update_is_a_normalised_mean(backend, dtypes):
    bank, features = torch.randn(20, 9).to(dtypes[0]), torch.randn(6, 9).to(dtypes[1])
    indices, before = torch.randperm(20)[:6], bank.clone()
    with dispatch.reference() if backend == "plain torch" else torch.no_grad():
        update_bank_(bank, indices, features, 0.3)
    wide = torch.promote_types(torch.promote_types(dtypes[0], torch.float32), dtypes[1])
    wanted = before.clone()
    wanted[indices] = F.normalize(0.3 * before[indices].to(wide) + 0.7 * features.to(wide)).to(dtypes[0])
    torch.testing.assert_close(bank, wanted)
    untouched = torch.ones(20, dtype=torch.bool).index_fill(0, indices, False)
    assert torch.equal(bank[untouched], before[untouched])


@pytest.mark.parametrize("backend", ["kernel", "plain torch"])
def test_rules_of_the_update(backend):
    """Of an index that occurs several times the last counts alone; an update without direction is left out."""
    bank = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [1.0, 1.0], [5.0, 0.0]])
    features = torch.tensor(
        [[9.0, 9.0], [0.0, 1.0], [0.0, -2.0], [torch.nan, 0.0], [7.0, 7.0], [torch.inf, 1.0], [1e30, 0.0]]
    )
    with dispatch.reference() if backend == "plain torch" else torch.no_grad():
        update_bank_(bank, torch.tensor([0, 0, 1, 2, 3, 3, 4]), features, 0.5)
        update_bank_(bank, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2), 0.5)
    wanted = torch.tensor([[2**-0.5, 2**-0.5], [0.0, 2.0], [3.0, 4.0], [1.0, 1.0], [5.0, 0.0]])
    torch.testing.assert_close(bank, wanted)


def test_contract():
    q, bank, indices, tau = torch.randn(3, 5), torch.randn(9, 5), drawn(3, 9, 4), torch.tensor(0.2)
    for with_grad in (True, False):
        opcheck(module._sampled_info_nce_fwd, q, bank, indices, tau, with_grad)
        opcheck(module._sampled_nce_fwd, q, bank, indices, tau, torch.tensor(1.0), with_grad)
    opcheck(module._update_bank_, bank, torch.tensor([3, 5, 3]), torch.randn(3, 5), 0.5)


def test_all_compile():
    q, bank, indices = torch.randn(3, 5, requires_grad=True), torch.randn(9, 5), drawn(3, 9, 4)
    compiles(lambda q: sampled_info_nce(q, bank, indices, 0.2).loss, q)
    compiles(lambda q, z: sampled_nce(q, bank, indices, 0.2, z).loss, q, torch.tensor(7.0))

    def step(bank, features):
        update_bank_(bank, torch.tensor([3, 5, 3]), features, 0.5)
        return bank + 1

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        arguments = torch.randn(9, 5), torch.randn(3, 5)
        results.append((function(*arguments), *arguments))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager)


def test_memory_does_not_grow_with_the_number_of_negatives():
    q, bank = unit(64, 64, dtype=torch.float32).requires_grad_(), unit(5000, 64, dtype=torch.float32)
    indices = drawn(64, 5000, 2000)  # the gathered rows are 33 MB
    for function in (sampled_info_nce, lambda *args: sampled_nce(*args, 5.0)):
        peak = peak_memory(lambda function=function: function(q, bank, indices, 0.1).loss.sum().backward())
        assert peak is None or peak < 2e6, peak


def test_error_sentences():
    q, bank, indices = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 4, dtype=torch.int64)
    sentence = "sampled_info_nce: bank must have shape [N, D=3], got [5, 4]"
    refused(sentence, ValueError, sampled_info_nce, q, torch.zeros(5, 4), indices, 0.1)
    for name, function, rest in (
        ("sampled_info_nce", sampled_info_nce, (0.1,)),
        ("sampled_nce", sampled_nce, (0.1, 3.0)),
    ):
        for bad in (-1, 5, 2**62, -(2**63)):
            wrong = indices.clone()
            wrong[1, 2] = bad
            for context in (torch.no_grad(), dispatch.reference()):
                with context:
                    sentence = f"{name}: indices must be between 0 and N-1=4, got {bad}"
                    refused(sentence, RuntimeError, function, q, bank, wrong, *rest)
        rejects(name, "indices", "int32", TypeError, function, q, bank, indices.int(), *rest)
        rejects(name, "indices", "shape [2, 0]", ValueError, function, q, bank, indices[:, :0], *rest)
        rejects(name, "bank", "strides [1, 5]", ValueError, function, q, torch.zeros(3, 5).T, indices, *rest)
        rejects(
            name, "bank", "requires_grad=True", ValueError, function, q, bank.clone().requires_grad_(), indices, *rest
        )
        rejects(name, "tau", "0", ValueError, function, q, bank, indices, 0, *rest[1:])
    rejects("sampled_nce", "z", "-1", ValueError, sampled_nce, q, bank, indices, 0.1, -1)
    rejects("sampled_nce", "z", "shape [2]", ValueError, sampled_nce, q, bank, indices, 0.1, torch.ones(2))
    rejects("sampled_nce", "eps", "-1", ValueError, sampled_nce, q, bank, indices, 0.1, 1.0, -1)
    before = torch.randn(5, 3)
    for context in (torch.no_grad(), dispatch.reference()):
        changed = before.clone()
        with context:
            sentence = "update_bank_: indices must be between 0 and N-1=4, got 7"
            refused(sentence, RuntimeError, update_bank_, changed, torch.tensor([1, 7]), torch.ones(2, 3), 0.5)
        assert torch.equal(changed, before)
    rejects("update_bank_", "momentum", "1.5", ValueError, update_bank_, bank, indices[:, 0], q, 1.5)
    rejects("update_bank_", "features", "[3, 3]", ValueError, update_bank_, bank, indices[:, 0], torch.zeros(3, 3), 0.5)
    sentence = "update_bank_: features must not share memory with bank, got views of the same: pass features.clone()"
    refused(sentence, ValueError, update_bank_, bank, indices[:, 0], bank[:2], 0.5)
