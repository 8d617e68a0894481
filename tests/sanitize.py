"""The tests of the ops with the C++ kernels built for AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

Every level that runs anywhere is built, and one more: the code as AVX-512 has it, 16 floats a vector, in AVX2's
instructions. So the widest tiles and their remainders are run on processors that have no AVX-512. What takes bf16's dot
product runs where the processor has it.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from fastssl._C import processor_level

ROOT = Path(__file__).parent.parent
FLAGS = [
    *["-O2", "-g1", "-std=c++20", "-fPIC", "-fno-math-errno", "-fno-omit-frame-pointer", "-DTORCH_STABLE_ONLY"],
    *["-DTORCH_TARGET_VERSION=0x020b000000000000", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
VARIANTS = {"baseline": [], "avx2": AVX2, "as-avx512": [*AVX2, "-DFASTSSL_VECTOR_BYTES=64"]}
if processor_level() == "avx512":
    parts = ("f", "bw", "cd", "dq", "vl", "bf16")
    VARIANTS["avx512"] = [*AVX2, *(f"-mavx512{part}" for part in parts), "-mprefer-vector-width=512"]
COMPILER = os.environ.get("CXX", "g++")


def build(variant: str) -> Path:
    """All kernel files as one library of the variant, build/sanitize/<variant>.so."""
    folder = ROOT / "build" / "sanitize" / variant
    folder.mkdir(parents=True, exist_ok=True)
    sources = [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if path.name != "module.cpp"]
    includes = [f"-I{path}" for path in include_paths()]

    def compile_one(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        command = [COMPILER, *FLAGS, *VARIANTS[variant], *includes, "-c", source, "-o", made]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder.with_suffix(".so")
    paths = [f"-L{path}" for path in library_paths()]
    subprocess.run([COMPILER, "-shared", *FLAGS, *objects, "-o", library, *paths, "-ltorch_cpu", "-lc10"], check=True)
    return library


def pytest_configure(config):
    """As a pytest plugin: the library named by the environment takes over from the one that the package loaded."""
    from fastssl.ops import dispatch

    torch.ops.load_library(os.environ["FASTSSL_SANITIZED"])
    dispatch.load_native()


def run(variant: str, arguments: list[str]) -> int:
    runtimes = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "FASTSSL_SANITIZED": str(build(variant)),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they allocate until the end
        "ATEN_CPU_CAPABILITY": "default" if variant == "baseline" else "avx2",  # also keeps tests/ops/test_levels out
    }
    options = ["-q", "-x", "-s", "-k", "not contract and not compile and not error_sentences and not golden"]
    command = [sys.executable, "-m", "pytest", "-p", "tests.sanitize", "tests/ops", *options, *arguments]
    print(f"-- {variant}", flush=True)
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(max(run(variant, sys.argv[1:]) for variant in VARIANTS))
