"""The base optimizers that tests put into methods, each with a name.

To add one, add it to ``BASES``, with ``fused=False`` if the kernels do not know its update. Tests that ask for every
base, or for every fused one, then have it; tests of every method take ``KINDS``, one base of each kind.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Base:
    """A base optimizer and settings for it."""

    cls: type[torch.optim.Optimizer]
    settings: dict[str, Any]
    fused: bool = True

    def __str__(self) -> str:
        return ",".join([self.cls.__name__, *(f"{k}={v}" for k, v in self.settings.items())])

    def make(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        """The base itself, without a method around it."""
        return self.cls(params, **{**copy.deepcopy(self.settings), **more})

    @property
    def maximizes(self) -> bool:
        return bool(self.settings.get("maximize"))

    @property
    def has_momentum(self) -> bool:
        return "momentum" in self.settings or "Adam" in self.cls.__name__


PLAIN_SGD = Base(torch.optim.SGD, {"lr": 0.05})
SGD = Base(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01})
MAXIMIZING_SGD = Base(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.2, "maximize": True})
NESTEROV = Base(torch.optim.SGD, {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01})
SGD_OF_A_TENSOR = Base(torch.optim.SGD, {"lr": torch.tensor(0.05), "momentum": 0.9})
ADAM = Base(torch.optim.Adam, {"lr": 0.01})
AMSGRAD = Base(torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True})
MAXIMIZING_ADAM = Base(torch.optim.Adam, {"lr": 0.01, "betas": (0.3, 0.9), "maximize": True, "weight_decay": 0.1})
ADAMW = Base(torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1})
ADAMW_AMSGRAD = Base(torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "eps": 1e-3})
RMSPROP = Base(torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True, "weight_decay": 0.01})
ADAGRAD = Base(torch.optim.Adagrad, {"lr": 0.05}, fused=False)
RADAM = Base(torch.optim.RAdam, {"lr": 0.01}, fused=False)

BASES = [
    PLAIN_SGD,
    SGD,
    MAXIMIZING_SGD,
    NESTEROV,
    SGD_OF_A_TENSOR,
    ADAM,
    AMSGRAD,
    MAXIMIZING_ADAM,
    ADAMW,
    ADAMW_AMSGRAD,
    RMSPROP,
    ADAGRAD,
    RADAM,
]
if find_spec("pytorch_optimizer") is not None:
    from pytorch_optimizer.optimizer.lion import Lion

    BASES.append(Base(Lion, {"lr": 0.01, "weight_decay": 0.1}))
FUSED = [base for base in BASES if base.fused]
UNFUSED = RADAM
KINDS = [SGD, ADAMW, UNFUSED]  # fused with one state, fused with two, and not fused
