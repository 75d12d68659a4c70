"""What the backends for GPUs have in common.

Nothing here waits for the GPU, with one exception: where Adam's step counts are on the host, as torch keeps them unless
a group is ``capturable`` or ``fused``, a descent that may be skipped has to know whether the update was made.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from ..bases import Base
from ..graphs import refuse_capture
from ..plan import Plan
from ..report import LaunchReport
from ..rules import Fixed, LaunchRule
from ..scales import FlatScale, times
from ..snapshot import Snapshot
from .binding import NOTHING, SUM, WEIGHTS, WEIGHTS_AND_STATE, Binding
from .contract import (
    AscentArguments,
    CombinationArguments,
    DescentArguments,
    GramArguments,
    Lists,
    RestoreArguments,
)
from .native import NativeBackend

_FIXED = Fixed()


class GpuBackend(NativeBackend):
    """The operations by kernels on a GPU.

    Args:
        name: of the backend.
        native: what names the columns of the backend's tables and the entries of a report.
        tuning: of its launches.

    Attributes:
        tuning: of all launches from now on.
    """

    def __init__(self, name: str, native: Any, tuning: Any) -> None:
        super().__init__(name, native)
        self.tuning = tuning

    @abstractmethod
    def _rule(self, rule: LaunchRule) -> Any:
        """A rule as the table's launches take it."""

    def launches(self, plan: Plan) -> int:
        """Kernel launches of the last operation on a plan."""
        return int(plan.bindings[self.name].table.launches)

    def _bound(
        self,
        plan: Plan,
        lists: Lists,
        snapshot: Snapshot | None,
        writes: int,
        base: Base | None = None,
        *,
        reads_weights: bool = True,
        is_preview: bool = False,
    ) -> Binding:
        binding = super()._bound(
            plan, lists, snapshot, writes, base, reads_weights=reads_weights, is_preview=is_preview
        )
        self._prepare(binding, plan)
        return binding

    def _prepare(self, binding: Binding, plan: Plan) -> None:
        """Before each launch."""
        if binding.tuning is not self.tuning:
            binding.tuning = self.tuning
            binding.table.tune(*astuple(self.tuning))

    # ------------------------------------------------------------------ operations

    def gram(self, arguments: GramArguments) -> Tensor:
        plan, lists, weighted, snapshot = arguments
        binding = self._bound(plan, lists, snapshot, NOTHING, reads_weights=weighted)
        matrix = self._gram_report(binding.table, plan, _FIXED, len(lists), weighted, snapshot).gram
        binding.forget_copies()
        assert matrix is not None
        return matrix

    def _gram_report(
        self, table: Any, plan: Plan, rule: LaunchRule, count: int, weighted: bool, snapshot: Snapshot | None
    ) -> LaunchReport:
        numbers = self._new_report(plan)
        taken = None if snapshot is None else snapshot.taken
        table.gram(count, self._rule(rule), weighted, taken, numbers.data_ptr())
        return self._report(numbers, count)

    def perturb(self, arguments: CombinationArguments) -> None:
        plan, lists, coefficients, scale, snapshot = arguments
        binding = self._bound(plan, lists, snapshot, WEIGHTS)
        factors = _Factors(plan, scale, coefficients)
        taken = None if snapshot is None else snapshot.taken
        binding.table.perturb(len(lists), factors.scale, factors.address, taken)
        binding.finish(plan)

    def restore(self, arguments: RestoreArguments) -> None:
        plan, snapshot = arguments
        binding = self._bound(plan, (), snapshot, WEIGHTS)
        binding.table.restore(snapshot.taken)
        binding.finish(plan)

    def combine(self, arguments: CombinationArguments) -> None:
        plan, lists, coefficients, scale, _ = arguments
        binding = self._bound(plan, lists, None, SUM)
        factors = _Factors(plan, scale, coefficients)
        binding.table.combine(len(lists), factors.scale, factors.address)
        binding.finish(plan)

    def ascent(self, arguments: AscentArguments) -> LaunchReport:
        plan, lists, rule, scale, snapshot = arguments
        binding = self._bound(plan, lists, snapshot, WEIGHTS)
        numbers = self._new_report(plan)
        factors = _Factors(plan, scale)
        taken = None if snapshot is None else snapshot.taken
        binding.table.ascent(len(lists), self._rule(rule), factors.scale, taken, numbers.data_ptr())
        binding.finish(plan)
        return self._report(numbers, len(lists))

    def descent(self, arguments: DescentArguments) -> LaunchReport:
        plan, lists, base, snapshot, rule, scale, weighted, grad_scale, found_inf, is_preview, coefficients = arguments
        binding = self._bound(plan, lists, snapshot, WEIGHTS_AND_STATE, base, is_preview=is_preview)
        table = binding.table
        host_knows = len(base.steps) > 0 and table.has_host_step()
        _refuse_capture_of(plan, base, host_knows)
        if host_knows and rule.needs_gram:
            # The Gram matrix by itself, so that the host knows whether there will be a step to count.
            report = self._gram_report(table, plan, rule, len(lists), weighted, snapshot)
            coefficients, rule = report.coefficients, _FIXED
            found_inf = not report.finite or (found_inf is not None and bool(found_inf))
        else:
            report = LaunchReport.without_gram(len(lists))
        skip = False
        if isinstance(found_inf, Tensor) and not host_knows and found_inf.device == plan.device:
            found_inf = found_inf.detach().float()
        else:
            skip, found_inf = found_inf is not None and bool(found_inf), None
        needs_gram = rule.needs_gram and not skip
        numbers = self._new_report(plan) if needs_gram else None
        factors = _Factors(plan, scale, coefficients)
        table.descent(
            lists=len(lists),
            rule=self._rule(rule),
            needs_gram=needs_gram,
            weighted=weighted,
            scale=factors.scale,
            taken=None if snapshot is None else snapshot.taken,
            base=base.code,
            settings=base.settings,
            lr=[_scalar(settings.lr, plan) for settings in base.settings],
            first=base.first,
            grad_scale=1.0 if grad_scale is None else _scalar(grad_scale, plan),
            found_inf=0 if found_inf is None else found_inf.data_ptr(),
            skip_update=skip,
            preview=is_preview,
            coefficients=factors.address,
            report=0 if numbers is None else numbers.data_ptr(),
        )
        binding.finish(plan)
        return report if numbers is None else self._report(numbers, len(lists))

    def _new_report(self, plan: Plan) -> Tensor:
        return torch.empty(self._native.REPORT_SIZE, dtype=torch.float64, device=plan.device)

    def _report(self, numbers: Tensor, count: int) -> LaunchReport:
        native = self._native
        size = native.MAX_LISTS
        matrix = numbers[native.GRAM : native.GRAM + size * size].reshape(size, size)[:count, :count]
        coefficients = numbers[native.COEFFICIENTS : native.COEFFICIENTS + count]
        return LaunchReport(numbers[native.FINITE], matrix, coefficients)


