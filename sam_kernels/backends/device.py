"""What backends on a GPU have in common: their operations, in terms of a table of tensors that knows how to launch.

Nothing here waits for the GPU, with one exception: where Adam's step counts are on the host, as torch keeps them unless
a group is ``capturable`` or ``fused``, a descent that may be skipped has to know whether the update was made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from ..bases import SGD, Base, TensorList
from ..graphs import refuse_capture
from ..plan import Plan
from ..report import LaunchReport
from ..rules import Fixed
from ..scales import FlatScale, times
from ..snapshot import Snapshot
from .binding import Binder, Staging

_FIXED = Fixed()


class DeviceBackend(ABC):
    """The operations of :mod:`sam_kernels.backends.reference` by kernels on a GPU.

    Args:
        name: of the backend.
        native: what names the columns of the backend's tables (``WEIGHT``, ``LIST``, ...) and the entries of a report.
        tuning: of its launches.

    Attributes:
        tuning: of all launches from now on.
        steps_on_host: reads Adam's step counts on the host wherever they lie; for tests, whose device is the host.
    """

    def __init__(self, name: str, native: Any, tuning: Any) -> None:
        self.name = name
        self.tuning = tuning
        self.steps_on_host = False
        self._native = native
        self._binder = Binder(native, name, self._make_table)

    @abstractmethod
    def unavailable_reason(self) -> str | None:
        """Why the backend cannot be used; None if it can."""

    @abstractmethod
    def describe(self) -> str:
        """What it is, in a few words."""

    @abstractmethod
    def serves(self, device: torch.device) -> bool:
        """Whether it can work on tensors there."""

    @abstractmethod
    def knows(self, rule: object) -> bool:
        """Whether its kernels can apply a rule."""

    @abstractmethod
    def _make_table(self, plan: Plan, arguments: dict[str, Any]) -> Any:
        """A table for a plan."""

    @abstractmethod
    def _rule(self, rule: Any) -> Any:
        """A rule as the table's launches take it."""

    # ------------------------------------------------------------------ operations

    def gram(self, plan: Plan, xs: Sequence[TensorList], weighted: bool, snapshot: Snapshot | None = None) -> Tensor:
        staging = Staging()
        table = self._binder.bind_params(plan, staging) if weighted else self._binder.table(plan)
        if not weighted:
            table.clear(self._native.WEIGHT)
        self._bind(table, plan, xs, staging)
        taken = self._binder.bind_snapshot(table, plan, snapshot)
        numbers = self._new_report(plan)
        table.gram(len(xs), self._rule(_FIXED), weighted, taken, numbers.data_ptr())
        matrix = self._report(numbers, len(xs)).gram
        assert matrix is not None
        return matrix

    def perturb_(
        self,
        plan: Plan,
        xs: Sequence[TensorList],
        coefficients: Tensor,
        scale: FlatScale,
        snapshot: Snapshot | None,
    ) -> None:
        staging = Staging()
        table = self._binder.bind_params(plan, staging)
        self._bind(table, plan, xs, staging)
        taken = self._binder.bind_snapshot(table, plan, snapshot)
        self._binder.check_memory(table, plan, xs, snapshot=snapshot)
        factors = _Factors(plan, scale, coefficients)
        table.perturb(len(xs), factors.scale, factors.address, taken)
        self._binder.finish(table, plan, staging)

    def restore_(self, plan: Plan, snapshot: Snapshot) -> None:
        staging = Staging()
        table = self._binder.bind_params(plan, staging)
        self._tune(table, plan)
        taken = self._binder.bind_snapshot(table, plan, snapshot)
        self._binder.check_memory(table, plan, snapshot=snapshot)
        table.restore(taken)
        self._binder.finish(table, plan, staging)

    def check_memory(self, plan: Plan, xs: Sequence[TensorList], snapshot: Snapshot | None) -> None:
        staging = Staging()
        table = self._binder.bind_params(plan, staging)
        self._binder.bind_lists(table, plan, xs, staging)
        self._binder.check_memory(table, plan, xs, snapshot=snapshot)

    def combine_(self, plan: Plan, xs: Sequence[TensorList], coefficients: Tensor, scale: FlatScale) -> None:
        staging = Staging()
        table = self._binder.bind_params(plan, staging)
        self._bind(table, plan, xs, staging)
        self._binder.check_memory(table, plan, xs, is_sum=True)
        factors = _Factors(plan, scale, coefficients)
        table.combine(len(xs), factors.scale, factors.address)
        self._binder.finish(table, plan, staging)

    def ascent_(
        self, plan: Plan, xs: Sequence[TensorList], rule: Any, scale: FlatScale, snapshot: Snapshot | None
    ) -> LaunchReport:
        staging = Staging()
        table = self._binder.bind_params(plan, staging)
        self._bind(table, plan, xs, staging)
        taken = self._binder.bind_snapshot(table, plan, snapshot)
        self._binder.check_memory(table, plan, xs, snapshot=snapshot)
        numbers = self._new_report(plan)
        scale = _Factors(plan, scale).scale
        table.ascent(len(xs), self._rule(rule), scale, taken, numbers.data_ptr())
        self._binder.finish(table, plan, staging)
        return self._report(numbers, len(xs))

    def descent_(
        self,
        plan: Plan,
        xs: Sequence[TensorList],
        base: Base,
        snapshot: Snapshot | None,
        rule: Any,
        scale: FlatScale,
        weighted: bool = False,
        grad_scale: Tensor | float | None = None,
        found_inf: Tensor | bool | None = None,
        preview: bool = False,
        coefficients: Tensor | None = None,
    ) -> LaunchReport:
        staging = Staging()
        table = self._binder.bind_params(plan, staging)
        self._bind(table, plan, xs, staging)
        self._binder.bind_state(table, plan, base, staging, written=not preview)
        host_knows = self._bind_steps(table, plan, base)
        self._binder.check_memory(table, plan, xs, base, snapshot)
        self._refuse_capture_of(plan, base, host_knows)
        if host_knows and rule.needs_gram:
            # The Gram matrix by itself, so that the host knows whether there will be a step to count.
            report = self._gram_and_rule(table, plan, rule, len(xs), weighted, snapshot)
            coefficients, rule = report.coefficients, _FIXED
            found_inf = not report.finite or (found_inf is not None and bool(found_inf))
        else:
            report = LaunchReport.without_gram(len(xs))
        skip = False
        if isinstance(found_inf, Tensor) and not host_knows and found_inf.device == plan.device:
            found_inf = found_inf.detach().float()
        else:
            skip, found_inf = found_inf is not None and bool(found_inf), None
        needs_gram = rule.needs_gram and not skip
        numbers = self._new_report(plan) if needs_gram else None
        factors = _Factors(plan, scale, coefficients)
        table.descent(
            len(xs),
            self._rule(rule),
            needs_gram,
            weighted,
            factors.scale,
            self._binder.bind_snapshot(table, plan, snapshot),
            base.code,
            base.settings,
            [_scalar(settings.lr, plan) for settings in base.settings],
            getattr(base, "first", None),
            1.0 if grad_scale is None else _scalar(grad_scale, plan),
            0 if found_inf is None else found_inf.data_ptr(),
            skip,
            preview,
            factors.address,
            0 if numbers is None else numbers.data_ptr(),
        )
        self._binder.finish(table, plan, staging)
        return report if numbers is None else self._report(numbers, len(xs))

    # ------------------------------------------------------------------ launches

    def launches(self, plan: Plan) -> int:
        """Kernel launches of the last operation on a plan."""
        return int(self._binder.table(plan).launches)

    # ------------------------------------------------------------------ helpers

    def _bind(self, table: Any, plan: Plan, xs: Sequence[TensorList], staging: Staging) -> None:
        self._binder.bind_lists(table, plan, xs, staging)
        self._tune(table, plan)

    def _tune(self, table: Any, plan: Plan) -> None:
        key = self.name + " tuning"
        if plan.tables.get(key) is not self.tuning:
            plan.tables[key] = self.tuning
            table.tune(*astuple(self.tuning))

    def _bind_steps(self, table: Any, plan: Plan, base: Base) -> bool:
        """Binds Adam's step counts. True if some of them are on the host."""
        if not base.steps:
            table.clear(self._native.STEP)
            return False
        odd, on_host = table.bind_steps(base.steps, self.steps_on_host)
        for index in odd:
            raise ValueError(
                f"step of {plan.names[index]} must be one float32 or float64 element on the CPU or on {plan.device}, "
                f"got {base.steps[index]!r}"
            )
        return bool(on_host)

    @staticmethod
    def _refuse_capture_of(plan: Plan, base: Base, host_knows_steps: bool) -> None:
        if host_knows_steps or (isinstance(base, SGD) and 1 in base.first):
            reason = "Adam's step counts are on the host" if host_knows_steps else "momentum buffers are new"
            refuse_capture(plan.device, reason)

    def _gram_and_rule(
        self, table: Any, plan: Plan, rule: Any, count: int, weighted: bool, snapshot: Snapshot | None
    ) -> LaunchReport:
        numbers = self._new_report(plan)
        taken = self._binder.bind_snapshot(table, plan, snapshot)
        table.gram(count, self._rule(rule), weighted, taken, numbers.data_ptr())
        return self._report(numbers, count)

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
