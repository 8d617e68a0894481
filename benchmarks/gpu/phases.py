"""The phases of `python -m benchmarks.gpu`.

Each takes a clock, the record to which it adds rows, and whether it is a dry run: with tiny sizes, on a CPU too.
"""

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from benchmarks import harness, step
from benchmarks import machine as measuring
from benchmarks.machine import DEVICE, bandwidth, environment, machine, product_rate
from benchmarks.step_cases import CASES, COMPILED, Case, mae_case

from .loaders import loaders
from .profile import profile_step
from .record import Clock, Record
from .sweeps import sweeps

ROOT = Path(__file__).parent.parent.parent

# Names of benchmarks, up to their first parameters, in order of value; then come all others.
OPS = (
    "test_info_nce[256-65536-bf16]",
    "test_batch_info_nce_both_ways[4096-bf16]",
    "test_nt_xent[4096-bf16]",
    "test_attention[256-",
    "test_dino[65536-bf16",
    "test_ibot[",
    "test_bias_gelu",
    "test_residual_norm_with_gradient",
    "test_ema_update[ViT-B-fp32",
    "test_batch_info_nce[4096-True-bf16]",
    "test_info_nce[256-65536-fp32]",
    "test_masked_patch_mse[256]",
    "test_restore_tokens[256-",
    "test_keep_tokens[256-",
    "test_batch_info_nce_both_ways[32768-bf16]",
    "test_nt_xent[16384-bf16]",
    "test_pairwise_sigmoid[4096-512-bf16]",
    "test_pairwise_sigmoid[32768-768-bf16]",
    "test_batch_norm",
    "test_augment[MoCo",
    "test_resized_crops",
    "test_normalise",
    "test_sinkhorn[65536-bf16",
    "test_sampled_rows",
    "test_block_mask",
    "test_random_masking",
    "test_keep_patches[256]",
    "test_patchify[256]",
    "test_enqueue[256",
    "test_ema_update",
    "test_info_nce[256-",
    "test_nt_xent[4096-fp32]",
    "test_batch_info_nce[4096",
)
OPS_DRY = ("test_info_nce[8-1024-", "test_attention[2-16-3-64-fp32]", "test_batch_info_nce_both_ways[8-")

STEPS = (  # case and precision, in order of value
    ("mae-vit-base", "bf16"),
    ("mae-vit-large", "bf16"),
    ("moco_v3-vit-small", "bf16"),
    ("moco_v2-resnet50", "bf16"),
    ("dino-vit-small", "bf16"),
    ("moco_v3-vit-base", "bf16"),
    ("moco_v3-resnet50", "bf16"),
    ("simclr-loss", "bf16"),
    ("mae-vit-base", "fp32"),
)


def hasten() -> None:
    """Makes the measurements of a dry run short and wrong: two rounds, on a busy machine too."""
    harness.BUDGET_S, harness.ROUNDS, harness.ROUND_S = 0.0, (2, 2), 0.0
    harness.BUSY = measuring.BUSY = 1.0


def facts(clock: Clock, record: Record, dry: bool) -> None:
    """The card, its software, and the rates that the others are compared with."""
    about_machine(record, dry)
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        record.note(
            capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            memory_gb=round(properties.total_memory / 1e9, 1),
            l2_mb=round(getattr(properties, "L2_cache_size", 0) / 1e6, 1),
            driver=_driver(),
            cuda=torch.version.cuda,
        )
    record.note(packages={name: _version(name) for name in ("triton", "xformers", "nvidia-dali-cuda130", "timm")})
    record.add({"fact": "memory bandwidth", "value": round(bandwidth() / 1e9, 1), "unit": "GB/s"})
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if DEVICE.type == "cuda" else (torch.float32,)
    for dtype in dtypes:
        if clock.over():
            return
        name = f"matrix product, {str(dtype).removeprefix('torch.')}"
        record.add({"fact": name, "value": round(product_rate(dtype) / 1e12, 2), "unit": "TFLOP/s"})


