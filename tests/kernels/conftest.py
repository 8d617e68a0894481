"""Collects only the tests of the CUDA C++ kernel where Triton is not installed (CPU builds of torch outside Linux)."""

import importlib.util
from pathlib import Path

if importlib.util.find_spec("triton") is None:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.stem != "test_ema_cuda"]
