"""The collectives in one process, where they return their argument, and in two and three over gloo; processes that
were started together without torchrun."""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastssl import distributed
from fastssl.distributed import (
    all_gather,
    all_gather_with_grad,
    all_mean,
    all_sum,
    all_to_all,
    rank,
    shuffle,
    unshuffle,
    world_size,
)
from fastssl.launch import BY_HAND, Launch
from fastssl.nn import l2_normalize
from fastssl.nn.norm import SyncBatchNorm, sync_batch_norms
from fastssl.ops import batch_info_nce
from tests.support.contract import refused
from tests.support.ranks import run_ranks, start_process


def collectives():
    """Every rank has the numbers 100·rank + row."""
    world, this_rank = world_size(), rank()
    x = (100.0 * this_rank + torch.arange(3)).unsqueeze(1).requires_grad_()
    rows_of_all = torch.cat([100.0 * r + torch.arange(3) for r in range(world)]).unsqueeze(1)
    assert torch.equal(all_gather(x), rows_of_all)
    assert not any(f(x).requires_grad for f in (all_gather, all_mean, lambda x: unshuffle(*shuffle(x))))
    gathered = all_gather_with_grad(x)
    assert torch.equal(gathered, rows_of_all)
    (gathered.squeeze(1) * torch.arange(1.0, 3 * world + 1) * (this_rank + 1)).sum().backward()
    ranks = sum(r + 1 for r in range(world))  # the gradient of the sum of all ranks' losses
    assert torch.equal(x.grad.squeeze(1), (torch.arange(1.0, 4) + 3 * this_rank) * ranks)

    rows = (10.0 * this_rank + torch.arange(world)).requires_grad_()
    received = all_to_all(rows)
    assert received.tolist() == [10.0 * r + this_rank for r in range(world)]
    (received * torch.arange(1.0, world + 1)).sum().backward()
    assert rows.grad.tolist() == [this_rank + 1.0] * world
    assert all_to_all(torch.full((world,), this_rank)).tolist() == list(range(world))

    y = torch.ones(2, requires_grad=True)
    total = all_sum(y * (this_rank + 1))
    assert total.tolist() == [ranks, ranks]
    total.sum().backward()
    assert y.grad.tolist() == [world * (this_rank + 1.0)] * 2
    return True


