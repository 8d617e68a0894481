"""The tests of the ops at every lower instruction set of this processor, each with its library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastssl import _C
from fastssl.ops import dispatch

FORCED = "ATEN_CPU_CAPABILITY"  # torch's own switch, which our kernels follow
NOT_ABOUT_KERNELS = "not contract and not compile and not error_sentences"


@pytest.mark.slow
@pytest.mark.skipif(FORCED in os.environ, reason="already inside a forced level")
@pytest.mark.parametrize("level", dispatch.LEVELS)
def test_every_level_that_this_processor_has(level):
    if level not in dispatch.LEVELS[: dispatch.LEVELS.index(_C.processor_level()) + 1]:
        pytest.skip(f"this processor has no {level}")
    environment = os.environ | {FORCED: {"baseline": "default"}.get(level, level)}
    script = f"from fastssl.ops import dispatch; assert dispatch.native_level() == {level!r}, dispatch.native_level()"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    if level != dispatch.native_level():
        command = [sys.executable, "-m", "pytest", Path(__file__).parent, "-q", "-x", "-k", NOT_ABOUT_KERNELS]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-3000:]
