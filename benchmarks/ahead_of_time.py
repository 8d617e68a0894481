"""Ahead-of-time compilation of Triton kernels for GPUs that the machine does not have.

The launchers run on meta tensors, with a driver that reports the card and a compiler that stops before the launch. So
the compiled code is what a GPU would run, specialised by alignment and size in the same way.
"""

import contextlib
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastssl.kernels import tile


class Resources(NamedTuple):
    """Resources that the compiled code of a kernel uses."""

    registers: int  # per thread
    spill_bytes: int  # per thread, including other local memory
    shared_bytes: int  # per program
    tensor_core: str | None  # names of the tensor-core instructions in the code
    product: bool  # True if the kernel multiplies matrices


class Launch(NamedTuple):
    """A launch that was compiled and not run."""

    kernel: str
    config: str  # constants, warps and stages
    programs: int
    resources: Resources


class Driver:
    """Replaces Triton's driver and reports the card of an architecture."""

    def __init__(self, arch: str):
        amd, self.arch = arch.startswith("gfx"), arch
        self.target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return tile.ARCHITECTURES.index(self.arch)  # the key of Triton's cache of compiled kernels

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def ahead_of_time(arch: str) -> Iterator[list[Launch]]:
    """Within this context launchers compile for `arch` and launch nothing; each launch is appended to the list."""
    launches, run = [], JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        constants = {name: value for name, value in kwargs.items() if type(value) in (int, bool, str)}
        config = " ".join(f"{name}={value}" for name, value in sorted(constants.items()))
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(kernel.fn.__name__, config, math.prod(grid), resources(compiled)))

    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver(arch))
    JITFunction.run = compile_only
    try:
        with tile.assume_card(arch):
            yield launches
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = active


def resources(compiled) -> Resources:
    """Resources as the binary, or AMD's assembly, states them."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.vgpr_{name}: *(\d+)", text)[1]) for name in ("count", "spill_count"))
        instructions, spill_bytes = ["mfma"] if "v_mfma" in text else [], 4 * 64 * spills
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
        instructions = [name for name in ("tcgen05.mma", "wgmma.mma", "mma.sync") if name in compiled.asm["ptx"]]
        spill_bytes = stack + local
    product = "tt.dot" in compiled.asm["ttir"]
    return Resources(registers, spill_bytes, compiled.metadata.shared, " ".join(instructions) or None, product)
