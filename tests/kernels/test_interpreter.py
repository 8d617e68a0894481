"""The watch over Triton's interpreter finds what it is there to find."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.kernels.interpreter import watch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")


@triton.jit
def copy(x_ptr, out_ptr, n, shift, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at + shift, mask=at < n), mask=at < n)


@triton.jit
def put_all(x_ptr, where, ONE_CELL: tl.constexpr):
    """Every program writes to the same place; with ONE_CELL every lane too."""
    at = tl.arange(0, 4)
    tl.store(x_ptr + where + (at * 0 if ONE_CELL else at), at.to(tl.float32))


@triton.jit
def read_after_write(x_ptr, READS_FIRST: tl.constexpr):
    """Program 0 writes what program 1 reads, or the other way round."""
    reads = tl.program_id(0) == (0 if READS_FIRST else 1)
    value = tl.load(x_ptr, mask=reads, other=0.0)
    tl.store(x_ptr, value + 1, mask=reads == 0)


@triton.jit
def product(a_ptr, b_ptr, out_ptr):
    at, to = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + at * 16 + to), tl.load(b_ptr + at * 16 + to)
    tl.store(out_ptr + at * 16 + to, tl.dot(a, b))


@triton.jit
def add(a_ptr, b_ptr, WIDEN: tl.constexpr):
    at = tl.arange(0, 16)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    tl.store(a_ptr + at, (a + b).to(tl.bfloat16))


def test_bytes_are_counted_by_argument_under_masks():
    x, out = torch.randn(10), torch.empty(10)
    with watch() as seen:
        copy[(3,)](x, out, 10, 0, BLOCK=4)
    assert torch.equal(x, out)
    assert seen.requested == seen.distinct == {"copy.x_ptr": 40, "copy.out_ptr": 40}
    with watch() as seen:
        copy[(3,)](x[:1].expand(10).contiguous(), out, 3, 0, BLOCK=4)
    assert seen.bytes == 24 and seen.launches == [("copy", (3,))]


@pytest.mark.parametrize("shift, view", [(1, slice(0, 10)), (-1, slice(0, 10)), (0, slice(0, 9))])
def test_an_access_outside_its_argument_is_found(shift, view):
    """Also where the memory behind the argument belongs to the same storage."""
    x, out = torch.zeros(30)[10:20][view], torch.zeros(10)
    with watch(), pytest.raises(InterpreterError, match="1 lanes load outside every argument"):
        copy[(3,)](x, out, 10, shift, BLOCK=4)
    with watch(), pytest.raises(InterpreterError, match="store outside every argument"):
        put_all[(1,)](out, 8, ONE_CELL=False)


def test_two_programs_that_write_one_cell_are_found():
    with watch(), pytest.raises(InterpreterError, match=r"race: put_all.x_ptr is written where another program writes"):
        put_all[(2,)](torch.zeros(4), 0, ONE_CELL=False)
    with watch(), pytest.raises(InterpreterError, match=r"one store writes a cell of put_all.x_ptr twice"):
        put_all[(1,)](torch.zeros(4), 0, ONE_CELL=True)


@pytest.mark.parametrize(
    "reads_first, sentence",
    [(False, "is read where another program writes"), (True, "is written where another program reads")],
)
def test_a_program_that_reads_what_another_writes_is_found(reads_first, sentence):
    with watch(), pytest.raises(InterpreterError, match=sentence):
        read_after_write[(2,)](torch.zeros(1), READS_FIRST=reads_first)


def test_bfloat16_is_right():
    a, b, out = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    with watch() as seen:
        product[(1,)](a, b, out)
    torch.testing.assert_close(out, a.float() @ b.float())
    assert seen.operations == 2 * 16**3

    a, b = torch.randn(16).bfloat16(), torch.randn(16).bfloat16()
    expected = a + b
    with watch(), pytest.raises(InterpreterError, match="arithmetic on bfloat16: widen"):
        add[(1,)](a, b, WIDEN=False)
    with watch():
        add[(1,)](a, b, WIDEN=True)
    assert torch.equal(a, expected)


def test_the_interpreter_is_as_it_was_afterwards():
    before = dict(vars(triton.runtime.interpreter.InterpreterBuilder))
    with watch():
        pass
    assert dict(vars(triton.runtime.interpreter.InterpreterBuilder)) == before