def about_machine(record: Record, dry: bool) -> None:
    """Notes the machine, the software and whether it is a dry run: what `adopt` needs."""
    import cpuinfo

    versions = {name: _version(name) for name in ("torchvision", "timm")}
    record.note(
        dry_run=dry, machine=machine(cpuinfo.get_cpu_info()["brand_raw"]), environment={**environment(), **versions}
    )


def tests(clock: Clock, record: Record, dry: bool) -> None:
    """The tests that need a GPU: outcome and seconds of each. A dry run skips them all, which runs the same code."""
    about_machine(record, dry)
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    status = pytest.main(
        ["-q", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)], plugins=[_Tests(clock, record)]
    )
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.exit(f"pytest ended with {status!r}")


class _Tests:
    """Plugin of pytest that records the outcome of each test, and skips the rest once the time is over."""

    def __init__(self, clock: Clock, record: Record):
        self.clock, self.record = clock, record

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.clock.over():
            pytest.skip("no time left")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            self.record.add(row | ({"reason": _last_line(report)} if report.outcome != "passed" else {}))


def ops(clock: Clock, record: Record, dry: bool) -> None:
    """Rows of the benchmarks in order of value."""
    about_machine(record, dry)
    files = sorted(map(str, (ROOT / "benchmarks").glob("test_*.py")))
    plugin = _Rows(clock, record, OPS_DRY if dry else OPS, others=not dry)
    status = pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[plugin])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"pytest ended with {status!r}")


class _Rows(_Tests):
    """Plugin of pytest that runs benchmarks in a given order and records each row as soon as it is measured."""

    def __init__(self, clock: Clock, record: Record, order: tuple[str, ...], others: bool):
        super().__init__(clock, record)
        self.order, self.others = order, others

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        def place(item: pytest.Item) -> int:
            return next((i for i, name in enumerate(self.order) if item.name.startswith(name)), len(self.order))

        items[:] = sorted((item for item in items if self.others or place(item) < len(self.order)), key=place)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        row = item.funcargs["benchmark"].extra_info if "benchmark" in getattr(item, "funcargs", {}) else {}
        if "ms" in row:
            self.record.add({"family": item.path.stem.removeprefix("test_"), **row})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.record.add({"failed": report.nodeid, "reason": _last_line(report)})


def _last_line(report: pytest.TestReport) -> str:
    text = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", text)
    return (crash.strip().splitlines() or [""])[0][:300]


def steps(clock: Clock, record: Record, dry: bool) -> None:
    """Whole steps in order of value; at the end, if time is left, MAE by torch.compile's max-autotune."""
    about_machine(record, dry)
    if dry:
        tiny = mae_case("vit_mini", (16, 24), 4, decoder_dim=32, decoder_depth=1, decoder_heads=2)
        _add_steps(clock, record, [("mae-tiny", "fp32", lambda: tiny, ())], rounds=2)
        return
    cases = [(name, precision, CASES[name], COMPILED) for name, precision in STEPS]
    cases.append((STEPS[0][0], STEPS[0][1], CASES[STEPS[0][0]], ("max-autotune",)))
    _add_steps(clock, record, cases, rounds=step.ROUNDS)


def _add_steps(clock: Clock, record: Record, cases: Iterable[tuple[str, str, Callable[[], Case], tuple]], rounds: int):
    for name, precision, make_case, compiled in cases:
        if clock.over():
            return
        try:
            row = step.measure_case(make_case(), precision, rounds, compiled)
            record.add({"case": name + (f", {compiled[0]}" if compiled == ("max-autotune",) else ""), **row})
        except (harness.WrongResult, RuntimeError) as error:  # RuntimeError: torch's, such as out of memory
            record.add({"failed": f"{name}, {precision}", "reason": str(error).strip().splitlines()[0][:300]})
        torch._dynamo.reset()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


RUN = {
    "facts": facts,
    "tests": tests,
    "ops": ops,
    "steps": steps,
    "loaders": loaders,
    "sweeps": sweeps,
    "profile": profile_step,
}
