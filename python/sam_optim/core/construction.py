"""Making a base optimizer from the forms in which users give it."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from types import CodeType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .checks import did_you_mean, keywords_of, named_parameters
from .errors import InvalidSettingError

BaseOptimizer = Optimizer | Callable[..., Optimizer]


def make_base(params: Any, base_optimizer: BaseOptimizer, base_kwargs: dict[str, Any], method: type) -> Optimizer:
    """The base optimizer: the instance given, or ``base_optimizer(params, **base_kwargs)``.

    Args:
        method: the class whose base it will be.

    Raises:
        TypeError, InvalidSettingError: for what cannot serve as a base, and for keywords that nobody knows.
    """
    if _is_optimizer(params) or isinstance(base_optimizer, nn.Module):
        raise TypeError(f"the order is {method.__name__}(model.parameters(), base_optimizer, ...); no model is needed")
    if isinstance(base_optimizer, Optimizer) or _is_optimizer(base_optimizer):
        if not hasattr(base_optimizer, "param_groups"):
            raise TypeError(f"{type(base_optimizer).__name__} cannot be a base optimizer: it has no param_groups")
        if base_kwargs:
            raise TypeError(f"base_optimizer is an instance, so {', '.join(base_kwargs)} cannot be set here")
        base: Any = base_optimizer
        # The instance need not hold frozen parameters, as a model under LoRA has.
        given = list(_tensors(params))
        wanted = {id(p) for p in given}
        trained = {id(p) for p in given if p.requires_grad}
        held = {id(p) for group in base.param_groups for p in group["params"]}
        if not (trained <= held <= wanted):
            raise InvalidSettingError(
                "base_optimizer is an instance that holds other parameters than params: "
                f"{len(held - wanted)} that are not among params, and {len(trained - held)} of these are missing. Give "
                "both the same parameters, or give base_optimizer's class and settings instead of an instance"
            )
    elif callable(base_optimizer):
        try:
            base = base_optimizer(params, **base_kwargs)
        except TypeError as error:
            for name in base_kwargs:
                if name not in named_parameters(base_optimizer):
                    error.add_note(f"{method.__name__} knows no {name} either{did_you_mean(name, keywords_of(method))}")
            raise
        _refuse_unknown(base_kwargs, base_optimizer, base, method)
    else:
        raise TypeError(f"base_optimizer must be an optimizer class or instance, got {base_optimizer!r}")
    if not _is_optimizer(base):
        raise TypeError(f"base_optimizer made a {type(base).__name__}, which is no optimizer with groups of its own")
    if hasattr(base, "base_optimizer"):
        raise TypeError("base_optimizer wraps another optimizer itself; pass that one's base instead")
    for each in made_of(base):
        obstacle = _obstacle_to_being_base(each, is_wrapped=each is not base)
        if obstacle is not None:
            raise TypeError(f"{type(each).__name__} cannot be a base optimizer: {obstacle}")
    _complete(base)
    return base


def _complete(base: Any) -> None:
    """Completes a wrapper that derives from torch's Optimizer but has not called its constructor.

    Many a Lookahead is written so. It can step, but fails where torch looks for its hooks. Its class is not changed:
    torch's own way, ``__setstate__``, would make the ``step()`` of all its instances look for hooks.
    """
    if isinstance(base, Optimizer):
        for kind in ("step", "state_dict", "load_state_dict"):
            for when in ("pre", "post"):
                vars(base).setdefault(f"_optimizer_{kind}_{when}_hooks", OrderedDict())
        if not hasattr(base, "defaults"):
            base.defaults = {}


def made_of(base: Any) -> list[Any]:
    """An optimizer and those that it wraps, as attributes or in attributes that are lists and dicts."""
    found = [base]
    for each in found:
        for value in list(getattr(each, "__dict__", {}).values()):
            entries = value.values() if type(value) is dict else value if type(value) in (list, tuple) else [value]
            found += [o for o in entries if _is_optimizer(o) and not any(o is other for other in found)]
    return found


def defaults_of(base: Any) -> dict[str, Any]:
    """What the groups of an optimizer have by default, also if it only wraps the one with the defaults."""
    return {name: value for each in reversed(made_of(base)) for name, value in getattr(each, "defaults", {}).items()}


def puts_into_groups(base: Any, name: str) -> bool:
    """Whether a key of a group is the base's own, although it is not among its defaults."""
    kinds = [cls for each in made_of(base) for cls in type(each).__mro__ if cls.__module__.partition(".")[0] != "torch"]
    return any(_mentions(cls, name) for cls in kinds if cls is not object)


def reads_from_groups(base: Any, name: str) -> bool:
    """Whether an optimizer may have a key of that name in its groups: among its defaults, or by a word in its code."""
    kinds = [cls for each in made_of(base) for cls in type(each).__mro__ if cls.__module__.partition(".")[0] != "torch"]
    return name in defaults_of(base) or any(_mentions(cls, name, words_only=True) for cls in kinds if cls is not object)


