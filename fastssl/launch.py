"""How this process was started: alone, or with others by torchrun, mpirun, srun, or by variables set by hand."""

import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple

BY_HAND = "RANK and WORLD_SIZE"  # value of `Launch.launcher` for variables that no launcher of this list has set
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Launch(NamedTuple):
    """This process among those that were started together, and where they meet."""

    launcher: str  # "torchrun", "mpirun", "srun" or `BY_HAND`
    rank: int  # number of this process, 0 … world_size − 1
    world_size: int  # number of processes
    local_rank: int | None  # number of this process on its machine; None if no variable gives it
    local_world_size: int  # number of processes on this machine, 1 if no variable gives it
    address: str  # name or number of the machine of rank 0
    port: int  # free port of that machine


_VARIABLES = (  # launcher: rank, world size, local rank, local world size
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    (
        "mpirun",  # Open MPI
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


def read_launch(environment: Mapping[str, str]) -> Launch | None:
    """How a process with these environment variables was started; None for a process alone.

    The variables of torchrun, which can also be set by hand, go first, then those of mpirun (Open MPI, MPICH, Intel
    MPI), then those of srun. A process that is started by hand inside an allocation of SLURM is alone: only srun sets
    the number of a step. MASTER_ADDR and MASTER_PORT are taken where they are set.

    Args:
        environment: such as `os.environ`.

    Raises:
        ValueError: variables are incomplete, are no numbers, or contradict each other.
    """
    for launcher, *names in _VARIABLES:
        if names[0] not in environment or names[1] not in environment:
            continue
        if launcher == "srun" and not _is_in_step(environment):
            continue
        rank, world_size = (_number(environment, name) for name in names[:2])
        if world_size == 1:
            return None
        if world_size < 1:
            raise ValueError(f"distributed: {names[1]} must be at least 1, got {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(
                f"distributed: {names[0]} must be at least 0 and below {names[1]}={world_size}, got {rank}"
            )
        if launcher == "torchrun" and "TORCHELASTIC_RUN_ID" not in environment:
            launcher = BY_HAND
        local_rank, local_world_size = (
            _number(environment, name) if name in environment else None for name in names[2:]
        )
        address, port = _meeting(launcher, rank, world_size, local_world_size, environment)
        if launcher == BY_HAND and address in LOOPBACK:  # all processes are on this machine
            local_rank = rank if local_rank is None else local_rank
            local_world_size = world_size if local_world_size is None else local_world_size
        return Launch(launcher, rank, world_size, local_rank, local_world_size or 1, address, port)
    if environment.get("WORLD_SIZE", "1") != "1" or "RANK" in environment:
        there, missing = ("RANK", "WORLD_SIZE") if "RANK" in environment else ("WORLD_SIZE", "RANK")
        raise ValueError(
            f"distributed: {there}={environment[there]} is set and {missing} is not: set RANK, WORLD_SIZE, MASTER_ADDR "
            f"and MASTER_PORT for every process, or unset {there} for a process alone"
        )
    return None


def _is_in_step(environment: Mapping[str, str]) -> bool:
    """True for a task of srun; not for the shell of salloc or ``srun --pty``, nor for a batch script."""
    step = environment.get("SLURM_STEP_ID", "")
    special = step.isdecimal() and int(step) >= 2**32 - 6  # steps of salloc's shell, of batch scripts and of SLURM
    return step.isdecimal() and not special and "SLURM_PTY_PORT" not in environment


def _number(environment: Mapping[str, str], name: str) -> int:
    """A variable's number; of SLURM's lists such as 4(x2),1 the first."""
    match = re.match(r"\d+(?=$|\(x|,)" if name.startswith("SLURM") else r"\d+$", environment[name])
    if not match:
        raise ValueError(f"distributed: {name} must be a number, got {environment[name]!r}")
    return int(match[0])


def _meeting(
    launcher: str, rank: int, world_size: int, local_world_size: int | None, environment: Mapping[str, str]
) -> tuple[str, int]:
    """Address and port at which the processes meet."""
    given = [name for name in ("MASTER_ADDR", "MASTER_PORT") if environment.get(name)]
    if launcher in ("torchrun", BY_HAND) and len(given) < 2:
        missing = " and ".join(name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in given)
        raise ValueError(
            f"distributed: RANK={rank} and WORLD_SIZE={world_size} are set and {missing} not: set MASTER_ADDR to the "
            "machine of rank 0 and MASTER_PORT to a free port of it, such as MASTER_ADDR=127.0.0.1 MASTER_PORT=29500, "
            f"or start with torchrun --nproc-per-node {world_size} -m fastssl …"
        )
    address = environment.get("MASTER_ADDR") or _address(launcher, world_size, local_world_size, environment)
    port = _number(environment, "MASTER_PORT") if "MASTER_PORT" in given else _port(environment)
    if not 1 <= port <= 65535:
        raise ValueError(f"distributed: MASTER_PORT must be from 1 to 65535, got {port}")
    return address, port


def _address(launcher: str, world_size: int, local_world_size: int | None, environment: Mapping[str, str]) -> str:
    """Address of the machine of rank 0: this one if all processes are here, else the first of SLURM's list."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if local_world_size == world_size:
        return LOOPBACK[0]
    # host lists such as a[03-05,7]-x,b; another form, such as a[1-2]b[3-4], is not read
    match = re.fullmatch(r"([\w.-]+)(?:\[(\d+)[\d,-]*\]([\w.-]*))?(?:,.*)?", nodes)
    if match:
        return "".join(part or "" for part in match.groups())
    export = {"mpirun": "mpirun -x MASTER_ADDR=HOST …, or -genv MASTER_ADDR HOST"}.get(
        launcher, "export MASTER_ADDR=HOST"
    )
    raise ValueError(
        f"distributed: {launcher} started {world_size} processes on several machines: set MASTER_ADDR to the machine "
        f"of rank 0 ({export})"
    )


def _port(environment: Mapping[str, str]) -> int:
    """A port that is the same for all processes of a job and seldom that of another job; below those of connections."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE")
    job = ".".join(environment[name] for name in names if name in environment)
    return 15000 + zlib.crc32(job.encode()) % 15000 if job else 29500
