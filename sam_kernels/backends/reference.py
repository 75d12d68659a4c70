"""The definition: every operation in plain PyTorch, on any device.

The other backends agree with this one. Arithmetic is float64 for float64 weights and float32 for all others; a result
is rounded to its storage type once. Gram matrices are summed in float64; on devices without it (Apple's GPUs, some of
Intel's) within a tensor in float32, and over tensors in float64 on the CPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..bases import Base, TensorFacts
from ..host import inverse_of, is_set
from ..memory import shares_memory
from ..plan import Plan
from ..report import LaunchReport
from ..rules import LaunchRule, is_known
from ..scales import FlatScale, times
from ..snapshot import TAKEN, Snapshot
from .binding import check
from .contract import (
    AscentArguments,
    CombinationArguments,
    DescentArguments,
    GramArguments,
    Lists,
    MemoryArguments,
    RestoreArguments,
)


class ReferenceBackend:
    """The definition of each operation."""

    name = "reference"

    def unavailable_reason(self) -> str | None:
        """Always there."""
        return None

    def describe(self) -> str:
        return "plain PyTorch, any device"

    def serves(self, device: torch.device) -> bool:
        """Every device."""
        return True

    def knows(self, rule: object) -> bool:
        return is_known(rule)

    @torch.no_grad()
    def gram(self, arguments: GramArguments) -> Tensor:
        """G[i, j] = sum over tensors of <T x_i, T x_j>; a missing entry counts as zero. Float64, shape (k, k).

        T is that of the weights themselves: of their copy, where the snapshot holds one. The matrix lies on the
        tensors' device, or on the CPU if that device has no float64.
        """
        plan, lists, weighted, snapshot = arguments
        check(plan, lists, snapshot=snapshot)
        if not has_float64(plan.device.type):
            return _gram_without_float64(plan, lists, weighted, snapshot)
        count = len(lists)
        result = torch.zeros(count, count, dtype=torch.float64, device=plan.device)
        for index in range(len(plan)):
            eta = plan.geometry[index] if weighted else None
            scale = 1.0 if eta is None else _real(unperturbed(plan, index, snapshot)).double().abs() + eta
            columns = [None if x[index] is None else _real(x[index]).double() * scale for x in lists]
            for i, a in enumerate(columns):
                for j, b in enumerate(columns):
                    if a is not None and b is not None:
                        result[i, j] += (a * b).sum()
        return result

    @torch.no_grad()
    def perturb(self, arguments: CombinationArguments) -> None:
        """snapshot <- w; w <- w + T(w)^2 sum_i c_i x_i, for each tensor that has an entry in some list.

        Where a copy is held already, w is that copy; tensors with a copy but without an entry are restored. A master
        is a copy that is always held, and is rounded to the tensor at the end.
        """
        plan, lists, coefficients, scale, snapshot = arguments
        check(plan, lists, snapshot=snapshot)
        shares_memory(plan, lists, snapshot=snapshot)
        active = [i for i in range(len(plan)) if any(x[i] is not None for x in lists)]
        if snapshot is not None:
            _restore(plan, snapshot)
            for i in active:
                if not snapshot.taken[i]:
                    snapshot.tensors[i].copy_(plan.tensors[i])
            # All copies are complete before the first weight changes, and say so.
            for i in active:
                snapshot.taken[i] |= TAKEN
        for i in active:
            direction = _combination(plan, lists, i, coefficients, scale)
            if direction is None:
                continue
            wide = widened(_real(unperturbed(plan, i, snapshot)))
            eta = plan.geometry[i]
            if eta is not None:
                operator = wide.abs() + eta
                direction = operator * operator * direction
            _real(plan.tensors[i]).copy_(wide + direction)

    @torch.no_grad()
    def restore(self, arguments: RestoreArguments) -> None:
        """w <- snapshot where one is held, masters rounded. The flags stay; the caller clears them."""
        plan, snapshot = arguments
        check(plan, snapshot=snapshot)
        shares_memory(plan, snapshot=snapshot)
        _restore(plan, snapshot)

    @torch.no_grad()
    def combine(self, arguments: CombinationArguments) -> None:
        """out <- sum_i c_i x_i; zero where no list has an entry."""
        plan, lists, coefficients, scale, _ = arguments
        check(plan, lists)
        shares_memory(plan, lists, is_sum=True)
        for i, out in enumerate(plan.tensors):
            total = _combination(plan, lists, i, coefficients, scale)
            if total is None:
                out.zero_()
            else:
                _real(out).copy_(total)

    @torch.no_grad()
    def ascent(self, arguments: AscentArguments) -> LaunchReport:
        """Gram -> rule -> perturb with snapshot. A Gram matrix that is not finite leaves the weights themselves."""
        plan, lists, rule, scale, snapshot = arguments
        report = applied(rule, self.gram(GramArguments(plan, lists, True, snapshot)))
        if report.finite:
            self.perturb(CombinationArguments(plan, lists, report.coefficients, scale, snapshot))
        elif snapshot is not None:
            self.restore(RestoreArguments(plan, snapshot))
        return report

    @torch.no_grad()
    def descent(self, arguments: DescentArguments) -> LaunchReport:
        """[Gram -> rule ->] combine -> restore -> base update. Skipping the update restores all the same.

        Masters are updated, and rounded to the weights. A preview writes only weights of which a copy is held; copies,
        masters and state stay as they are.
        """
        plan, lists, base, snapshot, rule, scale, weighted, grad_scale, found_inf, is_preview, coefficients = arguments
        check(plan, lists, base, snapshot)
        is_shared = shares_memory(plan, lists, base, snapshot)
        skip_update = is_set(found_inf)
        if coefficients is not None:
            scale = times(scale, coefficients)
        if rule.needs_gram and not skip_update:
            report = applied(rule, self.gram(GramArguments(plan, lists, weighted, snapshot)))
        else:
            report = LaunchReport.without_gram(len(lists))
        if snapshot is not None:
            _restore(plan, snapshot)
        state_before: list[tuple[Tensor, Tensor]] = []
        if not skip_update and report.finite is not False:
            for i in range(len(plan)):
                if all(x[i] is None for x in lists):
                    continue
                if is_preview and (snapshot is None or not snapshot.taken[i]):
                    continue
                state = [column[i] for column in (*base.columns, base.steps) if column and column[i] is not None]
                state_before += [(t, t.clone()) for t in state if t is not None] if is_preview else []
                gradient = _combination(plan, lists, i, report.coefficients, scale, inverse_of(grad_scale))
                weight = _real(plan.tensors[i])
                updated = weight
                if snapshot is not None and snapshot.tensors[i].dtype != plan.tensors[i].dtype:
                    updated = snapshot.tensors[i].clone() if is_preview else snapshot.tensors[i]
                if gradient is None:
                    gradient = torch.zeros_like(widened(weight))
                _update(base, i, base.settings[plan.groups[i]], updated, gradient)
                if updated is not weight:
                    weight.copy_(updated)
                if not is_shared:
                    _put_back(state_before)
        _put_back(state_before)
        if snapshot is not None and not is_preview:
            snapshot.discard()
        return report

    def check_memory(self, arguments: MemoryArguments) -> None:
        plan, lists, snapshot = arguments
        check(plan, lists, snapshot=snapshot)
        shares_memory(plan, lists, snapshot=snapshot)


def _restore(plan: Plan, snapshot: Snapshot) -> None:
    for i, param in enumerate(plan.tensors):
        if snapshot.taken[i]:
            param.copy_(snapshot.tensors[i])


def _put_back(state: list[tuple[Tensor, Tensor]]) -> None:
    """State to what it was, the oldest last: two updates may have written the same."""
    while state:
        tensor, value = state.pop()
        tensor.copy_(value)


@cache
def has_float64(device_type: str) -> bool:
    """Whether a device computes in float64; asked once for each type of device."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device_type).add_(1.0)
    except (TypeError, RuntimeError):
        return False
    return True


