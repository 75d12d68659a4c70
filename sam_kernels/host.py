"""Small loops over lists of tensors, native where the extension is built."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

__all__ = ["forget_old_weights", "gradients", "inverse_of", "is_set", "lookup", "missing", "pick", "same_objects"]

try:
    from . import _cpu  # type: ignore[attr-defined]
except ImportError:
    _cpu = None


def gradients(params: list[Tensor]) -> list[Tensor | None]:
    """The ``grad`` of each parameter."""
    if _cpu is not None:
        result: list[Tensor | None] = _cpu.gradients(params)
        return result
    return [p.grad for p in params]


def same_objects(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists hold the very same objects in the same order."""
    if _cpu is not None:
        return bool(_cpu.same_objects(a, b))
    return len(a) == len(b) and all(map(is_, a, b))


def missing(entries: list[Any]) -> list[int]:
    """The indices at which ``entries`` holds None."""
    if _cpu is not None:
        indices: list[int] = _cpu.missing(entries)
        return indices
    return [index for index, entry in enumerate(entries) if entry is None]


def lookup(dictionaries: list[dict[str, Any]], key: str) -> list[Any]:
    """The value of ``key`` in each dict, None where it is missing."""
    if _cpu is not None:
        values: list[Any] = _cpu.lookup(dictionaries, key)
        return values
    return [dictionary.get(key) for dictionary in dictionaries]


def pick(entries: Sequence[Any], index: Sequence[int]) -> list[Any]:
    """The entries at the given indices."""
    return [entries[i] for i in index]


def forget_old_weights() -> None:
    """Empties what torch keeps of weights that have been written since, and would go on using.

    An autocast that is entered keeps their 16-bit copies, ``parametrize.cached()`` what it has computed of them.
    """
    torch.clear_autocast_cache()
    parametrize = sys.modules.get("torch.nn.utils.parametrize")  # not imported for those who have no use for it
    if parametrize is not None and parametrize._cache:
        parametrize._cache.clear()


def inverse_of(grad_scale: Tensor | float | None) -> float:
    """1 / grad_scale as a number, 1 where there is none."""
    return 1.0 if grad_scale is None else 1.0 / float(grad_scale)


def is_set(flag: Tensor | bool | None) -> bool:
    """A flag as a bool; waits for the device if it lies on one."""
    return False if flag is None else bool(flag)
