"""Stand-ins for what CUDA has: passes side by side, and recorded steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Reversed:
    """Lanes that run the last call first: none may need what another leaves behind."""

    def run(self, calls: list[Callable[[], Any]]) -> list[Any]:
        return [call() for call in reversed(calls)][::-1]


class Replayed:
    """Records nothing; a replay calls again, with the inputs where they were when it was recorded."""

    def __init__(self) -> None:
        self.recorded = self.warm = self.waited = 0

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        self.warm += 1
        yield

    def record(self, call: Callable[[], Any], generators: Any) -> Callable[[], Any]:
        self.recorded += 1
        return call

    def wait(self) -> None:
        self.waited += 1
