"""What the backends with kernels of their own have in common.

Each of their operations binds what a launch reads and writes, launches, and tells autograd what has been written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from ..bases import Base
from ..plan import Plan
from ..snapshot import Snapshot
from .binding import WEIGHTS, Binding, refreshed
from .contract import Lists, MemoryArguments


class NativeBackend(ABC):
    """The operations of :mod:`sam_kernels.backends.reference` by kernels over a table of a plan's tensors.

    Args:
        name: of the backend; plans keep their tables under it.
        native: names the columns of the tables, see :class:`Binding`.

    Attributes:
        steps_on_host: reads Adam's step counts on the host wherever they lie; for tests, whose device is the host.
    """

    def __init__(self, name: str, native: Any) -> None:
        self.name = name
        self.steps_on_host = False
        self._native = native

    @abstractmethod
    def unavailable_reason(self) -> str | None:
        """Why the backend cannot be used; None if it can."""

    @abstractmethod
    def describe(self) -> str:
        """What it is, in a few words."""

    @abstractmethod
    def serves(self, device: torch.device) -> bool:
        """Whether it can work on tensors there."""

    @abstractmethod
    def knows(self, rule: object) -> bool:
        """Whether its kernels can apply a rule."""

    @abstractmethod
    def _new_binding(self, plan: Plan) -> Binding:
        """A table for a plan."""

    def _bound(
        self,
        plan: Plan,
        lists: Lists,
        snapshot: Snapshot | None,
        writes: int,
        base: Base | None = None,
        *,
        reads_weights: bool = True,
        is_preview: bool = False,
    ) -> Binding:
        """The plan's table, filled for a launch; see :meth:`Binding.bind`."""
        binding: Binding | None = plan.bindings.get(self.name)
        if binding is None:
            binding = plan.bindings[self.name] = self._new_binding(plan)
        if binding.bind(plan, lists, snapshot, writes, base, reads_weights, is_preview, self.steps_on_host):
            return binding
        refreshed(plan)
        return self._bound(plan, lists, snapshot, writes, base, reads_weights=reads_weights, is_preview=is_preview)

    def check_memory(self, arguments: MemoryArguments) -> None:
        plan, lists, snapshot = arguments
        self._bound(plan, lists, snapshot, WEIGHTS).forget_copies()
