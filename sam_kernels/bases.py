"""What the fused descent needs to know of a base optimizer: settings of each group and lists of state tensors.

Names and meanings are those of ``torch.optim.SGD``, ``Adam`` and ``AdamW``; the state tensors are the ones that torch
keeps under the keys of the same names. A learning rate may be a tensor of one element; on a GPU it is then read when
the kernel runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from torch import Tensor

from .host import pick
from .plan import Plan
from .sharding import local_part

TensorList = Sequence[Tensor | None]


class SGDSettings(NamedTuple):
    """One group's settings; the order is that of ``SgdSettings`` in ``csrc/common/settings.h``."""

    lr: float | Tensor
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False


class AdamSettings(NamedTuple):
    """One group's settings; the order is that of ``AdamSettings`` in ``csrc/common/settings.h``."""

    lr: float | Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False  # AdamW
    amsgrad: bool = False
    maximize: bool = False


@dataclass
class SGD:
    """SGD, one settings entry for each group.

    Args:
        settings: for each group.
        momentum_buffer: for each tensor, of the weight's shape; needed where momentum is not 0. A buffer whose
            ``first`` flag is set must hold zeros.
        first: for each tensor, 1 where the momentum buffer has not been used yet. Cleared by the caller.
    """

    code: ClassVar[int] = 0
    settings: Sequence[SGDSettings]
    momentum_buffer: TensorList = ()
    first: bytearray = field(default_factory=bytearray)

    def subset(self, index: Sequence[int]) -> SGD:
        """The base of some of the tensors."""
        return SGD(self.settings, _pick(self.momentum_buffer, index), bytearray(self.first[i] for i in index))

    def local(self, plan: Plan) -> SGD:
        """The same with this rank's parts of DTensors."""
        return SGD(self.settings, plan.local(self.momentum_buffer), self.first) if plan.shares else self

    @property
    def columns(self) -> tuple[TensorList, ...]:
        return (self.momentum_buffer,)

    @property
    def steps(self) -> TensorList:
        return ()


@dataclass
class Adam:
    """Adam or AdamW, one settings entry for each group.

    Args:
        settings: for each group.
        exp_avg, exp_avg_sq, max_exp_avg_sq: for each tensor, of the weight's shape; the last for amsgrad only.
        step: for each tensor, one element of float32 or float64, on the CPU or on the tensor's device; the descent
            counts it up.
    """

    code: ClassVar[int] = 1
    settings: Sequence[AdamSettings]
    exp_avg: TensorList = ()
    exp_avg_sq: TensorList = ()
    max_exp_avg_sq: TensorList = ()
    step: TensorList = ()

    def subset(self, index: Sequence[int]) -> Adam:
        """The base of some of the tensors."""
        return Adam(self.settings, *(_pick(column, index) for column in (*self.columns, self.step)))

    def local(self, plan: Plan) -> Adam:
        """The same with this rank's parts of DTensors."""
        if not plan.shares:
            return self
        step = [local_part(entry) for entry in self.step]  # a scalar, which every rank has
        exp_avg, exp_avg_sq, max_exp_avg_sq = (plan.local(column) for column in self.columns)
        return Adam(self.settings, exp_avg, exp_avg_sq, max_exp_avg_sq, step)

    @property
    def columns(self) -> tuple[TensorList, ...]:
        return (self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq)

    @property
    def steps(self) -> TensorList:
        return self.step


Base = SGD | Adam


def _pick(column: TensorList, index: Sequence[int]) -> TensorList:
    return pick(column, index) if column else []
