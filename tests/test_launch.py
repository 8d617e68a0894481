"""How a process was started, read from environment variables as the launchers set them."""

import pytest

from fastssl.launch import BY_HAND, Launch, read_launch
from tests.support.contract import refused

MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
HAND = {"RANK": "1", "WORLD_SIZE": "4"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
JOB = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {
    **JOB,
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
TORCHRUN = {
    **{"TORCHELASTIC_RUN_ID": "none", "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "host", "MASTER_PORT": "1234"},
}

TOGETHER = {
    "torchrun": (TORCHRUN, Launch("torchrun", 2, 4, 0, 2, "host", 1234)),
    "torchrun below srun": ({**STEP, **TORCHRUN}, Launch("torchrun", 2, 4, 0, 2, "host", 1234)),
    "by hand on one machine": ({**HAND, **MASTER}, Launch(BY_HAND, 1, 4, 1, 4, "127.0.0.1", 29511)),
    "by hand on several": (
        {**HAND, **MASTER, "MASTER_ADDR": "10.0.0.1"},
        Launch(BY_HAND, 1, 4, None, 1, "10.0.0.1", 29511),
    ),
    "by hand with a local rank": (
        {**HAND, **MASTER, "MASTER_ADDR": "a", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        Launch(BY_HAND, 1, 4, 0, 2, "a", 29511),
    ),
    "Open MPI on one machine": (
        {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "8"},
        Launch("mpirun", 5, 8, 1, 8, "127.0.0.1", 29500),
    ),
    "Open MPI on several": (
        {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", **MASTER, "MASTER_ADDR": "a"},
        Launch("mpirun", 5, 8, 1, 4, "a", 29511),
    ),
    "Open MPI whose daemons SLURM started": (
        {**STEP, "SLURM_STEP_NUM_TASKS": "2", **OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_PORT": "1"},
        Launch("mpirun", 5, 8, 1, 4, "gpu07", 1),
    ),
    "MPICH": ({**HYDRA, "MASTER_PORT": "7"}, Launch("mpirun", 3, 4, 3, 4, "127.0.0.1", 7)),
    "srun": ({**STEP, "MASTER_PORT": "7"}, Launch("srun", 3, 4, 1, 2, "gpu07", 7)),
    "srun with the address and the number set by hand": (
        {**STEP, **MASTER, "WORLD_SIZE": "4"},
        Launch("srun", 3, 4, 1, 2, "127.0.0.1", 29511),
    ),
}
ALONE = {
    "nothing": {},
    "a world of one": {"RANK": "0", "WORLD_SIZE": "1"},
    "torchrun with one": {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"},
    "WORLD_SIZE=1 alone": {"WORLD_SIZE": "1"},
    "a batch script, or by hand in an allocation": JOB,
    "the shell of salloc": {**STEP, "SLURM_STEP_ID": str(2**32 - 6)},
    "a shell of srun --pty": {**STEP, "SLURM_PTY_PORT": "40000"},
    "srun with one task in a job of four": {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    "another address alone": MASTER,
}


@pytest.mark.parametrize(("environment", "launch"), TOGETHER.values(), ids=TOGETHER)
def test_processes_started_together(environment, launch):
    assert read_launch(environment) == launch


@pytest.mark.parametrize("environment", ALONE.values(), ids=ALONE)
def test_a_process_alone(environment):
    assert read_launch(environment) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu-1,gpu-2", "gpu-1"),
        ("a.b.c[03-05,07],x1", "a.b.c03"),
        ("n[1,3]-ib", "n1-ib"),
        ("rack[1-2]node[3-4]", None),
        ("", None),
    ],
)
def test_first_machine_of_slurms_list(nodes, first):
    environment = {**STEP, "SLURM_STEP_NODELIST": nodes}
    if first is not None:
        assert read_launch(environment).address == first
        return
    sentence = (
        "distributed: srun started 4 processes on several machines: set MASTER_ADDR to the machine of rank 0 "
        "(export MASTER_ADDR=HOST)"
    )
    refused(sentence, ValueError, read_launch, environment)


def test_ranks_of_a_job_meet_at_one_port_and_other_jobs_at_another():
    ports = [
        read_launch({**STEP, **changes}).port
        for changes in (
            {},
            {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            {"SLURM_JOB_ID": "4712"},
            {"SLURM_STEP_ID": "1"},
        )
    ]
    assert ports[0] == ports[1] and len(set(ports)) == 3
    assert all(15000 <= port < 30000 for port in ports)


REFUSED = {
    "WORLD_SIZE alone": (
        {"WORLD_SIZE": "4"},
        "distributed: WORLD_SIZE=4 is set and RANK is not: set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for every "
        "process, or unset WORLD_SIZE for a process alone",
    ),
    "RANK alone": (
        {"RANK": "1"},
        "distributed: RANK=1 is set and WORLD_SIZE is not: set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for every "
        "process, or unset RANK for a process alone",
    ),
    "no address": (
        HAND,
        "distributed: RANK=1 and WORLD_SIZE=4 are set and MASTER_ADDR and MASTER_PORT not: set MASTER_ADDR to the "
        "machine of rank 0 and MASTER_PORT to a free port of it, such as MASTER_ADDR=127.0.0.1 MASTER_PORT=29500, or "
        "start with torchrun --nproc-per-node 4 -m fastssl …",
    ),
    "no number": ({**HAND, **MASTER, "RANK": "one"}, "distributed: RANK must be a number, got 'one'"),
    "a rank too many": (
        {**HAND, **MASTER, "RANK": "4"},
        "distributed: RANK must be at least 0 and below WORLD_SIZE=4, got 4",
    ),
    "a port that is no number": (
        {**HAND, **MASTER, "MASTER_PORT": "tcp"},
        "distributed: MASTER_PORT must be a number, got 'tcp'",
    ),
    "a port that there is not": (
        {**HAND, **MASTER, "MASTER_PORT": "99999"},
        "distributed: MASTER_PORT must be from 1 to 65535, got 99999",
    ),
    "a world of none": ({**HAND, "WORLD_SIZE": "0"}, "distributed: WORLD_SIZE must be at least 1, got 0"),
    "mpirun on several machines": (
        {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
        "distributed: mpirun started 8 processes on several machines: set MASTER_ADDR to the machine of rank 0 (mpirun "
        "-x MASTER_ADDR=HOST …, or -genv MASTER_ADDR HOST)",
    ),
}


@pytest.mark.parametrize(("environment", "sentence"), REFUSED.values(), ids=REFUSED)
def test_incomplete_variables_are_refused_in_one_sentence(environment, sentence):
    refused(sentence, ValueError, read_launch, environment)