class _Factors:
    """Scales and coefficients as a launch takes them: numbers, and addresses of what lies on the device."""

    def __init__(self, plan: Plan, scale: FlatScale, coefficients: Tensor | None = None) -> None:
        self.address = 0
        if coefficients is not None and coefficients.device == plan.device:
            self._alive = coefficients.contiguous()
            self.address = self._alive.data_ptr()
        elif coefficients is not None:
            scale = times(scale, coefficients.cpu())
        self.scale = [_scalar(value, plan) for value in scale]


def _scalar(value: float | Tensor, plan: Plan) -> float | Tensor:
    """A number, or a tensor of one float32 or float64 element on the plan's device."""
    if not isinstance(value, Tensor) or (value.device.type == "cpu" and plan.device.type != "cpu"):
        return float(value)
    value = value.detach()
    if value.dtype not in (torch.float32, torch.float64) or value.device != plan.device or value.dim() > 0:
        value = value.reshape(()).to(device=plan.device, dtype=torch.float64)
    return value


def _refuse_capture_of(plan: Plan, base: Base, host_knows_steps: bool) -> None:
    if host_knows_steps or (base.first is not None and 1 in base.first):
        reason = "Adam's step counts are on the host" if host_knows_steps else "momentum buffers are new"
        refuse_capture(plan.device, reason)
