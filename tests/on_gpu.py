"""What tests ask of a GPU: kernels that were launched, and that nothing waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def kernels_of(call: Callable[[], object]) -> list[str]:
    """Names of the kernels that a call launches, copies and fills included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it, an operation that waits for the GPU is an error."""
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")  # which sets the mode even if it raises
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
