"""Timing several contenders in turn, each in a process of its own.

In turn, so that whatever else the machine does falls on all of them alike. In processes of their own, as in a user's
program, so that none profits or suffers from what another has done to the memory allocator.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

# After a parallel region OpenMP's threads spin for a moment before they sleep; the next contender must not feel it.
SETTLE_SECONDS = 0.01
SETTLE_SECONDS_BETWEEN_COMPARISONS = 2.0
WARM_UP_ROUNDS = 2

# A turn lasts equally long for all, at least one call. Its first moments are not counted: the caches are as the
# contender before has left them, and a processor that has slept takes some ten milliseconds to run at full speed. If
# turns were counted in calls, that start would fall on the fast contenders alone.
UNCOUNTED_SECONDS = 0.02
COUNTED_SECONDS = 0.04


_TURN = "turn"


def _timed(call: Callable[[], object], seconds: float) -> list[float]:
    """The duration of each call, one at least, until so many seconds have passed."""
    times = []
    begun = start = time.perf_counter()
    while not times or start - begun < seconds:
        call()
        now = time.perf_counter()
        times.append(now - start)
        start = now
    return times


def _serve(connection: Connection) -> None:
    """Runs in the contender's process: makes calls from factories it is sent, and times them."""
    call: Callable[[], object] | None = None
    while (message := connection.recv()) is not None:
        if message == _TURN:
            assert call is not None
            gc.disable()
            _timed(call, UNCOUNTED_SECONDS)
            connection.send(_timed(call, COUNTED_SECONDS))
            gc.enable()
        else:
            factory, arguments = message
            call = None
            gc.collect()
            call = factory(*arguments)
            connection.send(None)


Call = Callable[[], object]


class Processes:
    """Processes by contender, started when first needed and kept for all comparisons of a run."""

    def __init__(self) -> None:
        self._connections: dict[str, Connection] = {}

    def interleaved(
        self,
        contenders: dict[str, tuple[Callable[..., Callable[[], object]], tuple[Any, ...]]],
        rounds: int,
    ) -> dict[str, list[float]]:
        """Seconds of each call.

        Args:
            contenders: by name, a factory that makes the call to be timed, and its arguments; both must be picklable.
            rounds: how often each contender has its turn.
        """
        for name, made_by in contenders.items():
            self._ask(name, made_by)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        # Memory that the comparison before has freed keeps the system busy for a moment.
        time.sleep(SETTLE_SECONDS_BETWEEN_COMPARISONS)
        for number in range(WARM_UP_ROUNDS + rounds):
            for name in contenders:
                time.sleep(SETTLE_SECONDS)
                measured = self._ask(name, _TURN)
                if number >= WARM_UP_ROUNDS:
                    times[name] += measured
        return times

    def close(self) -> None:
        for connection in self._connections.values():
            connection.send(None)
        self._connections.clear()

    def _ask(self, name: str, message: object) -> Any:
        if name not in self._connections:
            context = multiprocessing.get_context("spawn")
            self._connections[name], theirs = context.Pipe()
            context.Process(target=_serve, args=(theirs,), daemon=True).start()
        self._connections[name].send(message)
        return self._connections[name].recv()


class Replay:
    """A clock for pytest-benchmark that replays recorded durations: read before and after each round."""

    def __init__(self) -> None:
        self._now = 0.0
        self._durations: Iterator[float] = iter(())
        self._running = False

    def load(self, durations: list[float]) -> None:
        self._durations = iter(durations)
        self._running = False

    def __call__(self) -> float:
        if self._running:
            self._now += next(self._durations, 0.0)
        self._running = not self._running
        return self._now
