"""What a base optimizer says of itself to everybody who makes its updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

from torch import Tensor

from ..host import pick
from ..plan import Plan
from ..sharding import local_part

TensorList = Sequence[Tensor | None]
Settings = TypeVar("Settings", bound=tuple[Any, ...])
# A tensor's state, and its weight and state after an update, in the type of the arithmetic.
State = list[Tensor]
Updated = tuple[Tensor, State]


class TensorFacts(NamedTuple):
    """What an update depends on beside the settings, as ``TensorFacts`` in ``csrc/common/bases/base.h``."""

    first: bool  # the state is new
    corrections: tuple[float, float]


class FusedBase(ABC, Generic[Settings]):
    """An update of many tensors by one base optimizer: settings of each group, state of each tensor.

    A base is a dataclass with a field for each of its state tensors, under torch's key. What it says of itself:

    Attributes:
        code: names the struct in ``csrc/common/bases`` and the functions in ``sam_kernels/triton/bases.py``.
        classes: module and name of each optimizer class whose updates these are.
        state_keys: of the state tensors, in the order in which the kernels number them.
        counts_steps: whether each parameter has a step count, a field ``step``, which a descent counts up.
        marks_first: whether state that is new is told apart from zeros, by a field ``first``.
        settings: a named tuple for each group, ``lr`` first; its order is that of ``Settings`` in the struct.
    """

    code: ClassVar[str]
    classes: ClassVar[Sequence[tuple[str, str]]]
    state_keys: ClassVar[Sequence[str]]
    counts_steps: ClassVar[bool] = False
    marks_first: ClassVar[bool] = False

    settings: Sequence[Settings]
    step: TensorList = ()
    first: bytearray | None = None

    @staticmethod
    @abstractmethod
    def settings_of(optimizer: Any, group: dict[str, Any]) -> Any:
        """A group's settings; None if the group's updates are others than these."""

    @staticmethod
    def variant(s: Any) -> int:
        """Which of the forms that are compiled apart the settings need, as ``variant()`` of the struct."""
        return 0

    @staticmethod
    @abstractmethod
    def states(s: Any) -> tuple[int, ...]:
        """Which state tensors the settings need, as ``states()`` of the struct."""

    @staticmethod
    def first_differs(s: Any) -> bool:
        """Whether an update differs with state that is new and with state that is zero."""
        return False

    @staticmethod
    def corrections(s: Any, step: float) -> tuple[float, float]:
        """Numbers that follow from the step count, as ``corrections()`` of the struct."""
        return 0.0, 0.0

    @staticmethod
    @abstractmethod
    def updated(weight: Tensor, gradient: Tensor, state: State, s: Any, facts: TensorFacts) -> Updated:
        """The definition of the update; nothing is written.

        For a learning rate of zero the weight stays as it is, whatever this says. Of complex elements all are given as
        pairs of real ones.

        Args:
            state: those tensors that :meth:`states` names.
        """

    @property
    def columns(self) -> tuple[TensorList, ...]:
        """The lists of state tensors; empty ones where no tensor needs any."""
        return tuple(getattr(self, key) for key in self.state_keys)

    @property
    def steps(self) -> TensorList:
        return self.step

    def subset(self, index: Sequence[int]) -> Self:
        """The base of some of the tensors."""
        changes: dict[str, Any] = {key: pick(column, index) for key, column in self._lists() if column}
        if self.first:
            changes["first"] = bytearray(self.first[i] for i in index)
        return replace(self, **changes)  # type: ignore[type-var]

    def local(self, plan: Plan) -> Self:
        """The same with this rank's parts of DTensors."""
        if not plan.shares:
            return self
        changes: dict[str, Any] = {key: plan.local(getattr(self, key)) for key in self.state_keys}
        if self.counts_steps:
            changes["step"] = [local_part(entry) for entry in self.step]  # a scalar, which every rank has
        return replace(self, **changes)  # type: ignore[type-var]

    def _lists(self) -> list[tuple[str, TensorList]]:
        keys = (*self.state_keys, "step") if self.counts_steps else self.state_keys
        return [(key, getattr(self, key)) for key in keys]
