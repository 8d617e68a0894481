"""Every Triton kernel at the recipes' sizes, compiled for every architecture; `make static` compiles them all.

In a process of its own, because where there is no GPU the kernels of this one are interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import static

ROOT = Path(__file__).parent.parent.parent
ONLY_MOVE = {
    "random_masking",
    "keep_tokens",
    "restore_tokens",
    "patchify",
    "keep_patches",
    "masked_patch_mse",
    "enqueue_",
    "block_mask",
    "ema_update_",
    "sampled_info_nce",
    "sampled_nce",
    "update_bank_",
    "normalise",
}
ROW = {
    "arch": "sm_80",
    "op": "info_nce",
    "size": "D=1, bf16",
    "kernel": "info_nce_fwd_kernel",
    "config": "",
    "registers": 110,
    "spill_bytes": 0,
    "shared_bytes": 1024,
    "tensor_core": "mma.sync",
    "product": True,
}


def compiler(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.static", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
def test_recipes_compile_for_every_architecture():
    """No spills, no local memory, shared memory that the card has, tensor cores in every product, and at most a tenth
    more registers than are recorded."""
    done = compiler("--check")
    assert done.returncode == 0, done.stderr
    assert "0 faults" in done.stderr


@pytest.mark.slow
def test_rows_hold_the_static_model():
    done = compiler("--json", "--arch", "sm_90")
    rows = json.loads(done.stdout)
    names = {"op", "kernel", "arch", "config", "registers", "spill_bytes", "shared_bytes", "tensor_core"}
    assert all(names <= row.keys() for row in rows)
    predicted = [row for row in rows if "predicted_us" in row]
    assert {row["op"] for row in predicted} >= {"info_nce", "batch_info_nce", "attention", "keep_tokens"}
    for row in predicted:
        assert row["bytes_moved"] >= row["bytes_min"] > 0 and row["predicted_us"] > 0 and "H100" in row["predicted_at"]
    for row in predicted:
        if row["op"].split(",")[0] in ONLY_MOVE:
            assert row["bytes_moved"] <= 1.1 * row["bytes_min"], row["op"]
    moco = next(row for row in predicted if row["op"] == "info_nce")
    assert moco["programs"] >= 0.9 * 132, "the queue is not cut into enough parts to fill the card"


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"spill_bytes": 8}, "8 bytes are spilled"),
        ({"shared_bytes": 163 * 1024 + 1}, "bytes of shared memory, the limit is 166912"),
        ({"tensor_core": None}, "a matrix product without tensor-core instructions"),
        ({"registers": 111}, "111 registers, 100 were recorded"),
        ({"kernel": "other_kernel"}, "not in resources.json"),
    ],
)
def test_faults_are_found(change, sentence):
    recorded = {static.key(ROW): 100}
    assert static.faults([ROW], recorded) == []
    (said,) = static.faults([ROW | change], recorded)
    assert sentence in said
