"""How much memory an optimizer needs besides parameters and gradients."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch


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
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
