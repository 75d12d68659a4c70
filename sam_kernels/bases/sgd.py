"""``torch.optim.SGD``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from .base import FusedBase, TensorList


class SGDSettings(NamedTuple):
    """One group's settings, named as in torch."""

    lr: float | Tensor
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False


@dataclass
class SGD(FusedBase[SGDSettings]):
    """SGD, one settings entry for each group.

    Args:
        settings: for each group.
        momentum_buffer: for each tensor, of the weight's shape; needed where momentum is not 0. A buffer whose
            ``first`` flag is set must hold zeros.
        first: for each tensor, 1 where the momentum buffer has not been used yet. Cleared by the caller.
    """

    code: ClassVar[str] = "sgd"
    classes: ClassVar[frozenset[tuple[str, str]]] = frozenset({("torch.optim.sgd", "SGD")})
    state_keys: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    marks_first: ClassVar[bool] = True

    settings: Sequence[SGDSettings]
    momentum_buffer: TensorList = ()
    first: bytearray = field(default_factory=bytearray)

    @classmethod
    def settings_of(cls, optimizer: Optimizer, group: dict[str, Any]) -> SGDSettings:
        g = group
        return SGDSettings(g["lr"], g["momentum"], g["dampening"], g["weight_decay"], g["nesterov"], g["maximize"])

    @classmethod
    def variant(cls, settings: SGDSettings) -> int:
        if settings.momentum == 0.0:
            return 0
        return 2 if settings.nesterov else 1

    @classmethod
    def states(cls, settings: SGDSettings) -> tuple[int, ...]:
        return () if settings.momentum == 0.0 else (0,)

    @classmethod
    def first_differs(cls, settings: SGDSettings) -> bool:
        return settings.dampening != 0.0

    @classmethod
    def updated(
        cls, weight: Tensor, gradient: Tensor, state: list[Tensor], settings: SGDSettings, step: float, first: bool
    ) -> tuple[Tensor, list[Tensor]]:
        s = settings
        direction = (-gradient if s.maximize else gradient) + s.weight_decay * weight
        if s.momentum != 0.0:
            buffer = direction if first else s.momentum * state[0] + (1.0 - s.dampening) * direction
            state = [buffer]
            direction = direction + s.momentum * buffer if s.nesterov else buffer
        return weight - float(s.lr) * direction, state
