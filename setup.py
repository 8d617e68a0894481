"""Builds the native extensions of fastssl from csrc/; all metadata is in pyproject.toml.

    fastssl._C                 module.cpp, with pybind11: facts about the build and the processor
    fastssl._native_<level>    all other .cpp files, once per instruction set; one is loaded at run time
    fastssl._native_cuda       all .cu files, if nvcc and a CUDA build of torch are found

FASTSSL_BUILD=none, cpu or cuda overrides what is built: no extension, all but the CUDA extension, or all.
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
SKIP_HINT = "or set FASTSSL_BUILD=none to install without native kernels (every op then runs in plain torch)"

# The flags leave out -ffast-math, with which NaN and infinity would not propagate as documented. The baseline has no
# FMA, because plain x86-64 has none.
LEVELS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
    avx512 = [f"-mavx512{part}" for part in ("f", "bw", "cd", "dq", "vl", "bf16")] + ["-mprefer-vector-width=512"]
    LEVELS |= {"avx2": avx2, "avx512": avx2 + avx512}
CUDA_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"  # unless TORCH_CUDA_ARCH_LIST is set


def set_cuda_home():
    """Sets CUDA_HOME, which torch reads, to the toolkit of the nvcc on the PATH, which may be a wrapper script."""
    if shutil.which("nvcc") and "CUDA_HOME" not in os.environ:
        command = ["nvcc", "--dryrun", "-x", "cu", "/dev/null"]
        if top := re.search(r"TOP=(.+)", subprocess.run(command, capture_output=True, text=True).stderr):
            os.environ["CUDA_HOME"] = os.path.realpath(top[1].strip())


def native_extensions():
    if not any(shutil.which(cxx) for cxx in (os.environ.get("CXX", "c++").split()[0], "c++", "g++", "clang++")):
        sys.exit(f"fastssl: no C++ compiler found: install g++ (Debian: apt-get install g++), {SKIP_HINT}")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        sys.exit(f"fastssl: Python.h not found: install the Python headers (Debian: python3-dev), {SKIP_HINT}")
    import pybind11
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension
    from torch.version import cuda as torch_cuda

    cuda_sources = sorted(map(str, Path("csrc").glob("*.cu")))
    if BUILD == "cuda" and not cuda_sources:
        sys.exit("fastssl: FASTSSL_BUILD=cuda, but csrc/ has no .cu file")
    with_cuda = BUILD == "cuda" or (BUILD == "" and bool(CUDA_HOME and torch_cuda and cuda_sources))
    common_flags = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
    # Allows only the stable ABI of torch 2.11: including an internal header of torch is a compile error.
    stable_abi = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]

    build_facts = [f'-DFASTSSL_LEVELS="{",".join(LEVELS)}"', f"-DFASTSSL_CUDA={int(with_cuda)}"]
    extensions = [
        Extension(
            "fastssl._C",
            ["csrc/module.cpp"],
            include_dirs=[pybind11.get_include()],
            language="c++",
            extra_compile_args=[*common_flags, *build_facts],
        )
    ]
    headers = sorted(map(str, [*Path("csrc").glob("*.h"), *Path("csrc").glob("*.cuh")]))
    sources = sorted(str(source) for source in Path("csrc").glob("*.cpp") if source.name != "module.cpp")
    for level, flags in LEVELS.items():
        extensions.append(
            CppExtension(
                f"fastssl._native_{level}",
                sources,
                depends=headers,
                py_limited_api=True,
                extra_compile_args=[*common_flags, *stable_abi, *flags],
            )
        )
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES if torch_cuda >= "12.8" else "8.0;9.0+PTX")
        nvcc = [
            "-O3",
            "-std=c++20",
            "-Xptxas=-warn-spills",
            "-Xcompiler=-fvisibility=hidden",
            "-DUSE_CUDA",
            *stable_abi,
        ]
        extensions.append(
            CUDAExtension(
                "fastssl._native_cuda",
                cuda_sources,
                depends=headers,
                py_limited_api=True,
                extra_compile_args={"cxx": [*common_flags, *stable_abi], "nvcc": nvcc},
            )
        )
    return extensions


if BUILD == "none":
    setup()
else:
    set_cuda_home()
    from torch.utils.cpp_extension import BuildExtension

    class BuildSeparately(BuildExtension):
        """Builds each extension in its own folder, because the levels compile the same sources."""

        def build_extension(self, ext):
            saved = self.build_temp, self.force
            self.build_temp = os.path.join(self.build_temp, ext.name)
            self.force |= ext.name == "fastssl._C"  # its macros may change although its source does not
            super().build_extension(ext)
            self.build_temp, self.force = saved

    setup(ext_modules=native_extensions(), cmdclass={"build_ext": BuildSeparately})
