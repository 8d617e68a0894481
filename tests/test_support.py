"""The tests' own helpers: a seed that a failure reports, and error checks that can fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.contract import refused, rejects
from tests.support.fixtures import SEED_VARIABLE

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_failed_test_reports_its_seed(tmp_path):
    (tmp_path / "test_failing.py").write_text(
        "import torch\n\n\ndef test(seed):\n    assert torch.initial_seed() != seed\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.fixtures", "-p", "no:cacheprovider"]
    environment = os.environ | {SEED_VARIABLE: "7"}
    run = subprocess.run([*command, "--rootdir", tmp_path, tmp_path], cwd=ROOT, env=environment, capture_output=True)
    assert run.returncode == 1
    assert f"{SEED_VARIABLE}=7" in run.stdout.decode()


def fail(sentence: str) -> None:
    raise ValueError(sentence)


def test_rejects_looks_for_op_argument_and_value():
    rejects("op", "keep", "0", ValueError, fail, "op: keep must be at least 1, got 0")
    rejects("op", "x", "[2, 3]", ValueError, fail, "op: x must have shape [B], got [2, 3]; flatten it")
    for sentence in (
        "other: keep must be at least 1, got 0",
        "op: keeps must be at least 1, got 0",
        "op: keep must be at least 1, got 0.5",
        "op: keep must be at least 0",
    ):
        with pytest.raises(AssertionError, match="must be named"):
            rejects("op", "keep", "0", ValueError, fail, sentence)


@pytest.mark.parametrize(
    "check", [lambda: refused("op: no", ValueError, str, 1), lambda: rejects("op", "x", "1", ValueError, str, 1)]
)
def test_accepted_input_fails_the_check(check):
    with pytest.raises(AssertionError, match="accepted"):
        check()
