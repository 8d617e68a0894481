import pytest
import torch

from fastssl.nn import KoLeoLoss
from fastssl.nn.koleo import nearest_neighbours
from tests.support.contract import gradcheck, refused
from tests.support.golden import part, read


@pytest.mark.parametrize("case", ["random", "duplicates"])
def test_golden_losses_and_gradients(case):
    golden, _ = read("dinov2_losses")
    expected = part(golden, f"koleo.{case}.")
    for dtype, close in ((torch.float64, {"rtol": 1e-9, "atol": 1e-9}), (torch.float32, {"rtol": 1e-4, "atol": 1e-5})):
        x = expected["input"].to(dtype).requires_grad_()
        loss = KoLeoLoss()(x)
        loss.backward()
        assert torch.equal(nearest_neighbours(torch.nn.functional.normalize(x)[None])[0], expected["neighbour"])
        torch.testing.assert_close(loss.detach(), expected["loss"].to(dtype), **close)
        if case == "random" or dtype == torch.float64:  # of duplicates it is rounding, divided by the distance
            torch.testing.assert_close(x.grad, expected["grad"].to(dtype), **close)


def test_gradcheck():
    gradcheck(KoLeoLoss(), torch.randn(6, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equal_rows_are_finite_in_16_bits(dtype):
    """Where the reference's eps is 0 in float16, and the log of the distance infinite."""
    x = torch.randn(4, 8, dtype=dtype).repeat(2, 1).requires_grad_()
    loss = KoLeoLoss()(x)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and x.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(KoLeoLoss()(x.detach().float()), KoLeoLoss()(x.detach()))


def test_groups_are_neighbours_of_each_other_alone():
    x = torch.randn(12, 5, dtype=torch.float64)
    expected = torch.stack([KoLeoLoss()(rows) for rows in x.split(4)]).mean()
    torch.testing.assert_close(KoLeoLoss(groups=3)(x), expected)


def test_it_equals_lightlys():
    lightly = pytest.importorskip("lightly.loss")
    x = torch.randn(9, 5, dtype=torch.float64)
    for arguments in ((), (2,), (1, 1e-6), (3.0,)):
        torch.testing.assert_close(KoLeoLoss(*arguments)(x), lightly.KoLeoLoss(*arguments)(x))


def test_the_nearest_of_two_opposite_rows_is_the_other():
    """Their product is −1, in float32 also a little less."""
    x = torch.nn.functional.normalize(torch.arange(1.0, 8.0), dim=0)
    x = torch.stack([x, -x]) * (1 + 1e-6)
    assert nearest_neighbours(x[None]).tolist() == [[1, 0]]
    torch.testing.assert_close(KoLeoLoss()(torch.tensor([[1.0], [-1.0]])), -torch.tensor(2.0).log())


def test_bad_input_gets_a_sentence():
    refused("KoLeoLoss: groups must be at least 1, got 0", ValueError, KoLeoLoss, groups=0)
    refused("KoLeoLoss: p must be above 0, got 0", ValueError, KoLeoLoss, 0)
    refused("KoLeoLoss: eps must be above 0, got -1", ValueError, KoLeoLoss, eps=-1)
    refused("KoLeoLoss: x must be a tensor of shape [B, D], got list", TypeError, KoLeoLoss(), [1.0])
    ints = torch.ones(3, 4, dtype=torch.int64)
    sentence = "KoLeoLoss: x must be float32, float64, bfloat16 or float16, got int64"
    refused(sentence, TypeError, KoLeoLoss(), ints)
    refused("KoLeoLoss: x must have shape [B, D], got [2, 3, 4]", ValueError, KoLeoLoss(), torch.zeros(2, 3, 4))
    refused("KoLeoLoss: x must have B ≥ 2 rows in the batch, got B=1", ValueError, KoLeoLoss(), torch.ones(1, 4))
    sentence = "KoLeoLoss: x must have B ≥ 2 rows in each of 3 groups of equal size, got B=7"
    refused(sentence, ValueError, KoLeoLoss(groups=3), torch.ones(7, 4))
