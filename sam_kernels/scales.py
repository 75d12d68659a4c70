"""Scales of the gradient lists: one for each group and list, numbers or, on a GPU, tensors of one element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["NUMBER", "Scale"]

Scale = float | Tensor | Sequence[Sequence[float | Tensor]]

# What is one scale for all; numpy's numbers are Real.
NUMBER = (int, float, Tensor, Real)

# One entry for each group and list, group by group.
FlatScale = Sequence[float | Tensor]


def flattened(scale: Scale, groups: int, lists: int) -> FlatScale:
    """An entry for each group and list.

    Tensors on a device stay what they are; nothing waits for them.

    Raises:
        ValueError: if ``scale`` has fewer entries than there are groups, or not one for each list, or an entry that is
            not finite.
    """
    if not isinstance(scale, (list, tuple)) and isinstance(scale, NUMBER):
        return [_entry(scale)] * (lists * groups)
    try:
        flat = [_entry(value) for group in scale for value in group]
    except TypeError:
        raise ValueError(
            f"scale must be a number, or a list of {lists} for each group, [[...], ...], got {scale}"
        ) from None
    if len(flat) != len(scale) * lists or len(scale) < groups:
        raise ValueError(f"scale must give {lists} numbers for each group, got {scale}")
    return flat


def times(scale: FlatScale, coefficients: Tensor) -> FlatScale:
    """The scales times each list's coefficient."""
    factors: Sequence[float | Tensor]
    factors = coefficients.tolist() if coefficients.device.type == "cpu" else list(coefficients.unbind())
    return [value * factors[index % len(factors)] for index, value in enumerate(scale)]


def numbers(scale: FlatScale) -> list[float]:
    """As numbers; waits for the device if a tensor lies on one."""
    return [float(value) for value in scale]


def float64(values: Tensor | Sequence[Any]) -> Tensor:
    """As a tensor. A tensor stays where it is, and numbers go to the CPU, whatever torch's default device."""
    if isinstance(values, Tensor):
        return values.to(torch.float64)
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _entry(value: float | Tensor) -> float | Tensor:
    if type(value) is not float and isinstance(value, Tensor) and value.device.type != "cpu":
        return value.detach()
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"Invalid scale: {number}; it must be finite")
    return number
