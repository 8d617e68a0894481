"""Checks that run once for each signature of a call."""

import pytest
import torch

from fastssl.ops import check, keep_tokens


@pytest.fixture
def counted():
    """Checks that count their runs, and refuse tensors of one dimension."""
    runs = []

    @check.once_a_signature
    def checks(x, other=None, number=0):
        runs.append(x.shape)
        check.tensor("an_op", "x", x, "B D")

    return checks, runs


def test_a_signature_is_checked_once(counted):
    checks, runs = counted
    for _ in range(3):
        checks(torch.zeros(2, 3), None, 1)
    checks(torch.nn.Parameter(torch.ones(2, 3)), None, 1)  # another tensor of the same signature
    assert len(runs) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(3, 2), None, 1),
        (torch.zeros(2, 3, dtype=torch.float64), None, 1),
        (torch.zeros(2, 3, device="meta"), None, 1),
        (torch.zeros(2, 3), torch.zeros(1), 1),
        (torch.zeros(2, 3), None, 2),
        (torch.zeros(2, 3), None, 1.0),
        (torch.zeros(2, 3), None, True),
    ],
    ids=str,
)
def test_another_signature_is_checked(counted, arguments):
    checks, runs = counted
    checks(torch.zeros(2, 3), None, 1)
    checks(*arguments)
    assert len(runs) == 2


def test_a_refused_signature_is_refused_again(counted):
    checks, runs = counted
    for _ in range(2):
        with pytest.raises(ValueError, match=r"an_op: x must have shape \[B, D\], got \[2\]"):
            checks(torch.zeros(2))
    assert len(runs) == 2


def test_what_is_no_signature_is_checked_at_every_call(counted):
    checks, runs = counted

    class Marked(torch.Tensor):
        """A subclass, which may have shapes that a plain tensor does not have."""

    for _ in range(2):
        checks(torch.zeros(2, 3).as_subclass(Marked))
        checks(torch.zeros(2, 3), [1])
    assert len(runs) == 4


def test_the_memory_of_signatures_is_bounded(counted, monkeypatch):
    monkeypatch.setattr(check, "SIGNATURES", 3)
    checks, runs = counted
    for size in [1, 2, 3, 4, 4, 1]:
        checks(torch.zeros(size, 2))
    assert [shape[0] for shape in runs] == [1, 2, 3, 4, 1]


def test_an_op_refuses_after_a_call_that_fitted():
    x, ids = torch.randn(2, 4, 3), torch.zeros(2, 1, dtype=torch.int64)
    keep_tokens(x, ids)
    with pytest.raises(ValueError, match=r"keep_tokens: ids_keep must have shape \[B=2, M\], got \[3, 1\]"):
        keep_tokens(x, ids[[0, 0, 0]])
    with pytest.raises(TypeError, match="keep_tokens: ids_keep must be int64, got int32"):
        keep_tokens(x, ids.int())
