"""PyTorch's functions on lists of tensors, for devices that no kernel of ours serves.

Gram matrix, perturbation, restoring and combination take a call or two for all tensors of a group, where ``reference``
takes a dozen for each tensor. What they cannot do as exactly goes to ``reference``: several data types, complex ones,
sums of lists in 16 bits, masters. So do updates, which on these devices are best left to a base optimizer's own
``step()``. A Gram matrix is read back from the device, and so lies on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..host import pick
from ..layouts import wide_dtype
from ..memory import shares_memory
from ..plan import Plan
from ..report import LaunchReport
from ..scales import FlatScale, numbers, times
from ..snapshot import MASTER, TAKEN, Snapshot
from .binding import check
from .contract import AscentArguments, CombinationArguments, DescentArguments, GramArguments, Lists, RestoreArguments
from .reference import ReferenceBackend, applied, has_float64, unperturbed
from .reference import backend as reference

# A norm of 1e-12: the squares of a thousand million equal elements are then still ordinary numbers of float32.
_SMALL_SQUARE = 1e-24


class _Lists:
    """The gradient lists of one operation, and what the weights' geometry makes of them, each computed once."""

    def __init__(self, plan: Plan, xs: Lists, snapshot: Snapshot | None, weighted: bool = True) -> None:
        check(plan, xs, snapshot=snapshot)
        self.plan, self.xs, self.snapshot = plan, xs, snapshot
        self.is_weighted = weighted and plan.is_weighted
        types = {layout.dtype for index, layout in enumerate(plan.layouts) if index not in plan.unreadable}
        types.update(entry.dtype for x in xs for entry in x if entry is not None)
        self.dtype = next(iter(types), torch.float32)  # where they are uniform
        self.is_uniform = len(types) == 1 and not self.dtype.is_complex
        self._operators: dict[torch.dtype, list[Tensor | None]] = {}
        self._once: dict[torch.dtype, list[list[Any]]] = {}

    def once(self, dtype: torch.dtype) -> list[list[Any]]:
        """T x, computed in that type where T is not 1."""
        if dtype not in self._once:
            self._once[dtype] = [self._times(_detached(x, range(len(x))), dtype) for x in self.xs]
        return self._once[dtype]

    def twice(self, dtype: torch.dtype) -> list[list[Any]]:
        """T^2 x."""
        return [self._times(column, dtype) for column in self.once(dtype)]

    def _times(self, column: list[Any], dtype: torch.dtype) -> list[Any]:
        if not self.is_weighted:
            return column
        if dtype not in self._operators:
            self._operators[dtype] = self._make_operators(dtype)
        operators = self._operators[dtype]
        index = [i for i, o in enumerate(operators) if o is not None and column[i] is not None]
        products = torch._foreach_mul([column[i].to(dtype) for i in index], pick(operators, index)) if index else []
        column = list(column)
        for i, product in zip(index, products, strict=True):
            column[i] = product
        return column

    def _make_operators(self, dtype: torch.dtype) -> list[Tensor | None]:
        operators: list[Tensor | None] = [None] * len(self.plan)
        index = [i for i, eta in enumerate(self.plan.geometry) if eta is not None]
        weights = [unperturbed(self.plan, i, self.snapshot).detach().to(dtype) for i in index]
        absolute = torch._foreach_abs(weights)
        etas = pick(self.plan.geometry, index)
        if any(etas):
            torch._foreach_add_(absolute, etas)
        for i, operator in zip(index, absolute, strict=True):
            operators[i] = operator
        return operators


class ForeachBackend(ReferenceBackend):
    """As the reference, with a call or two for all tensors; its updates are the reference's."""

    name = "foreach"

    def describe(self) -> str:
        return "PyTorch's functions on lists of tensors, any device"

    def gram(self, arguments: GramArguments) -> Tensor:
        """As the reference's, on the CPU.

        Within a tensor torch sums, in float64 where the device has it; T x is rounded to the weights' type, or float32.
        """
        plan, lists, weighted, snapshot = arguments
        return _gram(_Lists(plan, lists, snapshot, weighted))

    def perturb(self, arguments: CombinationArguments) -> None:
        plan, lists, coefficients, scale, snapshot = arguments
        _perturb(_Lists(plan, lists, snapshot), coefficients, scale)

    @torch.no_grad()
    def restore(self, arguments: RestoreArguments) -> None:
        plan, snapshot = arguments
        check(plan, snapshot=snapshot)
        index = [i for i, flag in enumerate(snapshot.taken) if flag]
        if any(snapshot.taken[i] & MASTER for i in index) or shares_memory(plan, snapshot=snapshot):
            reference.restore(arguments)
        elif index:
            torch._foreach_copy_(_detached(plan.tensors, index), pick(snapshot.tensors, index))

    @torch.no_grad()
    def combine(self, arguments: CombinationArguments) -> None:
        plan, xs, coefficients, scale, _ = arguments
        lists = _Lists(plan, xs, None, weighted=False)
        if not _is_exact(lists) or shares_memory(plan, xs, is_sum=True):
            reference.combine(arguments)
            return
        everything = range(len(plan))
        totals = [torch.zeros_like(t) for t in _detached(plan.tensors, everything)]
        for factor, members, number in _terms(lists, coefficients, scale):
            torch._foreach_add_(pick(totals, members), _detached(xs[number], members), alpha=factor)
        torch._foreach_copy_(_detached(plan.tensors, everything), totals)

    def ascent(self, arguments: AscentArguments) -> LaunchReport:
        plan, xs, rule, scale, snapshot = arguments
        lists = _Lists(plan, xs, snapshot)
        report = applied(rule, _gram(lists))
        if report.finite:
            _perturb(lists, report.coefficients, scale)
        elif snapshot is not None:
            self.restore(RestoreArguments(plan, snapshot))
        return report

    def descent(self, arguments: DescentArguments) -> LaunchReport:
        return reference.descent(arguments)


