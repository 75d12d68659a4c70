"""How long a call takes on a GPU, and how long its host is busy with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]

WARM_UP_CALLS = 3
HOST_CALLS = 10
# Cycles a second of a GPU's clock, at most: a sleep of so many cycles lasts a second or longer.
_FASTEST_CLOCK = 2.0e9
# Beyond what the host takes for a call: for the events around it, and for what one call differs from the other.
_SLEEP_FACTOR, _SLEEP_SECONDS = 1.5, 50e-6


class Timer:
    """Measures a call.

    The GPU sleeps while the host launches, so the time between two events is that of the kernels alone, however slow
    the host is, unless a call launches more kernels than the driver queues (about a thousand). What the host takes, and
    what a call takes when one is made after the other, is measured beside it.

    Args:
        device: on a CPU, to try things out, all times are the host's.
        seconds: for a measurement, about.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self._seconds = device, seconds
        self._on_gpu = device.type == "cuda"

    def __call__(self, call: Call) -> dict[str, float]:
        """Medians: ``ms`` on the device with the first and the last decile, ``loop_ms`` of calls one after the other,
        and ``host_us``."""
        for _ in range(WARM_UP_CALLS):
            call()
        self._wait()
        host = statistics.median(self._host_seconds(call) for _ in range(HOST_CALLS))
        begun = time.perf_counter()
        call()
        self._wait()
        rounds = min(50, max(7, int(self._seconds / max(time.perf_counter() - begun, 1e-6))))
        times = sorted(self._device_ms(call, host) for _ in range(rounds))
        begun = time.perf_counter()
        for _ in range(rounds):
            call()
        self._wait()
        return {
            "ms": statistics.median(times),
            "p10_ms": times[rounds // 10],
            "p90_ms": times[-1 - rounds // 10],
            "loop_ms": 1e3 * (time.perf_counter() - begun) / rounds,
            "host_us": 1e6 * host,
            "rounds": rounds,
        }

    def _host_seconds(self, call: Call) -> float:
        begun = time.perf_counter()
        call()
        seconds = time.perf_counter() - begun
        self._wait()
        return seconds

    def _device_ms(self, call: Call, host_seconds: float) -> float:
        if not self._on_gpu:
            return 1e3 * self._host_seconds(call)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(_FASTEST_CLOCK * (_SLEEP_FACTOR * host_seconds + _SLEEP_SECONDS)))
        begin.record()
        call()
        end.record()
        self._wait()
        return begin.elapsed_time(end)

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def launches_of(call: Call, device: torch.device) -> int:
    """Kernels, copies and fills that a call brings to the GPU. A profiled process times nothing well afterwards."""
    if device.type != "cuda":
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
