"""What a loss is a mean over, as far as autograd's graph of it tells.

Micro-batches make the step of the whole batch if each counts by what its loss is a mean over. Whoever gave no weights
meant samples, or labels where some are ignored; here that is compared with what the loss has done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidSettingError

# Through which a mean remains the loss, or a term of it.
_PASSED = ("Add", "Sub", "Mul", "Div", "Neg", "ToCopy", "View", "UnsafeView", "Squeeze", "Unsqueeze", "Clone", "Alias")
_MAX_NODES = 32

# A number, or a tensor of one element; and whether it is one of targets for sure.
Denominator = tuple[float | Tensor, bool]


def denominators(loss: Tensor) -> list[Denominator]:
    """What the terms of a loss are divided by: cross entropies, means, and sums that something divides."""
    found: list[Denominator] = []
    waiting: list[Any] = [loss.grad_fn]
    for _ in range(_MAX_NODES):
        if not waiting:
            break
        node = waiting.pop(0)
        if node is None:
            continue
        name = node.name().split("Backward")[0]
        if name in ("NllLoss", "NllLoss2D"):
            if node._saved_reduction == 1:
                found.append((node._saved_total_weight, True))
        elif name == "Mean":
            found.append((float(node._saved_self_sym_numel), False))
        elif name == "Div" and _is_sum(node) and node._saved_other.numel() == 1:
            found.append((node._saved_other, False))
        elif name in _PASSED:
            waiting += [following for following, _ in node.next_functions]
    return found


def _is_sum(division: Any) -> bool:
    dividend = division.next_functions[0][0]
    return dividend is not None and dividend.name().split("Backward")[0] == "Sum"


def refuse_other_means(found: Sequence[Sequence[Denominator]], shares: Sequence[float]) -> None:
    """Compares the denominators in each micro-batch with what these count; waits for a GPU.

    Raises:
        InvalidSettingError: if a mean over targets does not count as much as it is a mean over. Or another mean, unless
            it is over as many in all micro-batches, as the weights of a regulariser are.
    """
    if len({len(terms) for terms in found}) != 1:
        return
    for terms in zip(*found, strict=True):
        numbers = [float(number) for number, _ in terms]
        is_same = len(set(numbers)) == 1 and not all(is_of_targets for _, is_of_targets in terms)
        total = sum(numbers)
        if is_same or not 0.0 < total < math.inf:
            continue
        tolerance = total * max(_precision(number) for number, _ in terms)
        if any(abs(number - share * total) > tolerance for number, share in zip(numbers, shares, strict=True)):
            of = " and ".join(f"{number:g}" for number in numbers)
            counted = " and ".join(f"{share:.3g}" for share in shares)
            raise InvalidSettingError(
                f"the loss is a mean over {of} in micro-batches that count {counted}, which do not make the step of "
                "the whole batch: give TrainStep weight=..., from a part to what its loss is a mean over, as lambda "
                "part: (part['labels'] != -100).sum(); or, to let them count as they do, what they do, as len(part[0])"
            )


def _precision(number: float | Tensor) -> float:
    """Of a sum that a loss has made in its own data type."""
    if isinstance(number, Tensor) and number.is_floating_point():
        return 4.0 * torch.finfo(number.dtype).eps
    return 1e-9
