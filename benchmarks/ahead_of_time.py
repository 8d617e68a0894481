"""Compiles Triton kernels for cards that are not there.

The launchers themselves run, on tensors without memory, with a driver that claims to have the card and a compiler that
stops before the launch. So what is compiled is what a GPU would run, specialised by alignment and size as it would be.
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
    registers: int  # a thread
    spill_bytes: int  # and other local memory, a thread
    shared_bytes: int  # a program
    tensor_core: str | None  # the instructions seen
    product: bool  # whether the kernel multiplies matrices


class Launch(NamedTuple):
    kernel: str
    config: str  # its constants, warps and stages
    programs: int
    resources: Resources


class Driver:
    """Says that the card of an architecture is there."""

    def __init__(self, arch: str):
        amd, self.arch = arch.startswith("gfx"), arch
        self.target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return tile.ARCHITECTURES.index(self.arch)  # Triton keeps what it compiled by this number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def ahead_of_time(arch: str) -> Iterator[list[Launch]]:
    """Launchers called inside compile for `arch` and launch nothing; each launch adds a row to the list."""
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
    """Read from the binary, or from AMD's assembly."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.vgpr_{name}: *(\d+)", text)[1]) for name in ("count", "spill_count"))
        found, spill_bytes = ["mfma"] if "v_mfma" in text else [], 4 * 64 * spilled
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
        found = [name for name in ("tcgen05.mma", "wgmma.mma", "mma.sync") if name in compiled.asm["ptx"]]
        spill_bytes = stack + local
    product = "tt.dot" in compiled.asm["ttir"]
    return Resources(registers, spill_bytes, compiled.metadata.shared, " ".join(found) or None, product)
