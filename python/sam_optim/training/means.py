"""What a loss is a mean over, as far as autograd's graph of it tells.

Micro-batches make the step of the whole batch if each counts by what its loss is a mean over. Whoever gave no weights
meant samples, or labels where some are ignored; here that is compared with what the loss has done.

Note [Slopes]. A mean over n is a sum in which the loss has the slope 1 / n. What stands between sums and the loss, as
divisions, weights and square roots of single numbers, need not be understood: autograd tells the slope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sam_kernels.sharding import is_distributed

from ..core.errors import InvalidSettingError

# What makes one number of others, and is gone through.
_ARRANGING = ("Add", "Sub", "Rsub", "Neg", "ToCopy", "View", "UnsafeView", "Squeeze", "Unsqueeze", "Clone", "Alias")
_SCALING = ("Mul", "Div", "Reciprocal", "Sqrt", "Log", "Exp", "Pow")
_MAX_NODES = 32
_EXACT = 1e-9
_MEAN, _SUM = 1, 2  # torch's numbers of a loss's reductions


class Term(NamedTuple):
    """A mean or a sum in a loss.

    Attributes:
        divisor: what the sum is divided by in the loss; None where nothing divides it, NaN where it is one of ratios
            of sums over the batch.
        is_of_targets: it is one of targets for sure, and not of the weights of a regulariser.
        precision: of the divisor, relative.
    """

    divisor: float | None
    is_of_targets: bool
    precision: float


class _Place(NamedTuple):
    """A node whose result is one number, with the loss's slope in it, and whether anything has scaled it."""

    node: Any
    slope: Tensor
    is_scaled: bool


def terms_of(loss: Tensor) -> list[Term]:
    """Cross entropies, other losses, means and sums."""
    if is_distributed(loss):  # there are other ranks to ask
        return []
    found = []
    slope = torch.ones(loss.shape, dtype=loss.dtype, device=loss.device)
    waiting, seen = [_Place(loss.grad_fn, slope, False)], 0
    with torch.no_grad(), suppress(RuntimeError, TypeError, NotImplementedError):  # of functions of others
        while waiting and seen < _MAX_NODES:
            place = waiting.pop(0)
            if place.node is None:
                continue
            seen += 1
            name = _name_of(place.node)
            if name in _ARRANGING or name in _SCALING:
                waiting += _before(place, name in _SCALING)
            elif (term := _term_of(name, place)) is not None:
                found.append(term)
    return found


def _before(place: _Place, scales: bool) -> list[_Place]:
    following = [node for node, _ in place.node.next_functions]
    if scales and _name_of(place.node) == "Mul" and None not in following:
        # Of a loss and a weight that is learnt: the weight may have any slope, and the loss has a steady one.
        slopes: Sequence[Any] = [place.slope] * len(following)
    else:
        found = place.node(place.slope)
        slopes = found if isinstance(found, tuple) else (found,)
        if scales:
            slopes = slopes[:1] if following[0] is not None else slopes  # what divides may be learnt, too
    # A single number that is one of several is none of the loss's terms.
    pairs = zip(following, slopes, strict=False)
    return [_Place(node, s, place.is_scaled or scales) for node, s in pairs if s is not None and s.numel() == 1]


def _term_of(name: str, place: _Place) -> Term | None:
    try:
        count, is_of_targets, precision = _count_of(name, place.node)
        factor = _factor_within(place.node) if name in ("Mean", "Sum") else None
    except (AttributeError, RuntimeError):
        return None  # what nodes save is torch's own business, and may have another name in another torch
    if name in ("Mean", "Sum") and _is_of_ratios(place.node):
        return Term(math.nan, False, _EXACT)
    if factor is None and not place.is_scaled:
        if count is None or (name == "Sum" and _is_of_means(place.node)):
            return None
        return Term(None if count == 1.0 and _is_sum(name, place.node) else count, is_of_targets, precision)
    slope = abs(float(place.slope)) * abs(1.0 if factor is None else factor)
    if not 0.0 < slope < math.inf:
        return None
    rounding = 4.0 * torch.finfo(place.slope.dtype).eps
    return Term((1.0 if count is None else count) / slope, is_of_targets, max(precision, rounding))


def _count_of(name: str, node: Any) -> tuple[float | None, bool, float]:
    """What a node divides a sum by, None where nobody knows; whether by targets for sure; and how precisely."""
    if name in ("NllLoss", "NllLoss2D"):
        if node._saved_reduction != _MEAN:
            return 1.0, True, _EXACT
        weight = node._saved_total_weight
        if is_distributed(weight):
            return None, True, _EXACT
        return float(weight), True, 4.0 * torch.finfo(weight.dtype).eps
    if name == "Mean":
        return float(node._saved_self_sym_numel), False, _EXACT
    if _is_sum(name, node):
        return 1.0, False, _EXACT
    if getattr(node, "_saved_reduction", None) == _MEAN:
        return float(node._saved_self.numel()), False, _EXACT
    return None, False, _EXACT


