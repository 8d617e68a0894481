"""Without Triton (CPU builds of torch on other systems than Linux) only the CUDA C++ kernel can be tried."""

import importlib.util
from pathlib import Path

if importlib.util.find_spec("triton") is None:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.stem != "test_memory_cuda"]
