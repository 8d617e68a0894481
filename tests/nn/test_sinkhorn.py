"""Sinkhorn–Knopp and SwAV's loss against golden numbers, over ranks, and where the reference overflows."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.distributed import rank, world_size
from fastssl.nn import SinkhornKnopp, SwaVLoss, sinkhorn, sinkhorn_potentials
from fastssl.nn.sinkhorn import EXCLUDED
from fastssl.ops import PrototypeTargets, soft_cross_entropy
from tests.support.contract import gradcheck, refused, rejects
from tests.support.golden import read
from tests.support.ranks import run_ranks

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def divided(scores, epsilon, iterations=3):
    """Sinkhorn–Knopp as the papers write it: exp, then divisions of columns and rows."""
    codes = (scores / epsilon).exp()
    for _ in range(iterations):
        codes = codes / codes.sum(0) / codes.shape[1]
        codes = codes / codes.sum(1, keepdim=True) / codes.shape[0]
    return codes * codes.shape[0]


def by_potentials(x, weight, tau, rounds=3):
    a, b = sinkhorn_potentials(x, weight, tau, rounds)
    return (x @ weight.T / tau + a[:, None] + b).exp()


def golden_scores():
    """(scores, temperature, iterations, codes) of SwAV's and DINOv2's reference code."""
    swav, meta = read("swav")
    batch = swav["loss.input.scores"][: meta["batch"]]
    dinov2, _ = read("dinov2_losses")
    return {
        **{f"swav {n}": (batch, meta["epsilon"], n, swav[f"sinkhorn.iterations{n}"]) for n in (1, 3, 10)},
        **{
            f"swav of {n}": (swav[f"sinkhorn.n{n}.scores"], meta["epsilon"], 3, swav[f"sinkhorn.n{n}.codes"])
            for n in (3, 20)
        },
        **{
            f"dinov2 of {n}": (dinov2[f"sinkhorn.n{n}.input"], 0.07, 3, dinov2[f"sinkhorn.n{n}.output"])
            for n in (4, 12, 40)
        },
        **{
            f"dinov2 patches {n}": (
                dinov2[f"patch.step{n}.input.teacher"],
                0.05,
                3,
                dinov2[f"patch.step{n}.sinkhorn.probabilities"],
            )
            for n in range(3)
        },
    }


GOLDEN = golden_scores()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_assignments(name):
    scores, tau, rounds, expected = GOLDEN[name]
    scores = scores.double()
    torch.testing.assert_close(SinkhornKnopp(rounds, tau)(scores), expected, **EXACT)
    torch.testing.assert_close(SinkhornKnopp(rounds)(scores, epsilon=tau), expected, **EXACT)
    identity = torch.eye(scores.shape[1], dtype=scores.dtype)
    torch.testing.assert_close(by_potentials(scores, identity, tau, rounds), expected, **EXACT)
    single = SinkhornKnopp(rounds, tau)(scores.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-6)


def test_nothing_overflows_where_exp_does():
    """DINOv2's scores reach 10 and more: exp(10 / 0.04) is infinite in float32."""
    scores = torch.randn(64, 32) * 4
    scores[0, 0] = 12
    assert divided(scores, 0.04).isnan().any()
    expected = divided(scores.double(), 0.04)
    assert expected.isfinite().all()
    for codes in (SinkhornKnopp(3, 0.04)(scores), by_potentials(scores, torch.eye(32), 0.04)):
        assert codes.dtype == torch.float32
        torch.testing.assert_close(codes.double(), expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(codes.sum(1), torch.ones(64), rtol=1e-5, atol=1e-5)
    far = torch.randn(8, 5) * 1e4
    assert SinkhornKnopp(3, 0.04)(far).isfinite().all() and by_potentials(far, torch.eye(5), 0.04).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_are_not_counted_change_nothing(dtype):
    """Also where they come first, and are as many as a kernel takes at once."""
    x, weight = torch.randn(400, 4).to(dtype), torch.randn(6, 4).to(dtype)
    counted = torch.arange(400) % 3 == 1
    counted[:300] = False
    accuracy = EXACT if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    a, b = sinkhorn_potentials(x, weight, 0.3, counted=counted)
    x, weight = x.double(), weight.double()
    codes = (x @ weight.T / 0.3 + a[:, None] + b).exp()
    torch.testing.assert_close(codes[counted], divided(x[counted] @ weight.T, 0.3), **accuracy)
    assert codes[~counted].eq(0).all() and a[~counted].eq(EXCLUDED).all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_stored_scores_give_the_same_potentials(dtype, autocast, monkeypatch):
    x, weight = F.normalize(torch.randn(40, 16), dim=1).to(dtype), F.normalize(torch.randn(30, 16), dim=1).to(dtype)
    counted = torch.arange(40) % 5 > 0

    def potentials(largest):
        monkeypatch.setattr(sinkhorn, "STORED", largest)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return *sinkhorn_potentials(x, weight, 0.05), *sinkhorn_potentials(x, weight, 0.05, 2, counted)

    for stored, streamed in zip(potentials(2**20), potentials(0), strict=True):
        assert stored.dtype == streamed.dtype
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(stored, streamed, rtol=tolerance, atol=tolerance)


def test_bfloat16_features_have_float32_potentials():
    x, weight = torch.randn(9, 4).bfloat16(), torch.randn(6, 4).bfloat16()
    a, b = sinkhorn_potentials(x, weight, torch.tensor(0.3))
    assert a.dtype == b.dtype == torch.float32 and (a.shape, b.shape) == ((9,), (6,))
    assert SinkhornKnopp()(x).dtype == torch.float32


SIZES = {"equal": (6, 6, 6), "unequal": (4, 1, 13), "a rank without samples": (7, 0, 11)}


def samples():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(18, 4, generator=generator), torch.randn(7, 4, generator=generator)


def on_this_rank(sizes, dtype, tau):
    x, weight = (t.to(dtype) for t in samples())
    x = x.split(sizes)[rank()]
    return *sinkhorn_potentials(x, weight, tau), SinkhornKnopp(3, tau, gather=True)(x @ weight.T)


@pytest.mark.parametrize("sizes", SIZES)
def test_three_ranks_equal_one_process(sizes):
    x, weight = (t.double() for t in samples())
    for dtype, tau, accuracy in ((torch.float64, 0.3, EXACT), (torch.float32, 0.04, {"rtol": 2e-3, "atol": 1e-6})):
        results = run_ranks(3, on_this_rank, SIZES[sizes], dtype, tau)
        rows, (_, column, _) = torch.cat([row for row, _, _ in results]).double(), results[0]
        assert all(torch.equal(column, other) for _, other, _ in results)
        expected = divided(x @ weight.T, tau)
        codes = (x @ weight.T / tau + rows[:, None] + column.double()).exp()
        torch.testing.assert_close(codes, expected, **accuracy)
        torch.testing.assert_close(torch.cat([codes for _, _, codes in results]).double(), expected, **accuracy)


def test_bad_arguments_are_refused():
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    refused("sinkhorn_potentials: rounds must be at least 1, got 0", ValueError, sinkhorn_potentials, x, weight, 0.1, 0)
    refused("sinkhorn_potentials: tau must be > 0, got -1.0", ValueError, sinkhorn_potentials, x, weight, -1.0)
    wrong = "sinkhorn_potentials: counted must have shape [M=3], got [4]"
    refused(wrong, ValueError, sinkhorn_potentials, x, weight, 0.1, 3, x[0] > 0)
    refused("SinkhornKnopp: iterations must be at least 1, got 0", ValueError, SinkhornKnopp, 0)
    refused("SinkhornKnopp: epsilon must be > 0, got 0", ValueError, SinkhornKnopp, 3, 0)
    refused("SinkhornKnopp: epsilon must be > 0, got 0", ValueError, SinkhornKnopp(), x, 0)
    refused("SinkhornKnopp: scores must have shape [B, K], got [4]", ValueError, SinkhornKnopp(), x[0])
    refused("SinkhornKnopp: scores must be a tensor of shape [B, K], got list", TypeError, SinkhornKnopp(), [x])
    refused("SinkhornKnopp: iterations must be an integer, got 2.5", TypeError, SinkhornKnopp, 2.5)
    wrong = "sinkhorn_potentials: counted must be bool, got int64"
    refused(wrong, TypeError, sinkhorn_potentials, x, weight, 0.1, 3, torch.ones(3).long())


def crops_of(scores, batch):
    crops = scores.split(batch)
    return crops[:2], crops[2:]


@pytest.mark.parametrize("case", ["plain", "queue"])
def test_golden_loss(case):
    golden, meta = read("swav")
    scores = golden["loss.input.scores"].double().requires_grad_()
    weight, queue = golden["loss.input.prototypes"].double(), golden["loss.input.queue"].double()
    queues = list(queue @ weight.T) if case == "queue" else None
    criterion = SwaVLoss(meta["temperature"], meta["iterations"], meta["epsilon"])
    loss = criterion(*crops_of(scores, meta["batch"]), queues)
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden[f"loss.{case}.loss"], **EXACT)
    torch.testing.assert_close(scores.grad, golden[f"loss.{case}.grad.scores"], **EXACT)


