"""``torch.optim.Adam`` and ``AdamW``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import FusedBase, State, TensorFacts, TensorList, Updated


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

    code = "adam"
    classes = (("torch.optim.adam", "Adam"), ("torch.optim.adamw", "AdamW"))
    state_keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    counts_steps = True

    settings: Sequence[AdamSettings]
    exp_avg: TensorList = ()
    exp_avg_sq: TensorList = ()
    max_exp_avg_sq: TensorList = ()
    step: TensorList = ()

    @staticmethod
    def settings_of(optimizer: Any, group: dict[str, Any]) -> AdamSettings:
        g = group
        # Adam with decoupled_weight_decay is AdamW, whatever the class.
        decoupled = bool(g.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)))
        betas = g["betas"]
        return AdamSettings(
            g["lr"], betas[0], betas[1], g["eps"], g["weight_decay"], decoupled, g["amsgrad"], g["maximize"]
        )

    @staticmethod
    def variant(s: AdamSettings) -> int:
        return int(s.amsgrad)

    @staticmethod
    def states(s: AdamSettings) -> tuple[int, ...]:
        return (0, 1, 2) if s.amsgrad else (0, 1)

    @staticmethod
    def corrections(s: AdamSettings, step: float) -> tuple[float, float]:
        """1 - beta1^step, sqrt(1 - beta2^step)."""
        return 1.0 - s.beta1**step, math.sqrt(1.0 - s.beta2**step)

    @staticmethod
    def updated(weight: Tensor, gradient: Tensor, state: State, s: AdamSettings, facts: TensorFacts) -> Updated:
        lr, (bias_correction1, bias_correction2_sqrt) = float(s.lr), facts.corrections
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
