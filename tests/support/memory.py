"""Peak memory of a call, as torch's allocators count it."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler_util import MEMORY_EVENT_NAME


def peak_memory(run: Callable[[], Any]) -> int:
    """Most bytes that one call holds at a time beyond its inputs, what it returns included.

    On a CPU the profiler records each allocation of torch's allocator; memory that a library allocates otherwise is not
    counted.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()  # named, so that it lives until the peak is read
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = run()
    del result
    events = [event for event in profile.kineto_results.events() if event.name() == MEMORY_EVENT_NAME]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