def _is_sum(name: str, node: Any) -> bool:
    return name == "Sum" or getattr(node, "_saved_reduction", None) == _SUM


def _factor_within(total: Any) -> float | None:
    """What single numbers have scaled the entries of a sum or mean by; None if none has."""
    found = None
    node = total.next_functions[0][0]
    while node is not None and _name_of(node) in ("Mul", "Div"):
        (left, _), (right, _) = (*node.next_functions, (None, 0))[:2]
        if None not in (left, right):  # a ratio of each sample's
            break
        is_second = left is None  # a number times the entries
        other = node._saved_self if is_second else node._saved_other
        if not isinstance(other, Tensor) or other.numel() != 1 or is_distributed(other):
            break
        value = float(other)
        found = (1.0 if found is None else found) * (value if _name_of(node) == "Mul" else 1.0 / (value or math.nan))
        node = right if is_second else left
    return found


def _is_of_ratios(total: Any) -> bool:
    """Whether a sum or mean is one over classes, of ratios of sums over all samples: Dice, Tversky and the like."""
    ratio = _within(total.next_functions[0][0], "Div")
    if ratio is None or None in [node for node, _ in ratio.next_functions]:
        return False
    divisor = _within(ratio.next_functions[1][0], "Sum")
    return divisor is not None and 0 in [
        dim % len(divisor._saved_self_sym_sizes) for dim in _signed(getattr(divisor, "_saved_dim", ()))
    ]


def _signed(dims: Sequence[int]) -> list[int]:
    """Autograd's nodes show negative dimensions as large numbers."""
    return [dim - 2**64 if dim >= 2**63 else dim for dim in dims]


def _within(node: Any, wanted: str) -> Any:
    """The first node of a name, behind what works on each entry; None if something else comes first."""
    for _ in range(_MAX_NODES):
        if node is None or _name_of(node) == wanted:
            return node
        if _name_of(node) not in (*_ARRANGING, "Mul", "Clamp", "ClampMin"):
            return None
        node = next((following for following, _ in node.next_functions if following is not None), None)
    return None


def _name_of(node: Any) -> str:
    return str(node.name()).split("Backward")[0]


def _is_of_means(total: Any) -> bool:
    """Whether a sum is one of means, over classes or tasks."""
    waiting, seen = [total], 0
    while waiting and seen < _MAX_NODES:
        node = waiting.pop(0)
        if node is None:
            continue
        seen += 1
        if _name_of(node) in ("Mean", "Div") or getattr(node, "_saved_reduction", None) == _MEAN:
            return True
        waiting += [following for following, _ in node.next_functions]
    return False


def refuse_other_means(found: Sequence[Sequence[Term]], factors: Sequence[float]) -> None:
    """Compares the denominators in each micro-batch with what these count; waits for a GPU.

    Raises:
        InvalidSettingError: if a mean over targets does not count as much as it is a mean over. Or another mean, unless
            it is over as many in all micro-batches, as the weights of a regulariser are. Or if the loss is a sum.
    """
    if len({len(terms) for terms in found}) != 1:
        return
    for terms in zip(*found, strict=True):
        numbers = [term.divisor for term in terms if term.divisor is not None]
        if len(numbers) < len(terms):
            if terms[0].is_of_targets or len(found[0]) == 1:
                raise InvalidSettingError(
                    "the loss is a sum, and micro-batches make the step of the whole batch for a mean: divide it by "
                    "the number of samples, or of what weight=... counts"
                )
            continue
        if any(map(math.isnan, numbers)):
            raise InvalidSettingError(
                "the loss is made of ratios of sums over the batch, as Dice over all samples is, and no micro-batches "
                "make its step: take the ratio for each sample; or, to average those of the parts, say what they "
                "count, as len(part[0]), by weight=..."
            )
        is_same = max(numbers) - min(numbers) <= max(term.precision for term in terms) * max(numbers)
        is_same = is_same and not all(term.is_of_targets for term in terms)
        total = sum(numbers)
        if is_same or not 0.0 < total < math.inf:
            continue
        tolerance = total * max(term.precision for term in terms)
        if any(abs(number - factor * total) > tolerance for number, factor in zip(numbers, factors, strict=True)):
            of = " and ".join(f"{number:g}" for number in numbers)
            counted = " and ".join(f"{factor:.3g}" for factor in factors)
            raise InvalidSettingError(
                f"the loss is a mean over {of} in micro-batches that count {counted}, which do not make the step of "
                "the whole batch: give TrainStep weight=..., from a part to what its loss is a mean over, as lambda "
                "part: (part['labels'] != -100).sum(); or, to let them count as they do, what they do, as "
                "len(part[0]). (A loss of all samples together, as Dice over a batch, has no parts that make its step.)"
            )
