"""Optimizers that trainers drive: methods with one, two and three passes, fused bases and one that is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..optim.bases import ADAMW, SGD, UNFUSED, Base
from ..optim.methods import named


def maker(name: str, base: Base, **settings: Any) -> Callable[[nn.Module], Any]:
    return lambda model: named(name).make(model, base, **settings)


MAKERS = {
    "SAM": maker("SAM", ADAMW),
    "SAM, not fused": maker("SAM", UNFUSED, lr=1e-3),
    "GSAM": maker("GSAM", ADAMW),
    "WSAM": maker("WSAM", SGD),
    "LookSAM": maker("LookSAM", SGD),
    "CRSAM": maker("CRSAM", SGD),
    "MomentumSAM": maker("MomentumSAM", SGD),
    "IntervalSAM": maker("IntervalSAM", SGD),
    "SAMPa": maker("SAMPa", SGD),
}
