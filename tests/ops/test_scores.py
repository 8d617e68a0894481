import pytest
import torch

from fastssl.ops import sampled_scores, scores
from tests.support.contract import compiles, gradcheck, opcheck, refused, refuses_second_derivative, rejects
from tests.support.memory import peak_memory


def formula(q, rows, index):
    return (q[:, None] * rows[index]).sum(2)


def case(batch=13, length=29, count=7, width=5, dtype=torch.float64):
    q, rows = (torch.randn(n, width).to(dtype).requires_grad_() for n in (batch, length))
    return q, rows, torch.randint(length, (batch, count))


@pytest.mark.parametrize("values", [2**20, 64, 1])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (13, 29, 7, 5), (40, 3, 20, 8), (0, 3, 4, 2), (5, 3, 0, 2)])
def test_scores_are_products_with_gradient_to_both(sizes, values, monkeypatch):
    """In parts of any size; rows that occur several times sum their gradients."""
    monkeypatch.setattr(scores, "VALUES", values)
    q, rows, index = case(*sizes)
    upstream = torch.randn(index.shape).double()
    results = []
    for function in (sampled_scores, formula):
        made = function(q, rows, index)
        results.append((made, *torch.autograd.grad(made, (q, rows), upstream)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_float32(dtype):
    q, rows, index = case(width=200, dtype=dtype)
    made = sampled_scores(q, rows, index)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), formula(q.double(), rows.double(), index), rtol=1e-5, atol=1e-4)
    for gradient, x in zip(torch.autograd.grad(made.sum(), (q, rows)), (q, rows)):
        assert gradient.dtype == x.dtype


def test_memory_does_not_grow_with_the_gathered_rows():
    """The formula keeps 2 · [1024, 16, 512] and the index repeated, 101 MB and more; parts take a few times 4 MB."""
    q, rows, index = case(1024, 800, 16, 512, torch.float32)

    def step():
        return torch.autograd.grad(sampled_scores(q, rows, index).square().sum(), (q, rows))

    assert peak_memory(step) < 24e6


def test_contract():
    q, rows, index = case(3, 4, 5, 2)
    gradcheck(lambda q, rows: sampled_scores(q, rows, index), q, rows)
    opcheck(scores._sampled_scores_fwd, q.detach(), rows.detach(), index)
    opcheck(scores._sampled_scores_bwd, q.detach(), rows.detach(), index, torch.randn(3, 5).double())
    compiles(lambda q, rows: sampled_scores(q, rows, index).square().sum(), q, rows)
    refuses_second_derivative(lambda q: sampled_scores(q, rows, index), q)


def test_arguments_are_checked():
    q, rows, index = case()
    rejects("sampled_scores", "rows", "[29, 4]", ValueError, sampled_scores, q, rows[:, :4], index)
    rejects("sampled_scores", "index", "int32", TypeError, sampled_scores, q, rows, index.int())
    rejects("sampled_scores", "index", "[12, 7]", ValueError, sampled_scores, q, rows, index[:12])
    sentence = "sampled_scores: index must be between 0 and M-1=28, got 29"
    refused(sentence, RuntimeError, sampled_scores, q, rows, torch.full_like(index, 29))