def _refuse_unknown(keywords: Iterable[str], maker: Callable[..., Optimizer], base: Optimizer, method: type) -> None:
    """Refuses keywords that a base has swallowed with its ``**kwargs`` and does not use.

    Some bases put whatever they are given into their groups, so its being there proves nothing. A keyword must be named
    by a constructor, or occur in the code that makes the base or in that of its class.
    """
    kinds = [cls for each in made_of(base) for cls in type(each).__mro__ if cls not in (Optimizer, object)]
    calls: list[Callable[..., Any]] = [maker, *kinds]
    named = {name for call in calls for name in named_parameters(call)}
    unknown = [name for name in keywords if name not in named and not any(_mentions(call, name) for call in calls)]
    if unknown and named:
        raise TypeError(
            f"{method.__name__} got a keyword that neither it nor its base optimizer, {type(base).__name__}, knows: "
            f"{unknown[0]}{did_you_mean(unknown[0], [*keywords_of(method), *sorted(named)])}"
        )


def _mentions(owner: Callable[..., Any], name: str, *, words_only: bool = False) -> bool:
    """Whether a word occurs in the code of a function, or of a class's functions.

    Args:
        words_only: only as a string, such as a dict's key, and not as an attribute's name.
    """
    functions = vars(owner).values() if isinstance(owner, type) else [owner]
    plain = [f.func if isinstance(f, partial) else f for f in functions]
    codes = [getattr(inspect.unwrap(f), "__code__", None) for f in plain if callable(f)]
    while codes:
        code = codes.pop()
        if code is not None:
            if name in code.co_consts or (not words_only and name in code.co_names):
                return True
            codes += [each for each in code.co_consts if isinstance(each, CodeType)]
    return False


def _is_optimizer(candidate: Any) -> TypeGuard[Optimizer]:
    """Whether it is an optimizer, torch's or another."""
    return not isinstance(candidate, type) and hasattr(candidate, "param_groups") and hasattr(candidate, "step")


def _obstacle_to_being_base(base: Any, is_wrapped: bool) -> str | None:
    """What its update needs besides gradients in ``p.grad``, once a step; None if nothing.

    Args:
        is_wrapped: the base itself wraps it, and may call its ``step()`` with whatever that needs.
    """
    names = {cls.__name__.lower() for cls in type(base).__mro__}
    takes: Mapping[str, inspect.Parameter] = {}
    with suppress(TypeError, ValueError):
        takes = inspect.signature(base.step).parameters
    if isinstance(base, torch.optim.LBFGS):
        return "it evaluates gradients of its own within a step"
    if names & _TAKING_SECOND_DERIVATIVES or "hessian" in takes:
        return (
            "it differentiates p.grad once more, through weights that have been restored since. Take one that needs "
            "the gradient alone, torch.optim.AdamW for instance"
        )
    if any(group.get("differentiable") for group in base.param_groups if isinstance(group, dict)):
        return (
            "differentiable=True asks for steps that autograd differentiates, and a perturbation is no part of its "
            "graph. Leave it out"
        )
    if hasattr(base, "fused_backward"):
        return "it updates the weights within the backward pass"
    if hasattr(base, "first_step"):
        return "it makes passes of its own; give the optimizer that it is made of"
    if takes_single_samples(base):
        return f"it makes its update of gradients of single samples, which every pass adds to. {WRAP_AROUND}"
    if "acceleratedoptimizer" in names:
        return "accelerate has prepared it already. Give the plain one, and prepare the optimizer that is made of it"
    required = [
        name
        for name, parameter in takes.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if required and not is_wrapped:
        return f"its step() needs {required[0]}, and the passes of a step have been made when it is called"
    return None


WRAP_AROUND = (
    "Wrap it around this optimizer, and in each pass of first_step() and second_step() call its zero_grad() before the "
    "backward and its pre_step() after it"
)


def takes_single_samples(optimizer: Any) -> bool:
    """Whether it is for differential privacy, as opacus' DPOptimizer, and clips the gradient of each sample."""
    return hasattr(type(optimizer), "grad_samples")


# Names of classes, in lower case: several packages have them.
_TAKING_SECOND_DERIVATIVES = {"adahessian", "sophiah"}


def _tensors(params: Any) -> Iterable[Tensor]:
    """The tensors of any form of ``params`` that torch takes."""
    for entry in [params] if isinstance(params, Tensor) else params:
        if isinstance(entry, dict):
            yield from _tensors(entry["params"])
        else:
            yield entry[1] if isinstance(entry, tuple) else entry


def names_of(number: int, group: dict[str, Any]) -> list[str]:
    """Names of a group's parameters: those given with the parameters, or else made up.

    They are also made up if somebody has changed the list of parameters but not the list of names.
    """
    names, count = group.get("param_names"), len(group["params"])
    return list(names) if names and len(names) == count else [f"parameter {i} of group {number}" for i in range(count)]
