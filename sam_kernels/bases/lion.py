"""Lion (Chen et al. 2023, arXiv 2302.06675), of the packages pytorch-optimizer and lion-pytorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .base import FusedBase, State, TensorFacts, TensorList, Updated


class LionSettings(NamedTuple):
    """One group's settings."""

    lr: float | Tensor
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    decoupled: bool = True
    maximize: bool = False


@dataclass
class Lion(FusedBase[LionSettings]):
    """Lion, one settings entry for each group; ``exp_avg`` for each tensor, of the weight's shape."""

    code = "lion"
    classes = (("pytorch_optimizer.optimizer.lion", "Lion"), ("lion_pytorch.lion_pytorch", "Lion"))
    state_keys = ("exp_avg",)

    settings: Sequence[LionSettings]
    exp_avg: TensorList = ()

    @staticmethod
    def settings_of(optimizer: Any, group: dict[str, Any]) -> LionSettings | None:
        g, decay, (beta1, beta2) = group, group["weight_decay"], group["betas"]
        if "weight_decouple" in g:  # pytorch-optimizer's; its other options make other updates
            if any(g.get(option) for option in ("fixed_decay", "use_gc", "adanorm", "cautious")):
                return None
            return LionSettings(g["lr"], beta1, beta2, decay, bool(g["weight_decouple"]), optimizer.maximize)
        if any(param.is_complex() for param in g["params"]):  # lion-pytorch's takes a complex sign
            return None
        return LionSettings(g["lr"], beta1, beta2, decay / optimizer._init_lr if optimizer.decoupled_wd else decay)

    @staticmethod
    def states(s: LionSettings) -> tuple[int, ...]:
        return (0,)

    @staticmethod
    def updated(weight: Tensor, gradient: Tensor, state: State, s: LionSettings, facts: TensorFacts) -> Updated:
        lr, [exp_avg] = float(s.lr), state
        gradient = -gradient if s.maximize else gradient
        if not s.decoupled:
            gradient = gradient + s.weight_decay * weight
        direction = exp_avg + (1.0 - s.beta1) * (gradient - exp_avg)
        exp_avg = exp_avg + (1.0 - s.beta2) * (gradient - exp_avg)
        decayed = weight * (1.0 - lr * s.weight_decay) if s.decoupled else weight
        return decayed - lr * direction.sign(), [exp_avg]
