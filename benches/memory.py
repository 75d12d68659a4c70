"""How much memory an optimizer needs besides parameters and gradients."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch._C._profiler import _EventType


def peak_bytes(make_step: Callable[[], Callable[[], object]]) -> int:
    """Peak of what is allocated on the CPU while an optimizer is made and makes two steps; its state included.

    Args:
        make_step: makes the optimizer, for parameters that exist, and returns a call that makes a step.
    """
    # Whatever an earlier optimizer has left behind would be freed in between, and count as a gain.
    gc.collect()
    gc.disable()
    try:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            step = make_step()
            step()
            step()
    finally:
        gc.enable()
    held = peak = 0
    sizes: dict[int, int] = {}
    for pointer, size in _allocations(profile):
        if size > 0:
            sizes[pointer] = size
            held += size
        else:
            # Of memory that is older than this, the profiler tells the size that an earlier profile saw at its address.
            held -= sizes.pop(pointer, 0)
        peak = max(peak, held)
    return peak


def _allocations(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """Addresses and sizes of what was allocated, or, with sizes below zero, freed, in the order of time."""
    found = []
    waiting = list(profile.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(pointer, size) for _, pointer, size in sorted(found)]
