"""The checks and counts of tests/kernels/interpreter.py."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.kernels.interpreter import watch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is not interpreted")


@triton.jit
def copy(x_ptr, out_ptr, n, shift, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i + shift, mask=i < n), mask=i < n)


@triton.jit
def put_all(x_ptr, start, ONE_CELL: tl.constexpr):
    """Every program writes to the same cells; with ONE_CELL every lane to one cell."""
    lane = tl.arange(0, 4)
    tl.store(x_ptr + start + (lane * 0 if ONE_CELL else lane), lane.to(tl.float32))


@triton.jit
def read_after_write(x_ptr, READS_FIRST: tl.constexpr):
    """Program 0 writes a cell that program 1 reads, before or after it."""
    reads = tl.program_id(0) == (0 if READS_FIRST else 1)
    value = tl.load(x_ptr, mask=reads, other=0.0)
    tl.store(x_ptr, value + 1, mask=reads == 0)


@triton.jit
def product(a_ptr, b_ptr, out_ptr):
    offset = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + offset), tl.load(b_ptr + offset)
    tl.store(out_ptr + offset, tl.dot(a, b))


@triton.jit
def add(a_ptr, b_ptr, CONVERT: tl.constexpr):
    offset = tl.arange(0, 16)
    a, b = tl.load(a_ptr + offset), tl.load(b_ptr + offset)
    if CONVERT:
        a, b = a.to(tl.float32), b.to(tl.float32)
    tl.store(a_ptr + offset, (a + b).to(tl.bfloat16))


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
def test_an_access_outside_its_argument_raises(shift, view):
    """Also where the memory beyond the argument belongs to the same storage."""
    x, out = torch.zeros(30)[10:20][view], torch.zeros(10)
    with watch(), pytest.raises(InterpreterError, match="1 lanes load outside every argument"):
        copy[(3,)](x, out, 10, shift, BLOCK=4)
    with watch(), pytest.raises(InterpreterError, match="store outside every argument"):
        put_all[(1,)](out, 8, ONE_CELL=False)


def test_two_programs_that_write_one_cell_raise():
    with watch(), pytest.raises(InterpreterError, match=r"race: put_all.x_ptr is written where another program writes"):
        put_all[(2,)](torch.zeros(4), 0, ONE_CELL=False)
    with watch(), pytest.raises(InterpreterError, match=r"one store writes a cell of put_all.x_ptr twice"):
        put_all[(1,)](torch.zeros(4), 0, ONE_CELL=True)


@pytest.mark.parametrize(
    "reads_first, sentence",
    [(False, "is read where another program writes"), (True, "is written where another program reads")],
)
def test_a_program_that_reads_a_cell_of_another_raises(reads_first, sentence):
    with watch(), pytest.raises(InterpreterError, match=sentence):
        read_after_write[(2,)](torch.zeros(1), READS_FIRST=reads_first)


def test_bfloat16_is_correct():
    a, b, out = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    with watch() as seen:
        product[(1,)](a, b, out)
    torch.testing.assert_close(out, a.float() @ b.float())
    assert seen.operations == 2 * 16**3

    a, b = torch.randn(16).bfloat16(), torch.randn(16).bfloat16()
    expected = a + b
    with watch(), pytest.raises(InterpreterError, match="arithmetic on bfloat16: convert"):
        add[(1,)](a, b, CONVERT=False)
    with watch():
        add[(1,)](a, b, CONVERT=True)
    assert torch.equal(a, expected)


def test_the_interpreter_is_restored_afterwards():
    before = dict(vars(triton.runtime.interpreter.InterpreterBuilder))
    with watch():
        pass
    assert dict(vars(triton.runtime.interpreter.InterpreterBuilder)) == before
