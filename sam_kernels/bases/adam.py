"""``torch.optim.Adam`` and ``AdamW``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .base import FusedBase, TensorList


class AdamSettings(NamedTuple):
    """One group's settings, named as in torch."""

    lr: float | Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False  # AdamW
    amsgrad: bool = False
    maximize: bool = False


@dataclass
class Adam(FusedBase[AdamSettings]):
    """Adam or AdamW, one settings entry for each group.

    Args:
        settings: for each group.
        exp_avg, exp_avg_sq, max_exp_avg_sq: for each tensor, of the weight's shape; the last for amsgrad only.
        step: for each tensor, one element of float32 or float64, on the CPU or on the tensor's device; the descent
            counts it up.
    """

    code: ClassVar[str] = "adam"
    classes: ClassVar[frozenset[tuple[str, str]]] = frozenset(
        {("torch.optim.adam", "Adam"), ("torch.optim.adamw", "AdamW")}
    )
    state_keys: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    counts_steps: ClassVar[bool] = True

    settings: Sequence[AdamSettings]
    exp_avg: TensorList = ()
    exp_avg_sq: TensorList = ()
    max_exp_avg_sq: TensorList = ()
    step: TensorList = ()

    @classmethod
    def settings_of(cls, optimizer: Optimizer, group: dict[str, Any]) -> AdamSettings:
        g = group
        # Adam with decoupled_weight_decay is AdamW, whatever the class.
        decoupled = g.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
        beta1, beta2 = g["betas"]
        return AdamSettings(
            g["lr"], beta1, beta2, g["eps"], g["weight_decay"], bool(decoupled), g["amsgrad"], g["maximize"]
        )

    @classmethod
    def variant(cls, settings: AdamSettings) -> int:
        return int(settings.amsgrad)

    @classmethod
    def states(cls, settings: AdamSettings) -> tuple[int, ...]:
        return (0, 1, 2) if settings.amsgrad else (0, 1)

    @staticmethod
    def corrections(settings: AdamSettings, step: float) -> tuple[float, float]:
        """1 - beta1^step, sqrt(1 - beta2^step)."""
        return 1.0 - settings.beta1**step, math.sqrt(1.0 - settings.beta2**step)

    @classmethod
    def updated(
        cls, weight: Tensor, gradient: Tensor, state: list[Tensor], settings: AdamSettings, step: float, first: bool
    ) -> tuple[Tensor, list[Tensor]]:
        s, lr = settings, float(settings.lr)
        bias_correction1, bias_correction2_sqrt = cls.corrections(s, step)
        gradient = -gradient if s.maximize else gradient
        if not s.decoupled:
            gradient = gradient + s.weight_decay * weight
        exp_avg = state[0] + (1.0 - s.beta1) * (gradient - state[0])
        exp_avg_sq = state[1] * s.beta2 + (1.0 - s.beta2) * gradient * gradient
        new_state, second_moment = [exp_avg, exp_avg_sq], exp_avg_sq
        if s.amsgrad:
            second_moment = torch.maximum(state[2], exp_avg_sq)
            new_state.append(second_moment)
        denominator = second_moment.sqrt() / bias_correction2_sqrt + s.eps
        decayed = weight * (1.0 - lr * s.weight_decay) if s.decoupled else weight
        return decayed - lr / bias_correction1 * exp_avg / denominator, new_state
