"""What a step allocates; of torch alone, so that any checkout of the library can be measured."""

import itertools
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocated_at_peak(step: Callable[[], object]) -> float:
    """MiB that are allocated at the peak of a step, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    peak: int = max(held)
    return peak / 2**20
