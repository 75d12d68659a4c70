"""What a loss is a mean over, as far as autograd's graph of it tells.

Micro-batches make the step of the whole batch if each counts by what its loss is a mean over. Whoever gave no weights
meant samples, or labels where some are ignored; here that is compared with what the loss has done.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import InvalidSettingError

# Through which a mean remains the loss, or a term of it.
_PASSED = ("Add", "Sub", "Mul", "Div", "Neg", "ToCopy", "View", "UnsafeView", "Squeeze", "Unsqueeze", "Clone", "Alias")
_MAX_NODES = 32


class Term(NamedTuple):
    """A mean or a sum in a loss.

    Attributes:
        divisor: what a sum is divided by, a number or a tensor of one element; None where nothing divides it.
        is_of_targets: it is one of targets for sure, and not of the weights of a regulariser.
    """

    divisor: float | Tensor | None
    is_of_targets: bool


def terms_of(loss: Tensor) -> list[Term]:
    """Cross entropies, means, sums that something divides, and sums."""
    found = [term for node in _nodes(loss.grad_fn, _PASSED) if (term := _term_of(node, loss)) is not None]
    # Subclasses, as DTensors, may have other ranks to ask.
    return [term for term in found if not isinstance(term.divisor, Tensor) or type(term.divisor) is Tensor]


def _term_of(node: Any, loss: Tensor) -> Term | None:
    name = _name_of(node)
    try:
        if name in ("NllLoss", "NllLoss2D"):
            if node._saved_reduction == 1:
                return Term(node._saved_total_weight, True)
            if node._saved_reduction == 2 and not _is_divided(node, loss):
                return Term(None, True)
        elif name == "Mean":
            return Term(float(node._saved_self_sym_numel), False)
        elif name == "Div" and _divides_a_sum(node):
            return Term(node._saved_other, False)
        elif name == "Sum" and not _is_divided(node, loss) and not _is_of_means(node):
            return Term(None, False)
    except (AttributeError, RuntimeError):
        return None  # what nodes save is torch's own business, and may have another name in another torch
    return None


def _nodes(start: Any, passed: Sequence[str] | None) -> Iterator[Any]:
    """The nodes of a graph nearest to one, not those behind others than ``passed``."""
    waiting, seen = [start], 0
    while waiting and seen < _MAX_NODES:
        node = waiting.pop(0)
        if node is None:
            continue
        seen += 1
        yield node
        if passed is None or _name_of(node) in passed:
            waiting += [following for following, _ in node.next_functions]


def _name_of(node: Any) -> str:
    return str(node.name()).split("Backward")[0]


def _divides_a_sum(division: Any) -> bool:
    dividend = division.next_functions[0][0]
    return dividend is not None and _name_of(dividend) == "Sum" and division._saved_other.numel() == 1


def _is_divided(term: Any, loss: Tensor) -> bool:
    """Whether something between a sum and the loss divides it; it may be the number of samples."""
    return any(
        _name_of(node) in ("Div", "Mul") and any(term in _nodes(own, _PASSED) for own, _ in node.next_functions)
        for node in _nodes(loss.grad_fn, _PASSED)
    )


def _is_of_means(total: Any) -> bool:
    """Whether a sum is one of means, over classes or tasks."""
    return any(_name_of(node) in ("Mean", "Div", "NllLoss", "NllLoss2D") for node in _nodes(total, None))


def refuse_other_means(found: Sequence[Sequence[Term]], shares: Sequence[float]) -> None:
    """Compares the denominators in each micro-batch with what these count; waits for a GPU.

    Raises:
        InvalidSettingError: if a mean over targets does not count as much as it is a mean over. Or another mean, unless
            it is over as many in all micro-batches, as the weights of a regulariser are. Or if the loss is a sum.
    """
    if len({len(terms) for terms in found}) != 1:
        return
    for terms in zip(*found, strict=True):
        divisors = [divisor for divisor, _ in terms if divisor is not None]
        if len(divisors) < len(terms):
            if terms[0].is_of_targets or len(found[0]) == 1:
                raise InvalidSettingError(
                    "the loss is a sum, and micro-batches make the step of the whole batch for a mean: divide it by "
                    "the number of samples, or of what weight=... counts"
                )
            continue
        numbers = [float(divisor) for divisor in divisors]
        is_same = len(set(numbers)) == 1 and not all(is_of_targets for _, is_of_targets in terms)
        total = sum(numbers)
        if is_same or not 0.0 < total < math.inf:
            continue
        tolerance = total * max(map(_precision, divisors))
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
