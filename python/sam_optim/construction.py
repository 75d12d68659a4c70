"""Making a base optimizer from the forms in which users give it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .errors import InvalidSettingError

BaseOptimizer = Optimizer | Callable[..., Optimizer]


def make_base(params: Any, base_optimizer: BaseOptimizer, base_kwargs: dict[str, Any]) -> Optimizer:
    """The base optimizer: the instance given, or ``base_optimizer(params, **base_kwargs)``.

    Raises:
        TypeError, InvalidSettingError: for what cannot serve as a base.
    """
    if isinstance(base_optimizer, Optimizer):
        if base_kwargs:
            raise TypeError(f"base_optimizer is an instance, so {', '.join(base_kwargs)} cannot be set here")
        base = base_optimizer
        wanted = {id(p) for p in _tensors(params)}
        held = {id(p) for group in base.param_groups for p in group["params"]}
        if wanted != held:
            raise InvalidSettingError("base_optimizer is an instance that holds other parameters than params")
    elif callable(base_optimizer):
        base = base_optimizer(params, **base_kwargs)
    else:
        raise TypeError(f"base_optimizer must be an optimizer class or instance, got {base_optimizer!r}")
    if not hasattr(base, "param_groups") or not hasattr(base, "step"):
        raise TypeError(f"base_optimizer made a {type(base).__name__}, which is no optimizer")
    if hasattr(base, "base_optimizer"):
        raise TypeError("base_optimizer wraps another optimizer itself; pass that one's base instead")
    if isinstance(base, torch.optim.LBFGS):
        raise TypeError("LBFGS cannot be a base optimizer: it evaluates gradients of its own within a step")
    return base


def _tensors(params: Any) -> Iterable[Tensor]:
    """The tensors of any form of ``params`` that torch takes."""
    for entry in [params] if isinstance(params, Tensor) else params:
        if isinstance(entry, dict):
            yield from _tensors(entry["params"])
        else:
            yield entry[1] if isinstance(entry, tuple) else entry


def names_of(number: int, group: dict[str, Any]) -> list[str]:
    """Names of a group's parameters: their own if given with the parameters, else made up.

    Also made up after somebody has changed the list of parameters but not that of their names.
    """
    names, count = group.get("param_names"), len(group["params"])
    return list(names) if names and len(names) == count else [f"parameter {i} of group {number}" for i in range(count)]
