"""Checks of values and names: settings that cannot be meant, or that would have no effect, are refused."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidSettingError

# ---------------------------------------------------------------------- values


def check_number(
    name: str,
    value: Any,
    at_least: float | None = None,
    at_most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raises :class:`InvalidSettingError` unless a setting is a finite number within its range.

    A tensor of one element is a number; on a GPU its value is not looked at. True and False are not numbers.

    Args:
        at_least, at_most: the range, its ends included; None for no limit.
        above, below: ends that are not part of it.
    """
    if isinstance(value, Tensor) and value.is_cuda and value.numel() == 1 and not value.is_complex():
        return
    number = _as_float(value)
    fits = (
        math.isfinite(number)
        and (at_least is None or number >= at_least)
        and (at_most is None or number <= at_most)
        and (above is None or number > above)
        and (below is None or number < below)
    )
    if not fits:
        ends = [("of at least", at_least), ("above", above), ("at most", at_most), ("below", below)]
        limits = " and ".join(f"{word} {end:g}" for word, end in ends if end is not None)
        raise InvalidSettingError(f"Invalid {name}: {value!r}; it must be a finite number{limits and ' ' + limits}")


def whole_number(name: str, value: Any, at_least: int | None = None) -> int:
    """A setting as an int: Python's, numpy's, or a tensor of one whole number.

    Raises:
        InvalidSettingError: if it is another number, or too small.
    """
    number = as_whole(value)
    if number is None or (at_least is not None and number < at_least):
        limit = "" if at_least is None else f" of at least {at_least}"
        raise InvalidSettingError(f"Invalid {name}: {value!r}; it must be a whole number{limit}")
    return number


def as_whole(value: Any) -> int | None:
    """The value as an int; None if its type is not that of whole numbers."""
    try:
        return None if _is_bool(value) else operator.index(value)
    except TypeError:
        return None


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises :class:`InvalidSettingError` unless a setting is one of several."""
    choices = list(choices)
    if not ((isinstance(value, (str, int)) or _is_bool(value)) and value in choices):
        listed = [repr(choice) for choice in choices]
        raise InvalidSettingError(f"Invalid {name}: {value!r}; it is {', '.join(listed[:-1])} or {listed[-1]}")


def _is_bool(value: Any) -> bool:
    """Whether it is a bool, numpy's and torch's included."""
    dtype = getattr(value, "dtype", None)
    return isinstance(value, bool) or getattr(dtype, "kind", None) == "b" or str(dtype) == "torch.bool"


def _as_float(value: Any) -> float:
    """The value as a float; NaN if it is not a real number."""
    is_complex = getattr(getattr(value, "dtype", None), "kind", None) == "c"
    if _is_bool(value) or is_complex or isinstance(value, (str, bytes, bytearray)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


# ---------------------------------------------------------------------- names


def near(name: str, known: Iterable[str]) -> str | None:
    """Which of several names was probably meant; None if that is unclear."""
    known = [k for k in known if k != name]
    plain = name.lower().strip("_")
    for candidate in known:
        # For names so short, such as eta, much would be near that means something else.
        if plain == candidate or (len(name) == len(candidate) and sorted(plain) == sorted(candidate)):
            return candidate
    found = get_close_matches(plain, [k for k in known if len(k) > 3], n=1, cutoff=0.8)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message."""
    meant = near(name, known)
    return "" if meant is None else f". Did you mean {meant}?"


def keywords_of(method: type) -> list[str]:
    """The names of the arguments of a method's constructor, as far as the classes of this package take them."""
    package = __name__.partition(".")[0]
    names: dict[str, None] = {}
    for cls in method.__mro__:
        if cls.__module__.partition(".")[0] == package and "__init__" in vars(cls):
            names.update(dict.fromkeys(named_parameters(cls)))
    return [name for name in names if name not in ("params", "method_defaults")]


def named_parameters(call: Callable[..., Any]) -> list[str]:
    """The parameters that a callable, or the constructor of a class, names; none if that cannot be known."""
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def check_group_keys(
    group: dict[str, Any],
    method: type,
    of_groups: Iterable[str],
    of_base: Iterable[str],
    is_of_base: Callable[[str], bool],
    fixed: Mapping[str, Any],
) -> None:
    """Refuses keys of a group that seem to be meant for the method, but that it would not look at.

    Other keys are left alone, as by any torch optimizer.

    Args:
        of_groups: the keys that the method keeps in groups.
        of_base: the base optimizer's defaults.
        is_of_base: whether a key that would be refused is one that the base optimizer uses.
        fixed: settings that the method's class has set for good.

    Raises:
        InvalidSettingError: for a setting of the whole optimizer, and for a misspelt one.
    """
    name, known = method.__name__, {*of_groups, *of_base, "params", "param_names"}
    for key in group:
        if key in known or not isinstance(key, str):
            continue
        meant = near(key, of_groups)
        is_setting = key in fixed or key in keywords_of(method)
        if not (is_setting or (meant and not _is_torchs(key))) or is_of_base(key):
            continue
        if key in fixed:
            raise InvalidSettingError(f"Invalid {key} in a group: with {name} it is {fixed[key]!r}")
        if is_setting:
            raise InvalidSettingError(
                f"{key} has no effect in a group: it is a setting of the whole optimizer, {name}(..., {key}=...). A "
                f"group may set {', '.join(of_groups) or 'nothing of its own'}"
            )
        raise InvalidSettingError(
            f"{name} does not know {key!r} in a group, where it would do nothing. Did you mean {meant}?"
        )


def _is_torchs(key: str) -> bool:
    """Whether it is a setting of some optimizer of torch, and so not a misspelt one."""
    return any(key in named_parameters(cls) for cls in vars(torch.optim).values() if isinstance(cls, type))


# ---------------------------------------------------------------------- radii


def radius(rho: Any, name: str = "rho") -> float | Tensor:
    """A radius as the kernels take it. A tensor on a GPU stays there, and its value is not looked at.

    Raises:
        InvalidSettingError: unless it is a finite number of at least 0.
    """
    if type(rho) is float and 0.0 <= rho < math.inf:
        return rho
    check_number(name, rho, 0)
    return rho if isinstance(rho, Tensor) and rho.is_cuda else float(rho)


def is_zero(rho: float | Tensor) -> bool:
    """Whether a radius is known to be zero."""
    if type(rho) is float and rho > 0.0:
        return False
    rho = radius(rho)
    return not isinstance(rho, Tensor) and rho == 0.0