def _gram_without_float64(plan: Plan, lists: Lists, weighted: bool, snapshot: Snapshot | None) -> Tensor:
    """On the CPU, by one transfer. Elements are divided by their tensor's largest: their squares might overflow."""
    result = torch.zeros(len(lists), len(lists), dtype=torch.float64, device="cpu")
    rows: list[int] = []
    columns: list[int] = []
    factors: list[Tensor] = []  # of each product: the largest element of either tensor, and the sum of the rest
    for index in range(len(plan)):
        eta = plan.geometry[index] if weighted else None
        scale = 1.0 if eta is None else _real(unperturbed(plan, index, snapshot)).float().abs() + eta
        scaled = []
        for number, x in enumerate(lists):
            if x[index] is not None and x[index].numel() > 0:  # type: ignore[union-attr]
                values = _real(x[index]).float() * scale
                largest = values.abs().amax()
                scaled.append((number, largest, values / torch.where(largest > 0.0, largest, 1.0)))
        for i, largest_of_a, a in scaled:
            for j, largest_of_b, b in scaled:
                rows.append(i)
                columns.append(j)
                factors.append(torch.stack([largest_of_a, largest_of_b, (a * b).sum()]))
    if factors:
        products = torch.stack(factors).cpu().double().prod(dim=1)
        places = torch.tensor([rows, columns], device="cpu")
        result.index_put_(tuple(places), products, accumulate=True)
    return result


