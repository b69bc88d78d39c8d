"""Peak of memory on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr


def peak_bytes(call: Callable[[], object], forget: Callable[[], object]) -> int:
    """Most bytes that were allocated at one time during ``call`` beyond what was there before.

    Counts what torch's CPU allocator hands out, the buffers inside operators included, from the profiler's record of
    every allocation and release; scratch space that a kernel library allocates for itself is not seen. ``forget`` drops
    what an earlier call left.
    """
    call()  # what is made once and kept is not this call's
    forget()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        call()
    live = peak = 0
    for _, size in sorted(_allocations(record)):
        live += size
        peak = max(peak, live)
    return peak


def _allocations(record: Any) -> list[tuple[int, int]]:
    """(time, bytes), negative for a release."""
    found = []
    stack = list(record.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack += event.children
        kind, fields = event.typed
        if kind == _EventType.Allocation:
            found.append((event.start_time_ns, fields.alloc_size))
    return found
