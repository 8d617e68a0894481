"""Every tensor of every op at the end, and at the start, of its memory, beside a page that must not be touched.

A kernel that reads or writes one element too far ends the process by a signal, so the calls run in a child process.
"""

import subprocess
import sys

import pytest

CHILD = """
import ctypes, faulthandler, mmap, random, sys
import torch
from tests.attack.ops import CALLS, public_ops, tensors_in
from fastssl import ops

faulthandler.enable()
page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
kept = []  # mappings that tensors lie in

def guarded(x, at_end):
    size = max(1, x.numel()) * x.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = (1 + pages) * page - size if at_end else page
    flat = torch.frombuffer(memory, dtype=x.dtype, count=max(1, x.numel()), offset=offset)
    copy = flat[: x.numel()].view(x.shape).copy_(x)
    for guard in (start, start + (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0, ctypes.get_errno()
    kept.append(memory)
    return copy.requires_grad_(x.is_floating_point())

def moved(value, at_end):
    if isinstance(value, torch.Tensor):
        return guarded(value, at_end)
    if isinstance(value, ops.Running):
        return value._replace(mean=moved(value.mean, at_end).detach(), var=moved(value.var, at_end).detach())
    if isinstance(value, ops.PrototypeTargets):
        return ops.PrototypeTargets(*(moved(x, at_end).detach() if isinstance(x, torch.Tensor) else x for x in value))
    return [moved(item, at_end) for item in value] if isinstance(value, list) else value

def expanded(value):
    if isinstance(value, ops.PrototypeTargets):
        return ops.PrototypeTargets(*map(expanded, value))
    # the last element, which lies at the guard, through a stride of 0
    return value[-1:].detach().expand_as(value) if isinstance(value, torch.Tensor) and value.ndim else value

seed, rounds = map(int, sys.argv[1:])
torch.set_num_threads(1)
for name, op in public_ops().items():
    for number in range(rounds):
        torch.manual_seed(seed + number)
        drawn = CALLS[name](random.Random(seed + number))
        dtype = (torch.float32, torch.bfloat16, torch.float64)[number % 3]
        in_place = name in ("augment_", "enqueue_", "ema_update_", "resized_crops_", "update_bank_")
        print(name, number, file=sys.stderr)
        for at_end in (True, False):
            cast = {
                key: value.to(dtype)
                if isinstance(value, torch.Tensor) and value.is_floating_point() and not in_place
                else value
                for key, value in drawn.items()
            }
            arguments = {key: moved(value, at_end) for key, value in cast.items()}
            without = ("info_nce", "prototype_lse", "random_masking", "sampled_info_nce", "sampled_nce")
            if in_place or name in without:
                arguments = {
                    key: value.detach() if isinstance(value, torch.Tensor) and (in_place or key != "q") else value
                    for key, value in arguments.items()
                }
                if name == "ema_update_":
                    arguments = {
                        key: [x.detach() for x in value] if isinstance(value, list) else value
                        for key, value in arguments.items()
                    }
            outputs = [x for x in tensors_in(op(**arguments)) if x.requires_grad and x.grad_fn is not None]
            if outputs:
                sum(x.double().sum() for x in outputs).backward()
            if not in_place:
                for key in drawn:
                    op(**arguments | {key: expanded(arguments[key])})
print("no page was touched")
"""


def touches_no_guard_page(seed: int, rounds: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(seed), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.stdout == "no page was touched\n", f"status {done.returncode}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_guard_pages(seed):
    touches_no_guard_page(seed, 3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("round", range(4))
def test_many_guard_pages(round, seed):
    touches_no_guard_page(1000 * seed + 100 * round + 3, 60)
