import pytest
import torch

from fastssl.ops import dispatch, enqueue_
from fastssl.ops import queue as module
from tests.support.close import assert_same
from tests.support.contract import opcheck, refused, rejects, sparse

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("backend", ["kernel", "plain torch"])
@pytest.mark.parametrize("batches", [[4, 4, 4], [7, 7, 7], [10], [25, 3], [0, 1], [10, 10, 3]], ids=str)
@pytest.mark.parametrize("dtypes", [(d, k) for d in DTYPES for k in DTYPES], ids=str)
def test_queue_is_first_in_first_out(backend, batches, dtypes):
    queue, ptr = torch.zeros(10, 3).to(dtypes[0]), torch.zeros(1, dtype=torch.int64)
    arrived = []
    for size in batches:
        keys = torch.randn(size, 3).to(dtypes[1])
        arrived += list(keys)
        if backend == "plain torch":
            with dispatch.reference():
                enqueue_(queue, ptr, keys)
        else:
            enqueue_(queue, ptr, keys)
    assert ptr.item() == len(arrived) % 10
    for age, key in enumerate(reversed(arrived[-10:])):
        assert_same(queue[(len(arrived) - 1 - age) % 10], key.to(dtypes[0]))
    assert (queue[len(arrived) :] == 0).all()


def test_a_pointer_outside_the_queue_wraps_into_it():
    for start in (-3, 17):
        queue, ptr = torch.zeros(10, 2), torch.tensor([start])
        enqueue_(queue, ptr, torch.ones(4, 2))
        rows = [(start + i) % 10 for i in range(4)]
        assert queue[:, 0].nonzero().flatten().tolist() == sorted(rows)
        assert ptr.item() == (start + 4) % 10


def test_enqueue_reads_and_writes_strided_rows():
    store = torch.zeros(10, 8)
    enqueue_(store[:, 2:5], torch.tensor([9]), torch.arange(6.0).reshape(3, 2).T)
    assert store[9, 2:5].tolist() == [0, 2, 4] and store[0, 2:5].tolist() == [1, 3, 5] and store.sum() == 15


def test_offsets_beyond_32_bits():
    queue, ptr, keys = sparse((5, 2), (2**29 + 8, 1)), torch.tensor([3]), torch.randn(3, 2)
    enqueue_(queue, ptr, keys)
    assert_same(queue[[3, 4, 0]], keys)


def test_contract():
    opcheck(module._enqueue_, torch.randn(6, 2), torch.tensor([5]), torch.randn(3, 2))


def test_enqueue_compiles():
    def step(queue, ptr, keys):
        enqueue_(queue, ptr, keys)
        return queue + 1

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        args = torch.randn(6, 3), torch.tensor([4]), torch.randn(4, 3)
        results.append((function(*args), *args))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager)


def test_arguments_that_share_memory_are_refused():
    queue, ptr = torch.randn(6, 2), torch.tensor([0])
    before = queue.clone()
    sentence = "enqueue_: keys must not share memory with queue, got views of the same: pass keys.clone()"
    refused(sentence, ValueError, enqueue_, queue, ptr, queue[2:5])
    sentence = (
        "enqueue_: queue must have no two elements in one place of memory, got shape [6, 2] and strides [0, 1]: pass "
        "queue.clone()"
    )
    refused(sentence, ValueError, enqueue_, queue[:1].expand(6, 2), ptr, torch.zeros(2, 2))
    assert torch.equal(queue, before) and ptr.item() == 0
    halves = torch.zeros(6, 4)  # the columns of one matrix interleave, and share no element
    enqueue_(halves[:, :2], ptr, halves[:3, 2:] + 1)
    enqueue_(halves[:, :2], ptr, halves[:3, 2:])
    assert halves[:3, :2].eq(1).all() and halves[3:, :2].eq(0).all()


def test_error_sentences():
    queue, ptr = torch.zeros(6, 2), torch.tensor([0])
    refused("enqueue_: keys must have shape [N, D=2], got [3, 3]", ValueError, enqueue_, queue, ptr, torch.zeros(3, 3))
    rejects("enqueue_", "ptr", "float32", TypeError, enqueue_, queue, ptr.float(), torch.zeros(3, 2))
    rejects("enqueue_", "queue", "strides [1, 6]", ValueError, enqueue_, torch.zeros(2, 6).T, ptr, torch.zeros(3, 2))
