"""Runs the tests of the ops with C++ kernels built for AddressSanitizer and UndefinedBehaviorSanitizer.

`make sanitize`. The variants are the instruction-set levels and "as-avx512": AVX-512's vectors of 16 floats, compiled
to AVX2 instructions, so that the widest tiles and their remainders are tested on processors without AVX-512. Kernels
that use the bf16 dot product are tested only where the processor has it.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

from fastssl._C import processor_level

ROOT = Path(__file__).parent.parent
FLAGS = [
    *["-O2", "-g1", "-std=c++20", "-fPIC", "-fno-math-errno", "-fno-omit-frame-pointer", "-DTORCH_STABLE_ONLY"],
    *["-DTORCH_TARGET_VERSION=0x020b000000000000", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
VARIANTS = {"baseline": [], "avx2": AVX2, "as-avx512": [*AVX2, "-DFASTSSL_VECTOR_BYTES=64"]}
if processor_level() in ("avx512", "amx"):
    parts = ("f", "bw", "cd", "dq", "vl", "bf16")
    VARIANTS["avx512"] = [*AVX2, *(f"-mavx512{part}" for part in parts), "-mprefer-vector-width=512"]
COMPILER = os.environ.get("CXX", "g++")


def build(variant: str) -> Path:
    """Compiles all kernel files to one library, build/sanitize/<variant>.so."""
    folder = ROOT / "build" / "sanitize" / variant
    folder.mkdir(parents=True, exist_ok=True)
    sources = [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if path.name != "module.cpp"]
    includes = [f"-I{path}" for path in include_paths()]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [COMPILER, *FLAGS, *VARIANTS[variant], *includes, "-c", source, "-o", target]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder.with_suffix(".so")
    paths = [f"-L{path}" for path in library_paths()]
    subprocess.run([COMPILER, "-shared", *FLAGS, *objects, "-o", library, *paths, "-ltorch_cpu", "-lc10"], check=True)
    return library


def pytest_configure(config):
    """Pytest plugin: loads the library FASTSSL_SANITIZED, whose kernels replace those of the package."""
    from fastssl.ops import dispatch

    dispatch.load_cpu_library(os.environ["FASTSSL_SANITIZED"])
    dispatch.load_native()


def run(variant: str, arguments: list[str]) -> int:
    """Runs tests/ops with a variant's library; returns pytest's exit status."""
    runtimes = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "FASTSSL_SANITIZED": str(build(variant)),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch free some memory only at exit
        "ATEN_CPU_CAPABILITY": "default" if variant == "baseline" else "avx2",  # also skips tests/ops/test_levels
    }
    # The sanitizers' checks divide blocks of code, so the compiler fuses fewer multiplications with additions, and not
    # the same ones everywhere. Logits of 10^30 that are computed twice then differ, by far more than an exponent may.
    left_out = ("contract", "compile", "error_sentences", "golden", "extreme_temperatures and 1e-30")
    options = ["-q", "-x", "-s", "-k", " and ".join(f"not ({words})" for words in left_out)]
    command = [sys.executable, "-m", "pytest", "-p", "tests.sanitize", "tests/ops", *options, *arguments]
    print(f"-- {variant}", flush=True)
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(max(run(variant, sys.argv[1:]) for variant in VARIANTS))
