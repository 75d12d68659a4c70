"""``torch.optim.RMSprop``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .base import FusedBase, State, TensorFacts, TensorList, Updated


class RMSpropSettings(NamedTuple):
    """One group's settings, named as in torch."""

    lr: float | Tensor
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    maximize: bool = False


@dataclass
class RMSprop(FusedBase[RMSpropSettings]):
    """RMSprop, one settings entry for each group; ``grad_avg`` if centered, ``momentum_buffer`` with momentum."""

    code = "rmsprop"
    classes = (("torch.optim.rmsprop", "RMSprop"),)
    state_keys = ("grad_avg", "square_avg", "momentum_buffer")
    counts_steps = True

    settings: Sequence[RMSpropSettings]
    grad_avg: TensorList = ()
    square_avg: TensorList = ()
    momentum_buffer: TensorList = ()
    step: TensorList = ()

    @staticmethod
    def settings_of(optimizer: Any, group: dict[str, Any]) -> RMSpropSettings:
        g = group
        return RMSpropSettings(
            g["lr"], g["alpha"], g["eps"], g["weight_decay"], g["momentum"], g["centered"], g["maximize"]
        )

    @staticmethod
    def variant(s: RMSpropSettings) -> int:
        return (s.momentum > 0.0) + 2 * s.centered

    @staticmethod
    def states(s: RMSpropSettings) -> tuple[int, ...]:
        return (0,) * s.centered + (1,) + (2,) * (s.momentum > 0.0)

    @staticmethod
    def updated(weight: Tensor, gradient: Tensor, state: State, s: RMSpropSettings, facts: TensorFacts) -> Updated:
        own = dict(zip(RMSprop.states(s), state, strict=True))
        gradient = (-gradient if s.maximize else gradient) + s.weight_decay * weight
        own[1] = own[1] * s.alpha + (1.0 - s.alpha) * gradient * gradient
        second_moment = own[1]
        if s.centered:
            own[0] = own[0] + (1.0 - s.alpha) * (gradient - own[0])
            second_moment = second_moment - own[0] * own[0]
        denominator, lr = second_moment.sqrt() + s.eps, float(s.lr)
        if s.momentum > 0.0:
            own[2] = own[2] * s.momentum + gradient / denominator
            return weight - lr * own[2], list(own.values())
        return weight - lr * gradient / denominator, list(own.values())
