"""What a backend is: the operations on the tensors of one device, each with one object of arguments.

:mod:`sam_kernels.ops` has checked the arguments' lengths, and numbers stand where tensors of other devices could.
``reference`` says what each operation does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..bases import Base, TensorList
from ..plan import Plan
from ..report import LaunchReport
from ..rules import LaunchRule
from ..scales import FlatScale
from ..snapshot import Snapshot

Lists = Sequence[TensorList]


class GramArguments(NamedTuple):
    """Of :meth:`Backend.gram`."""

    plan: Plan
    lists: Lists
    weighted: bool  # by T of the weights themselves
    snapshot: Snapshot | None = None  # whose copies are the weights themselves, where there are any


class RestoreArguments(NamedTuple):
    """Of :meth:`Backend.restore`."""

    plan: Plan
    snapshot: Snapshot


class MemoryArguments(NamedTuple):
    """Of :meth:`Backend.check_memory`: an update that others make."""

    plan: Plan
    lists: Lists
    snapshot: Snapshot | None


class CombinationArguments(NamedTuple):
    """Of :meth:`Backend.combine` and :meth:`Backend.perturb`."""

    plan: Plan
    lists: Lists
    coefficients: Tensor  # float64, one for each list, on the plan's device or on the CPU
    scale: FlatScale
    snapshot: Snapshot | None = None  # of a perturbation


class AscentArguments(NamedTuple):
    """Of :meth:`Backend.ascent`."""

    plan: Plan
    lists: Lists
    rule: LaunchRule
    scale: FlatScale
    snapshot: Snapshot | None = None


class DescentArguments(NamedTuple):
    """Of :meth:`Backend.descent`."""

    plan: Plan
    lists: Lists
    base: Base
    snapshot: Snapshot | None
    rule: LaunchRule
    scale: FlatScale
    weighted: bool = False  # of the Gram matrix
    grad_scale: Tensor | float | None = None
    found_inf: Tensor | bool | None = None
    is_preview: bool = False  # write only weights of which a copy is held; copies, masters and state stay
    coefficients: Tensor | None = None  # multiply the scales


class Backend(Protocol):
    """The operations.

    All raise :class:`DeviceChangedError` if the plan's tensors are now on another device, and
    :class:`SharedMemoryError` if tensors share memory and another backend has to work on them one after the other.
    """

    @property
    def name(self) -> str: ...

    def unavailable_reason(self) -> str | None:
        """Why the backend cannot be used; None if it can."""

    def describe(self) -> str:
        """What it is, in a few words."""

    def serves(self, device: torch.device) -> bool:
        """Whether it can work on tensors there."""

    def knows(self, rule: object) -> bool:
        """Whether one launch can apply a rule."""

    def gram(self, arguments: GramArguments) -> Tensor: ...

    def perturb(self, arguments: CombinationArguments) -> None: ...

    def restore(self, arguments: RestoreArguments) -> None: ...

    def combine(self, arguments: CombinationArguments) -> None: ...

    def ascent(self, arguments: AscentArguments) -> LaunchReport: ...

    def descent(self, arguments: DescentArguments) -> LaunchReport: ...

    def check_memory(self, arguments: MemoryArguments) -> None:
        """Raises for gradients in the memory of weights that are written."""
