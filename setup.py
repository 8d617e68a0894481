"""Builds the native parts of fastssl from csrc/ (everything else is in pyproject.toml).
    fastssl._C                 module.cpp, pybind11: facts about this build and this processor
    fastssl._native_<level>    every other .cpp, once per instruction set; one of them is loaded at run time
    fastssl._native_cuda       every .cu, where nvcc and a CUDA build of torch are found

FASTSSL_BUILD=none|cpu|cuda overrides what was found.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

BUILD = os.environ.get("FASTSSL_BUILD", "")
if BUILD not in ("", "none", "cpu", "cuda"):
    sys.exit(f"fastssl: FASTSSL_BUILD must be none, cpu or cuda, got {BUILD!r}")
WITHOUT = "or set FASTSSL_BUILD=none to install without native kernels (every op then runs in plain torch)"

# No -ffast-math: it would break the NaN and infinity contracts. No FMA for the baseline: plain x86-64 has none.
LEVELS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
    avx512 = [f"-mavx512{part}" for part in ("f", "bw", "cd", "dq", "vl", "bf16")] + ["-mprefer-vector-width=512"]
    LEVELS |= {"avx2": avx2, "avx512": avx2 + avx512}
CUDA_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"  # no device to ask on a build machine; TORCH_CUDA_ARCH_LIST overrides


def find_toolkit():
    """Names CUDA_HOME to torch as nvcc itself does: the nvcc on the PATH may be a wrapper far from its toolkit."""
    if shutil.which("nvcc") and "CUDA_HOME" not in os.environ:
        said = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
        if top := re.search(r"TOP=(.+)", said):
            os.environ["CUDA_HOME"] = os.path.realpath(top[1].strip())


def native_parts():
    if not any(shutil.which(cxx) for cxx in (os.environ.get("CXX", "c++").split()[0], "c++", "g++", "clang++")):
        sys.exit(f"fastssl: no C++ compiler found: install g++ (Debian: apt-get install g++), {WITHOUT}")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        sys.exit(f"fastssl: Python.h not found: install the Python headers (Debian: python3-dev), {WITHOUT}")
    import pybind11
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension
    from torch.version import cuda as torch_cuda

    cuda_sources = sorted(map(str, Path("csrc").glob("*.cu")))
    if BUILD == "cuda" and not cuda_sources:
        sys.exit("fastssl: FASTSSL_BUILD=cuda, but csrc/ has no .cu file")
    with_cuda = BUILD == "cuda" or (BUILD == "" and bool(CUDA_HOME and torch_cuda and cuda_sources))
    optimise = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
    # The stable ABI of torch 2.11: with this version set, any include of a torch-internal header is a compile error.
    stable = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]

    facts = [f'-DFASTSSL_LEVELS="{",".join(LEVELS)}"', f"-DFASTSSL_CUDA={int(with_cuda)}"]
    parts = [
        Extension(
            "fastssl._C",
            ["csrc/module.cpp"],
            include_dirs=[pybind11.get_include()],
            language="c++",
            extra_compile_args=[*optimise, *facts],
        )
    ]
    headers = sorted(map(str, [*Path("csrc").glob("*.h"), *Path("csrc").glob("*.cuh")]))
    sources = sorted(str(source) for source in Path("csrc").glob("*.cpp") if source.name != "module.cpp")
    for level, flags in LEVELS.items():
        parts.append(
            CppExtension(
                f"fastssl._native_{level}",
                sources,
                depends=headers,
                py_limited_api=True,
                extra_compile_args=[*optimise, *stable, *flags],
            )
        )
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES if torch_cuda >= "12.8" else "8.0;9.0+PTX")
        nvcc = ["-O3", "-std=c++20", "-Xptxas=-warn-spills", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", *stable]
        parts.append(
            CUDAExtension(
                "fastssl._native_cuda",
                cuda_sources,
                depends=headers,
                py_limited_api=True,
                extra_compile_args={"cxx": [*optimise, *stable], "nvcc": nvcc},
            )
        )
    return parts


if BUILD == "none":
    setup()
else:
    find_toolkit()
    from torch.utils.cpp_extension import BuildExtension

    class BuildParts(BuildExtension):
        def build_extension(self, ext):  # in a folder of its own: the levels compile the same sources
            shared = self.build_temp, self.force
            self.build_temp = os.path.join(self.build_temp, ext.name)
            self.force |= ext.name == "fastssl._C"  # whose flags tell what this build has: newer than any source
            super().build_extension(ext)
            self.build_temp, self.force = shared

    setup(ext_modules=native_parts(), cmdclass={"build_ext": BuildParts})
