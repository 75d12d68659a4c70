"""What a base optimizer says of itself to everybody who makes its updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Generic, Self, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from ..host import pick
from ..plan import Plan
from ..sharding import local_part

TensorList = Sequence[Tensor | None]
Settings = TypeVar("Settings", bound=tuple[Any, ...])


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
    classes: ClassVar[frozenset[tuple[str, str]]]
    state_keys: ClassVar[tuple[str, ...]]
    counts_steps: ClassVar[bool] = False
    marks_first: ClassVar[bool] = False

    settings: Sequence[Settings]
    step: TensorList = ()
    first: bytearray | None = None

    @classmethod
    @abstractmethod
    def settings_of(cls, optimizer: Optimizer, group: dict[str, Any]) -> Settings | None:
        """A group's settings; None if the group's updates are others than these."""

    @classmethod
    def variant(cls, settings: Settings) -> int:
        """Which of the forms that are compiled apart these settings need, as ``variant()`` of the struct."""
        return 0

    @classmethod
    def states(cls, settings: Settings) -> tuple[int, ...]:
        """Which state tensors they need, as ``states()`` of the struct."""
        return tuple(range(len(cls.state_keys)))

    @classmethod
    def first_differs(cls, settings: Settings) -> bool:
        """Whether an update differs with state that is new and with state that is zero."""
        return False

    @staticmethod
    def corrections(settings: Settings, step: float) -> tuple[float, float]:
        """Numbers that follow from the step count, as ``corrections()`` of the struct."""
        return 0.0, 0.0

    @classmethod
    @abstractmethod
    def updated(
        cls, weight: Tensor, gradient: Tensor, state: list[Tensor], settings: Settings, step: float, first: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The definition of the update: the new weight, and the new state.

        All are in the type of the arithmetic, complex elements as pairs of real ones; nothing is written. For a
        learning rate of zero the weight stays as it is, whatever this says.

        Args:
            state: those tensors that :meth:`states` names.
            step: the step count, this step included.
            first: whether the state is new.
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
