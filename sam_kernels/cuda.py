"""The CUDA backend: native kernels (``csrc/cuda``) over a table of pointers that travels with the launch.

Nothing here waits for the GPU, with one exception: where Adam's step counts are on the host, as torch keeps them unless
a group is ``capturable`` or ``fused``, a descent that may be skipped has to know whether the update was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bases import SGD, Base, TensorList
from .binding import Binder, Staging
from .errors import BackendUnavailableError
from .plan import Plan, Snapshot
from .report import LaunchReport
from .rules import Fixed, Rule
from .scales import FlatScale, times

try:
    from . import _cuda  # type: ignore[attr-defined]
except ImportError as error:  # built without nvcc
    _cuda = None
    _import_error = str(error)

_FIXED = Fixed()


@dataclass(frozen=True)
class Tuning:
    """How kernels are launched. No result but the last bits of the norm depends on it.

    Attributes:
        chunk_size: elements that a block works on at a time, a multiple of 8 up to 65536. The norm's bits depend on it.
        threads: of a block, a multiple of 32 up to 512. The norm's bits depend on it.
        blocks_per_multiprocessor: 0 for as many as fit.
        one_launch: take norm and perturbation in one cooperative launch where the table of tensors fits in one, else in
            two launches.
    """

    chunk_size: int = 16384
    threads: int = 512
    blocks_per_multiprocessor: int = 0
    one_launch: bool = True


class CudaBackend:
    """The operations of :mod:`sam_kernels.reference` by the kernels of one native module.

    Args:
        native: the extension module, None if it is not built.
        name: of the backend.

    Attributes:
        tuning: of all launches from now on.
    """

    def __init__(self, native: Any, name: str = "cuda") -> None:
        self.name = name
        self.tuning = Tuning()
        self._native = native
        self._binder = Binder(native, name, self._make_table)
        self._usable: dict[torch.device, str] = {}

    def unavailable_reason(self) -> str | None:
        if self._native is None:
            return (
                f"the extension sam_kernels._cuda is not there ({_import_error}); "
                "reinstall where nvcc is on the PATH or CUDA_HOME is set"
            )
        if not torch.cuda.is_available():
            return "torch.cuda.is_available() is False: torch is a build without CUDA, or there is no GPU or driver"
        return None

    def describe(self) -> str:
        return "CUDA C++, " + ", ".join(
            sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        )

    # ------------------------------------------------------------------ operations

    def gram(self, plan: Plan, xs: Sequence[TensorList], weighted: bool, snapshot: Snapshot | None = None) -> Tensor:
        staging = Staging()
        table = self._binder.bind_params(plan, staging) if weighted else self._binder.table(plan)
        if not weighted:
            table.clear(self._native.WEIGHT)
        self._bind(table, plan, xs, staging)
        taken = self._binder.bind_snapshot(table, plan, snapshot)
        numbers = self._new_report(plan)
        table.gram(len(xs), _FIXED.code, 0.0, 0.0, weighted, taken, numbers.data_ptr())
        return self._report(numbers, len(xs)).gram

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
        factors = _Factors(plan, scale, coefficients)
        table.perturb(len(xs), factors.scale, factors.address, taken)
        self._binder.finish(table, plan, staging)

    def restore_(self, plan: Plan, snapshot: Snapshot) -> None:
        staging = Staging()
        table = self._binder.bind_params(plan, staging)
        self._tune(table, plan)
        table.restore(self._binder.bind_snapshot(table, plan, snapshot))
        self._binder.finish(table, plan, staging)

    def combine_(self, plan: Plan, xs: Sequence[TensorList], coefficients: Tensor, scale: FlatScale) -> None:
        staging = Staging()
        table = self._binder.bind_params(plan, staging)
        self._bind(table, plan, xs, staging)
        factors = _Factors(plan, scale, coefficients)
        table.combine(len(xs), factors.scale, factors.address)
        self._binder.finish(table, plan, staging)

    def ascent_(
        self, plan: Plan, xs: Sequence[TensorList], rule: Rule, scale: FlatScale, snapshot: Snapshot | None
    ) -> LaunchReport:
        staging = Staging()
        table = self._binder.bind_params(plan, staging)
        self._bind(table, plan, xs, staging)
        taken = self._binder.bind_snapshot(table, plan, snapshot)
        numbers = self._new_report(plan)
        scale = _Factors(plan, scale).scale
        table.ascent(len(xs), rule.code, rule.epsilon, rule.alpha, scale, taken, numbers.data_ptr())
        self._binder.finish(table, plan, staging)
        return self._report(numbers, len(xs))

    def descent_(
        self,
        plan: Plan,
        xs: Sequence[TensorList],
        base: Base,
        snapshot: Snapshot | None,
        rule: Rule,
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
        if host_knows or (isinstance(base, SGD) and 1 in base.first):
            _refuse_capture(plan, "Adam's step counts are on the host" if host_knows else "momentum buffers are new")
        if host_knows and rule.needs_gram:
            # The Gram matrix by itself, so that the host knows whether there will be a step to count.
            report = self._gram_and_rule(table, plan, rule, len(xs), weighted, snapshot)
            coefficients, rule = report.coefficients, _FIXED
            found_inf = not report.finite or (found_inf is not None and bool(found_inf))
        else:
            report = LaunchReport(True, torch.full((len(xs), len(xs)), torch.nan), [1.0] * len(xs))
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
            rule.code,
            rule.epsilon,
            rule.alpha,
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

    def launch_count(self, tensors: int, columns: int) -> int:
        """Launches of an operation over tensors of one group and type.

        Args:
            tensors: how many.
            columns: lists of tensors that the operation reads or writes: weights, copies, gradients, state.
        """
        return int(self._native.launch_count(tensors, columns))

    # ------------------------------------------------------------------ helpers

    def _make_table(self, plan: Plan, arguments: dict[str, Any]) -> Any:
        reason = self._usable.get(plan.device)
        if reason is None:
            reason = self._usable[plan.device] = self._native.why_unusable(plan.device.index or 0)
        if reason:
            raise BackendUnavailableError(f"the CUDA kernels cannot run on {plan.device}: {reason}")
        table = self._native.Table(device=plan.device.index or 0, **arguments)
        scratch = torch.zeros(table.scratch_size(), dtype=torch.float64, device=plan.device)
        table.set_scratch(scratch.data_ptr())
        plan.tables[self.name + " scratch"] = scratch
        return table

    def _bind(self, table: Any, plan: Plan, xs: Sequence[TensorList], staging: Staging) -> None:
        self._binder.bind_lists(table, plan, xs, staging)
        self._tune(table, plan)

    def _tune(self, table: Any, plan: Plan) -> None:
        key = self.name + " tuning"
        if plan.tables.get(key) is not self.tuning:
            t = plan.tables[key] = self.tuning
            table.tune(t.chunk_size, t.threads, t.blocks_per_multiprocessor, t.one_launch)

    def _bind_steps(self, table: Any, plan: Plan, base: Base) -> bool:
        """Binds Adam's step counts. True if some of them are on the host."""
        if not base.steps:
            table.clear(self._native.STEP)
            return False
        odd, on_host = table.bind_steps(base.steps)
        for index in odd:
            raise ValueError(
                f"step of {plan.names[index]} must be one float32 or float64 element on the CPU or on {plan.device}, "
                f"got {base.steps[index]!r}"
            )
        return bool(on_host)

    def _gram_and_rule(
        self, table: Any, plan: Plan, rule: Rule, count: int, weighted: bool, snapshot: Snapshot | None
    ) -> LaunchReport:
        numbers = self._new_report(plan)
        taken = self._binder.bind_snapshot(table, plan, snapshot)
        table.gram(count, rule.code, rule.epsilon, rule.alpha, weighted, taken, numbers.data_ptr())
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


def _refuse_capture(plan: Plan, reason: str) -> None:
    """What the host decides now would be repeated by every replay of a graph."""
    if plan.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"this step cannot be captured in a CUDA graph: {reason}. Make a few steps before capturing, and give Adam "
            "capturable=True."
        )


backend = CudaBackend(_cuda)
