"""Kernels of a training step by time, and the time between them in which the GPU has nothing to do."""

import collections

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import DEVICE, wait
from benchmarks.step_cases import CASES, TOTAL, Ours, mae_case

from .record import Clock, Record

STEPS, WARM_UP, SHOWN = 3, 4, 40


def profile_step(clock: Clock, record: Record, dry: bool) -> None:
    """Rows {kernel, ms and calls per step, share of the busy time} of our MAE step without a CUDA graph, in which a
    profiler sees every kernel; notes the step's time and the gaps. A dry run has torch's CPU ops as kernels."""
    from .phases import about_machine

    about_machine(record, dry)
    case = mae_case("vit_mini", (16, 24), 4) if dry else CASES["mae-vit-base"]()
    ours, batch = Ours(case, case.ours(), "fp32" if dry else "bf16"), case.batch()
    for _ in range(1 if dry else WARM_UP):
        ours(batch, 0.5 / TOTAL)
    wait()
    cuda = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        for _ in range(STEPS):
            ours(batch, 0.5 / TOTAL)
        wait()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == wanted and event.cpu_parent is None]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, whole = covered(spans), (spans[-1][1] - spans[0][0] if spans else 0.0)
    record.note(
        case=case.size,
        step_ms=round(whole / STEPS / 1e3, 3),
        busy_ms=round(busy / STEPS / 1e3, 3),
        gaps_ms=round((whole - busy) / STEPS / 1e3, 3),
    )
    times, calls = collections.Counter(), collections.Counter()
    for event in events:
        times[event.name] += event.time_range.elapsed_us()
        calls[event.name] += 1
    for name, microseconds in times.most_common(SHOWN):
        record.add(
            {
                "kernel": name[:200],
                "ms": round(microseconds / STEPS / 1e3, 4),
                "calls": round(calls[name] / STEPS, 2),
                "share": round(microseconds / (sum(times.values()) or 1), 4),
            }
        )


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals that are sorted by their start."""
    total, end = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