@pytest.mark.parametrize("case", ["plain", "queue"])
def test_golden_loss_without_scores(case):
    """Potentials and the op on features give the same codes and loss."""
    golden, meta = read("swav")
    batch, epsilon = meta["batch"], meta["epsilon"]
    z, weight = golden["loss.input.embedding"].double(), golden["loss.input.prototypes"].double()
    losses = []
    for i in range(2):
        own = z[i * batch : (i + 1) * batch]
        rows = torch.cat([golden["loss.input.queue"][i].double(), own]) if case == "queue" else own
        a, b = sinkhorn_potentials(rows, weight, epsilon, meta["iterations"])
        a = a[-batch:]
        codes = (own @ weight.T / epsilon + a[:, None] + b).exp()
        torch.testing.assert_close(codes, golden[f"loss.{case}.codes{i}"], **EXACT)
        others = torch.cat([z[: i * batch], z[(i + 1) * batch :]])
        numbers = torch.arange(batch).repeat(5)[:, None]
        targets = PrototypeTargets(own, weight, epsilon, a, b)
        losses.append(soft_cross_entropy(others, weight, meta["temperature"], targets, numbers).mean())
    torch.testing.assert_close(torch.stack(losses).mean(), golden[f"loss.{case}.loss"], **EXACT)