def shuffle_and_unshuffle(batch):
    world, this_rank = world_size(), rank()
    torch.manual_seed(this_rank)
    samples = 100 * this_rank + torch.arange(batch).unsqueeze(1).expand(batch, 2)
    shuffled, order = shuffle(samples)
    assert torch.equal(unshuffle(shuffled, order), samples)
    assert sorted(all_gather(shuffled)[:, 0].tolist()) == sorted(all_gather(samples)[:, 0].tolist())
    per_rank = torch.bincount(shuffled[:, 0] // 100, minlength=world)
    assert per_rank.max() - per_rank.min() <= 1, "every rank has equal shares of all batches"
    return shuffled[:, 0].tolist()


def test_in_one_process_collectives_return_their_argument():
    assert (world_size(), rank()) == (1, 0)
    assert collectives()
    x = torch.randn(4, 2, requires_grad=True)
    assert all(torch.equal(f(x), x) for f in (all_gather, all_gather_with_grad, all_sum, all_mean))
    assert torch.equal(all_to_all(x[:1]), x[:1])
    assert len(set(map(tuple, (shuffle_and_unshuffle(6) for _ in range(3))))) == 1  # the same seed, the same order
    assert shuffle_and_unshuffle(6) != list(range(6))


@pytest.mark.parametrize("world", [2, 3])
def test_collectives(world):
    assert all(run_ranks(world, collectives))


@pytest.mark.parametrize(("world", "batch"), [(2, 5), (3, 4), (3, 1)])
def test_shuffle_sends_every_sample_once_and_unshuffle_returns_it(world, batch):
    shuffled = run_ranks(world, shuffle_and_unshuffle, batch)
    assert sorted(itertools.chain(*shuffled)) == sorted(100 * r + i for r in range(world) for i in range(batch))


def contrastive_loss():
    """The line that docs/drop-in.md gives for MoCo v3's `contrastive_loss`; the keys must not be trained."""
    q, k = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    tau = 0.2
    keys = all_gather(l2_normalize(k))
    loss = 2 * tau * batch_info_nce(l2_normalize(q), keys, tau, label_offset=rank() * len(k)).loss.mean()
    loss.backward()
    return q.grad.abs().sum() > 0 and k.grad is None


@pytest.mark.parametrize("world", [1, 2])
def test_gathered_keys_get_no_gradient_on_any_number_of_ranks(world):
    assert contrastive_loss() if world == 1 else all(run_ranks(world, contrastive_loss))


PIPES: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def started_by_hand(rank, world, port):
    """This process with the variables of a rank; a process group that is left behind fails."""
    variables = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    yield
    assert not dist.is_initialized()


def in_processes(world, function, *args, seconds=60):
    """Calls ``function(rank, *args)`` in `world` processes that are not connected; each must end well."""
    processes = [start_process(function, rank, *args) for rank in range(world)]
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging and [process.exitcode for process in processes] == [0] * world


@distributed.group_scope()
def ranks_that_joined():
    assert distributed.setup(torch.device("cpu")) == torch.device("cpu")
    assert distributed.local_world_size() == distributed.world_size() == 2
    return all_gather(torch.tensor([rank()])).tolist()


def join_twice_by_hand(this_rank, port):
    with started_by_hand(this_rank, 2, port):
        for _ in range(2):  # as two calls of a program, each of which leaves no group behind
            assert ranks_that_joined() == [0, 1]
            assert not dist.is_initialized() and distributed.world_size() == 1
        with distributed.group_scope():
            distributed.setup(torch.device("cpu"))
            assert ranks_that_joined() == [0, 1]
            assert dist.is_initialized(), "a group that existed before is left alone"


def test_processes_join_by_variables_set_by_hand():
    """Two real processes over gloo; before, each would have trained alone and written the same folder."""
    in_processes(2, join_twice_by_hand, free_port())


PROGRAM = """
import sys
import torch.distributed as dist
import fastssl

def main():
    settings = {"decoder_depth": 1, "epochs": 1, "batch_size": 32, "tensorboard": False, "workers": 0}
    run = fastssl.pretrain("mae", "shapes:count=64", folder=sys.argv[1], **settings)
    assert not dist.is_initialized(), "pretrain leaves its process group"
    accuracies = [run.knn(k=3)[3] for _ in range(2)]
    assert not dist.is_initialized(), "and so does an evaluation"
    print(f"accuracies {accuracies}\\n", end="", flush=True)  # one write: two ranks share the pipe

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "by hand"])
def test_a_program_on_two_ranks_leaves_no_process_group(tmp_path, launcher):
    """`fastssl.pretrain` and then evaluations from Python, under torchrun and with variables set by hand."""
    program, folder, port = tmp_path / "program.py", tmp_path / "run", str(free_port())
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    if launcher == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
        started = [subprocess.Popen([sys.executable, *torchrun, *command[1:]], env=environment, **PIPES)]
    else:
        environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started = [subprocess.Popen(command, env={**environment, "RANK": str(r)}, **PIPES) for r in range(2)]
    try:
        out = "".join(process.communicate(timeout=120)[0] for process in started)
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), out
    assert "batch 32 over 2 ranks" in out, out
    lines = [line for line in out.splitlines() if line.startswith("accuracies")]
    assert len(lines) == 2 and lines[0] == lines[1]
    assert "destroy_process_group" not in out


def miss_a_peer(this_rank, port, folder):
    distributed.FIRST_WAIT = 2
    with started_by_hand(this_rank, 3, port):
        try:
            distributed.setup(torch.device("cpu"))
        except ValueError as error:
            Path(folder, str(this_rank)).write_text(str(error))
        time.sleep(1)  # rank 0 holds the store


def test_a_missing_process_is_named_in_one_sentence(tmp_path):
    port = free_port()
    in_processes(2, miss_a_peer, port, tmp_path)
    for this_rank in (0, 1):
        assert (tmp_path / str(this_rank)).read_text() == (
            f"distributed: rank {this_rank} of 3 waited 2 s at 127.0.0.1:{port} for rank 2: all ranks make the same "
            "calls; start all 3 alike, or a process alone without RANK and WORLD_SIZE"
        )


def test_a_missing_rank_0_and_a_port_in_use(monkeypatch):
    monkeypatch.setattr(distributed, "FIRST_WAIT", 1)
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(ValueError, match=rf"rank 0 of 2 can't open 127.0.0.1:{port}: set MASTER_PORT to a free"):
            distributed._meet(Launch(BY_HAND, 0, 2, 0, 2, "127.0.0.1", port))
    launch = Launch(BY_HAND, 1, 2, 1, 2, "127.0.0.1", free_port())
    sentence = rf"rank 1 of 2 found no rank 0 at 127.0.0.1:{launch.port} in 1 s: start all 2 alike, or a process alone"
    with pytest.raises(ValueError, match=sentence):
        distributed._meet(launch)


def test_a_machine_that_there_is_not_is_named_at_once(monkeypatch):
    def unknown(*_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ValueError) as error:
        distributed._meet(Launch(BY_HAND, 1, 2, 1, 2, "no.such\nhost", 29500))
    assert str(error.value) == (
        r"distributed: rank 1 of 2 knows no machine 'no.such\nhost': set MASTER_ADDR to the name or number of the "
        "machine of rank 0"
    )


def test_the_gpu_of_a_process():
    def index(local_rank, count, restricted=False, launcher="srun"):
        return distributed.gpu_index(Launch(launcher, 5, 8, local_rank, 4, "a", 1), count, restricted)

    assert [index(r, 4) for r in range(4)] == [0, 1, 2, 3]
    assert index(3, 1, restricted=True) == 0, "srun --gpus-per-task=1 gives each process one"
    assert index(None, 1) == 0
    refused(
        "distributed: rank 5 sees 4 GPUs: set LOCAL_RANK to the number of the process on its machine, 0, 1, …",
        *(ValueError, index, None, 4),
    )
    sentence = "has 1: start one process for each GPU, or use --device cpu"
    for case in ((1, 1), (1, 1, True, "torchrun")):
        refused(f"distributed: rank 5 needs GPU 1 of its machine, which {sentence}", ValueError, index, *case)


BATCH_NORM_INPUTS = {"1d": (6, 3), "2d": (6, 3, 4, 5)}


def batch_norm(shape, affine, dtype):
    norm = torch.nn.BatchNorm1d(3, affine=affine) if len(shape) == 2 else torch.nn.BatchNorm2d(3, affine=affine)
    if affine:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    x = torch.randn(shape, dtype=dtype) * 3 + 50  # a mean that one-pass variance would cancel against
    return norm.to(dtype), x, torch.randn(shape, dtype=dtype)


def sync_batch_norm(shape, affine, dtype, sizes):
    norm, x, upstream = batch_norm(shape, affine, dtype)
    holder = sync_batch_norms(torch.nn.Sequential(norm))
    assert isinstance(holder[0], SyncBatchNorm)
    x, upstream = (t.split(sizes)[rank()].clone() for t in (x, upstream))
    x.requires_grad_()
    out = holder(x)
    (out * upstream).sum().backward()
    parameters = [all_sum(p.grad) for p in holder.parameters()]
    holder.eval()(x)
    return out.detach(), x.grad, parameters, holder.state_dict()


@pytest.mark.parametrize("shape", BATCH_NORM_INPUTS.values(), ids=BATCH_NORM_INPUTS)
@pytest.mark.parametrize(("affine", "sizes"), [(True, [3, 3]), (False, [4, 2])])
def test_sync_batch_norm_on_cpus_is_a_batch_norm_of_the_whole_batch(shape, affine, sizes):
    torch.manual_seed(0)
    norm, x, upstream = batch_norm(shape, affine, torch.float64)
    x.requires_grad_()
    out = norm(x)
    (out * upstream).sum().backward()
    outs, dxs, parameters, states = zip(*run_ranks(2, sync_batch_norm, shape, affine, torch.float64, sizes))
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(torch.cat(outs), out.detach(), **close)
    torch.testing.assert_close(torch.cat(dxs), x.grad, **close)
    for gradients, state in zip(parameters, states):
        torch.testing.assert_close(gradients, [p.grad for p in norm.parameters()], **close)
        expected = {f"0.{name}": value for name, value in norm.state_dict().items()}
        torch.testing.assert_close(state, type(state)(expected), **close)


def test_sync_batch_norms_changes_nothing_in_one_process():
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    assert type(sync_batch_norms(module)[0]) is torch.nn.BatchNorm1d
    x = torch.randn(4, 3)
    norm = SyncBatchNorm(3)
    torch.testing.assert_close(norm(x), module(x))
    torch.testing.assert_close(norm.state_dict(), module[0].state_dict())