def unperturbed(plan: Plan, index: int, snapshot: Snapshot | None) -> Tensor:
    """The weight itself: its copy, where one is held."""
    return plan.tensors[index] if snapshot is None or not snapshot.taken[index] else snapshot.tensors[index]


def applied(rule: LaunchRule, matrix: Tensor) -> LaunchReport:
    """What a rule makes of a Gram matrix; zeros if that is not finite."""
    finite = bool(matrix.isfinite().all())
    return LaunchReport(finite, matrix, rule(matrix) if finite else torch.zeros_like(matrix[0]))


def _real(tensor: Tensor | None) -> Tensor:
    """A view of complex elements as pairs of real ones; other tensors as they are."""
    assert tensor is not None
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def widened(tensor: Tensor) -> Tensor:
    """In the type of the arithmetic."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _combination(
    plan: Plan,
    lists: Lists,
    index: int,
    coefficients: Tensor,
    scale: FlatScale,
    factor: float = 1.0,
) -> Tensor | None:
    """sum_i c_i x_i of one tensor, None if every coefficient is zero: an infinite entry times zero must not be NaN."""
    wide = torch.float64 if plan.tensors[index].dtype in (torch.float64, torch.complex128) else torch.float32
    total: Tensor | None = None
    for i, x in enumerate(lists):
        number = factor * float(coefficients[i]) * float(scale[plan.groups[index] * len(lists) + i])
        c = torch.tensor(number, dtype=wide, device="cpu")
        if x[index] is None or c == 0.0:
            continue
        term = c.to(plan.device) * _real(x[index]).to(wide)
        total = term if total is None else total + term
    return total


def _update(base: Base, index: int, settings: Any, weight: Tensor, gradient: Tensor) -> None:
    """One tensor's weight, state and step count."""
    columns = [_real(base.columns[number][index]) for number in base.states(settings)]
    step = 0.0
    if base.counts_steps:
        counter = base.steps[index]
        assert counter is not None
        counter += 1
        step = float(counter)
    facts = TensorFacts(base.first is not None and bool(base.first[index]), base.corrections(settings, step))
    state = [widened(column) for column in columns]
    updated, state = base.updated(widened(weight), gradient, state, settings, facts)
    for column, value in zip(columns, state, strict=True):
        column.copy_(value)
    if float(settings.lr) != 0.0:
        weight.copy_(updated)


backend: ReferenceBackend = ReferenceBackend()