def test_loss_has_the_gradient_of_its_number():
    criterion = SwaVLoss()
    fixed = [torch.randn(3, 4, dtype=torch.float64) for _ in range(2)]  # codes have no gradient: large crops are fixed
    gradcheck(lambda x, y: criterion(fixed, [x, y]), *torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_())


def test_loss_of_bfloat16_scores_is_float32_and_bad_scores_are_refused():
    scores = [torch.randn(3, 4).bfloat16() for _ in range(3)]
    assert SwaVLoss()(scores[:2], scores[2:]).dtype == torch.float32
    rejects("SwaVLoss", "large crop", "1 large and 0 small", ValueError, SwaVLoss(), scores[:1], [])
    rejects("SwaVLoss", "queue_outputs", "1", ValueError, SwaVLoss(), scores[:2], [], scores[:1])
    small = [torch.randn(2, 4)]
    rejects("SwaVLoss", "low_resolution_outputs", "[2, 4]", ValueError, SwaVLoss(), scores[:2], small)
    rejects("SwaVLoss", "high_resolution_outputs", "int", TypeError, SwaVLoss(), [scores[0], 1], [])
    rejects("SwaVLoss", "high_resolution_outputs", "[4]", ValueError, SwaVLoss(), scores[0], scores[1])
    rejects("SwaVLoss", "queue_outputs", "NoneType", TypeError, SwaVLoss(), scores[:2], [], [None, None])
    rejects("SwaVLoss", "queue_outputs", "[2, 3]", ValueError, SwaVLoss(), scores[:2], [], [torch.randn(2, 3)] * 2)
    rejects("SwaVLoss", "temperature", "0.0", ValueError, SwaVLoss, 0.0)


def test_lightlys_loss_is_equal():
    lightly = pytest.importorskip("lightly.loss")
    crops = [torch.randn(5, 6, dtype=torch.float64) for _ in range(5)]
    queues = [torch.randn(7, 6, dtype=torch.float64) for _ in range(2)]
    for arguments in ((crops[:2], crops[2:]), (crops[:2], crops[2:], queues), (crops[:2], [])):
        theirs = lightly.SwaVLoss()(*arguments).reshape(())  # theirs has one dimension
        torch.testing.assert_close(SwaVLoss()(*arguments), theirs, **EXACT)
    functional = pytest.importorskip("lightly.loss.swav_loss")
    torch.testing.assert_close(SinkhornKnopp()(crops[0]), functional.sinkhorn(crops[0]), **EXACT)


def loss_on_this_rank():
    crops = F.normalize(torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=2)
    crops = [scores.chunk(world_size())[rank()] for scores in crops]
    return SwaVLoss(sinkhorn_gather_distributed=True)(crops[:2], crops[2:])


def test_loss_over_two_ranks_equals_one_process():
    torch.testing.assert_close(torch.stack(run_ranks(2, loss_on_this_rank)).mean(), loss_on_this_rank(), **EXACT)
