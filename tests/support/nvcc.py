"""Registers, spills, shared memory and PTX of the CUDA kernels in csrc/*.cuh. Needs nvcc, but no GPU."""

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent.parent.parent / "csrc"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")  # those of setup.py
FLAGS = ("-O3", "-std=c++20", f"-I{SOURCES}")


def is_available() -> bool:
    return shutil.which("nvcc") is not None


@functools.cache
def resources(arch: str) -> dict[str, dict[str, int]]:
    """Registers per thread, and bytes of spills, stack and static shared memory of each kernel, reported by ptxas."""
    report = "".join(_compile(header, arch, "-cubin", "-Xptxas=-v")[0] for header in sorted(SOURCES.glob("*.cuh")))
    kernels = {}
    for name, properties in re.findall(r"Compiling entry function '(\w+)'(.*?Used .*?\n)", report, re.DOTALL):

        def number(pattern: str, text: str = properties) -> int:
            return sum(map(int, re.findall(pattern, text)))

        kernels[_demangle(name)] = {
            "registers": number(r"Used (\d+) registers"),
            "spill_bytes": number(r"(\d+) bytes spill (?:stores|loads)"),
            "stack_bytes": number(r"(\d+) bytes stack frame"),
            "shared_bytes": number(r"(\d+) bytes smem"),
        }
    return kernels


@functools.cache
def ptx(stem: str, arch: str) -> str:
    """The PTX of csrc/<stem>.cuh."""
    return _compile(SOURCES / f"{stem}.cuh", arch, "-ptx")[1]


def _compile(header: Path, arch: str, kind: str, *flags: str) -> tuple[str, str]:
    """Compiles a header; returns nvcc's messages and, for PTX, the output."""
    with tempfile.TemporaryDirectory() as folder:
        unit, output = Path(folder, "unit.cu"), Path(folder, "output")
        unit.write_text(f'#include "{header.name}"\n')
        command = ["nvcc", kind, f"-arch={arch}", *FLAGS, *flags, unit, "-o", output]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout + run.stderr, output.read_text() if kind == "-ptx" else ""


def _demangle(name: str) -> str:
    """fastssl::ema_update for _ZN7fastssl10ema_updateEPKNS_3RowE…; names of templates stay mangled."""
    parts, rest = [], name.removeprefix("_ZN").removeprefix("_Z")
    while match := re.match(r"(\d+)", rest):
        end = match.end() + int(match[1])
        parts.append(rest[match.end() : end])
        rest = rest[end:]
    return "::".join(parts) if parts and rest[0] == "E" else name