@torch.no_grad()
def _gram(lists: _Lists) -> Tensor:
    plan = lists.plan
    if not lists.is_uniform:
        return reference.gram(GramArguments(plan, lists.xs, lists.is_weighted, lists.snapshot)).cpu()
    wide = torch.float64 if has_float64(plan.device.type) else torch.float32
    columns = lists.once(wide_dtype(lists.dtype))
    places: list[tuple[int, int]] = []
    parts: list[Tensor] = []  # norms on the diagonal, products elsewhere
    for i, a in enumerate(columns):
        own = [t for t in a if t is not None]
        parts += torch._foreach_norm(own, 2.0, wide) if own else []
        places += [(i, i)] * len(own)
        for j, b in enumerate(columns[:i]):
            both = [(s, t) for s, t in zip(a, b, strict=True) if s is not None and t is not None]
            parts += [(s.to(wide) * t).sum() for s, t in both]
            places += [(i, j)] * len(both)
    count = len(columns)
    matrix = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    if parts:
        rows, others = torch.tensor(places, device="cpu").unbind(1)
        products = torch.stack(parts).cpu().double()
        products = torch.where(rows == others, products * products, products)
        matrix.index_put_((rows, others), products, accumulate=True)
        matrix = matrix.tril() + matrix.tril(-1).T
    # Squares in float32 may have overflowed or vanished; the reference divides first.
    if wide == torch.float32 and not (matrix.isfinite().all() and (matrix.diagonal() > _SMALL_SQUARE).all()):
        return reference.gram(GramArguments(plan, lists.xs, lists.is_weighted, lists.snapshot))
    return matrix


@torch.no_grad()
def _perturb(lists: _Lists, coefficients: Tensor, scale: FlatScale) -> None:
    plan, snapshot = lists.plan, lists.snapshot
    replaces = snapshot is not None and any(snapshot.taken)
    if replaces or not _is_exact(lists) or shares_memory(plan, lists.xs, snapshot=snapshot):
        reference.perturb(CombinationArguments(plan, lists.xs, coefficients, scale, snapshot))
        return
    index = [i for i in range(len(plan)) if any(x[i] is not None for x in lists.xs)]
    directions = lists.twice(lists.dtype)  # of the weights themselves, before the first is changed
    if snapshot is not None and index:
        torch._foreach_copy_(pick(snapshot.tensors, index), _detached(plan.tensors, index))
        for i in index:
            snapshot.taken[i] |= TAKEN
    for factor, members, number in _terms(lists, coefficients, scale):
        torch._foreach_add_(_detached(plan.tensors, members), pick(directions[number], members), alpha=factor)


def _is_exact(lists: _Lists) -> bool:
    """Whether the combination can be added up list by list: rounded once, or in float32 at least."""
    if not lists.is_uniform:
        return False
    return lists.dtype.itemsize >= 4 or (len(lists.xs) == 1 and not lists.is_weighted)


def _terms(lists: _Lists, coefficients: Tensor, scale: FlatScale) -> Iterator[tuple[float, list[int], int]]:
    """What is to be added up: a factor, the tensors of a group that a list has entries for, the list's number."""
    groups: dict[int, list[int]] = {}
    for i, group in enumerate(lists.plan.groups):
        groups.setdefault(group, []).append(i)
    factors = numbers(times(scale, coefficients.cpu()))
    for number, x in enumerate(lists.xs):
        for group, index in groups.items():
            present = [i for i in index if x[i] is not None]
            factor = factors[group * len(lists.xs) + number]
            if present and factor != 0.0:  # an infinite entry times zero must not be NaN
                yield factor, present, number


def _detached(tensors: Sequence[Tensor | None], index: Sequence[int]) -> list[Any]:
    return [None if (t := tensors[i]) is None else t.detach() for i in index]


backend: ForeachBackend = ForeachBackend()
