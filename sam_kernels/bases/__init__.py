"""The base optimizers whose updates the kernels can make.

Each has a module here, with its settings, its state and the definition of its update; :data:`BASES` is the list of
them. Names and meanings are torch's; the state tensors are those that torch keeps under the keys of the same names. A
learning rate may be a tensor of one element; on a GPU it is then read when the kernel runs.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .adam import Adam, AdamSettings
from .base import FusedBase, TensorFacts, TensorList
from .lion import Lion, LionSettings
from .rmsprop import RMSprop, RMSpropSettings
from .sgd import SGD, SGDSettings

Base = FusedBase[Any]

BASES: tuple[type[Base], ...] = (SGD, Adam, Lion, RMSprop)

__all__ = [
    "BASES",
    "KNOWN_CLASSES",
    "SGD",
    "Adam",
    "AdamSettings",
    "Base",
    "Lion",
    "LionSettings",
    "RMSprop",
    "RMSpropSettings",
    "SGDSettings",
    "TensorFacts",
    "TensorList",
    "base_of",
    "settings_of",
]


# Names of the optimizer classes whose updates these are.
KNOWN_CLASSES = list(dict.fromkeys(name for base in BASES for _, name in base.classes))

_NUMBERS = frozenset((float, int, bool))
_BY_NAME = {name: base for base in BASES for name in base.classes}


def base_of(cls: type[Optimizer]) -> type[Base] | None:
    """The base whose updates an optimizer class makes, None if the kernels know none.

    It must be that very class: a subclass may do anything. Packages that have not been imported are not imported.
    """
    base = _BY_NAME.get((cls.__module__, cls.__qualname__))
    if base is None or getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        return None
    return base


def settings_of(optimizer: Optimizer) -> list[Any] | None:
    """Each group's settings, of the optimizer's :func:`base_of`; None if the kernels cannot make its updates now."""
    base = base_of(type(optimizer))
    if base is None:
        return None
    found = []
    for group in optimizer.param_groups:
        settings = None if group.get("differentiable") else base.settings_of(optimizer, group)
        # Tensors would have to be waited for; only the learning rate may be one.
        if settings is None:
            return None
        if not _NUMBERS.issuperset(map(type, settings[1:])) and any(isinstance(v, Tensor) for v in settings[1:]):
            return None
        found.append(settings)
    return found
