"""``torch.optim.SGD``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from .base import FusedBase, State, TensorFacts, TensorList, Updated


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

    code = "sgd"
    classes = (("torch.optim.sgd", "SGD"),)
    state_keys = ("momentum_buffer",)
    marks_first = True

    settings: Sequence[SGDSettings]
    momentum_buffer: TensorList = ()
    first: bytearray = field(default_factory=bytearray)

    @staticmethod
    def settings_of(optimizer: Any, group: dict[str, Any]) -> SGDSettings:
        g = group
        return SGDSettings(g["lr"], g["momentum"], g["dampening"], g["weight_decay"], g["nesterov"], g["maximize"])

    @staticmethod
    def variant(s: SGDSettings) -> int:
        return 0 if s.momentum == 0.0 else 1 + s.nesterov

    @staticmethod
    def states(s: SGDSettings) -> tuple[int, ...]:
        return () if s.momentum == 0.0 else (0,)

    @staticmethod
    def first_differs(s: SGDSettings) -> bool:
        return s.dampening != 0.0

    @staticmethod
    def updated(weight: Tensor, gradient: Tensor, state: State, s: SGDSettings, facts: TensorFacts) -> Updated:
        direction = (-gradient if s.maximize else gradient) + s.weight_decay * weight
        if s.momentum != 0.0:
            buffer = direction if facts.first else s.momentum * state[0] + (1.0 - s.dampening) * direction
            state = [buffer]
            direction = direction + s.momentum * buffer if s.nesterov else buffer
        return weight - float(s.lr) * direction, state
