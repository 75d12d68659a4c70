"""Making a base optimizer from the forms in which users give it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .errors import InvalidSettingError
from .settings import did_you_mean, named_parameters, settings_of

BaseOptimizer = Optimizer | Callable[..., Optimizer]


def make_base(params: Any, base_optimizer: BaseOptimizer, base_kwargs: dict[str, Any], method: type) -> Optimizer:
    """The base optimizer: the instance given, or ``base_optimizer(params, **base_kwargs)``.

    Args:
        method: the class that it is to be the base of.

    Raises:
        TypeError, InvalidSettingError: for what cannot serve as a base, and for keywords that nobody knows.
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
        _refuse_unknown(base_kwargs, base_optimizer, base, method)
    else:
        raise TypeError(f"base_optimizer must be an optimizer class or instance, got {base_optimizer!r}")
    if not hasattr(base, "param_groups") or not hasattr(base, "step"):
        raise TypeError(f"base_optimizer made a {type(base).__name__}, which is no optimizer")
    if hasattr(base, "base_optimizer"):
        raise TypeError("base_optimizer wraps another optimizer itself; pass that one's base instead")
    if isinstance(base, torch.optim.LBFGS):
        raise TypeError("LBFGS cannot be a base optimizer: it evaluates gradients of its own within a step")
    return base


def _refuse_unknown(keywords: Iterable[str], maker: Callable[..., Optimizer], base: Optimizer, method: type) -> None:
    """Refuses keywords that a base has swallowed by its own ``**kwargs`` and looks at no more.

    That some put whatever they are given into their groups says nothing. So a keyword has to be named by a constructor,
    or occur in the code that makes the base or is its class's.
    """
    inner = [value for value in vars(base).values() if isinstance(value, Optimizer)]
    kinds = [cls for each in (base, *inner) for cls in type(each).__mro__ if cls not in (Optimizer, object)]
    calls: list[Callable[..., Any]] = [maker, *kinds]
    named = {name for call in calls for name in named_parameters(call)}
    unknown = [name for name in keywords if name not in named and not any(_mentions(call, name) for call in calls)]
    if unknown and named:
        raise TypeError(
            f"{method.__name__} got a keyword that neither it nor its base optimizer, {type(base).__name__}, knows: "
            f"{unknown[0]}{did_you_mean(unknown[0], [*settings_of(method), *sorted(named)])}"
        )


def _mentions(owner: Callable[..., Any], name: str) -> bool:
    """Whether a word occurs in the code of a function, or of a class's functions."""
    functions = vars(owner).values() if isinstance(owner, type) else [owner]
    plain = [f.func if isinstance(f, partial) else f for f in functions]
    codes = [getattr(inspect.unwrap(f), "__code__", None) for f in plain if callable(f)]
    while codes:
        code = codes.pop()
        if code is not None:
            if name in code.co_names or name in code.co_consts:
                return True
            codes += [each for each in code.co_consts if isinstance(each, CodeType)]
    return False


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
