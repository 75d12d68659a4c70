"""The CPU backend: native kernels (``csrc/cpu``) over a table of pointers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .bases import Base, TensorList
from .errors import DeviceChangedError
from .plan import REAL_DTYPE, Layout, Plan, Snapshot, check_supported
from .report import LaunchReport
from .rules import Rule

try:
    from . import _cpu  # type: ignore[attr-defined]
except ImportError as error:  # built without the extension: the reference backend serves CPU tensors
    _cpu = None
    _import_error = str(error)

name = "cpu"

# The codes of enum class DType in csrc/common/scalar_types.h.
_DTYPE_CODES = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}


def unavailable_reason() -> str | None:
    if _cpu is None:
        return f"the extension sam_kernels._cpu is not there ({_import_error}); reinstall with a C++17 compiler"
    return None


def describe() -> str:
    threads = "OpenMP" if _cpu.openmp else "one thread: the compiler had no OpenMP"
    return f"C++, {_cpu.instruction_set()}, {threads}"


class _Staging:
    """Dense copies of tensors that the kernels cannot address, for one launch."""

    def __init__(self) -> None:
        self.alive: list[Tensor] = []
        self.results: list[tuple[Tensor, Tensor]] = []

    def stand_in(self, tensor: Tensor, layout: Layout, written: bool) -> Tensor:
        dtype = tensor.dtype if tensor.is_complex() == layout.dtype.is_complex else layout.dtype
        copy = layout.empty(dtype)
        copy.copy_(tensor.detach())
        self.alive.append(copy)
        if written:
            self.results.append((tensor, copy))
        return copy

    @torch.no_grad()
    def write_back(self) -> None:
        for tensor, copy in self.results:
            tensor.copy_(copy)


def _table(plan: Plan) -> Any:
    table = plan.tables.get(name)
    if table is None:
        table = plan.tables[name] = _cpu.Table(
            [layout.shape for layout in plan.layouts],
            [layout.strides for layout in plan.layouts],
            [layout.numel for layout in plan.layouts],
            [_code(layout.dtype) for layout in plan.layouts],
            plan.groups,
            [-1.0 if eta is None else eta for eta in plan.geometry],
        )
    return table


def _bind_params(plan: Plan, staging: _Staging) -> Any:
    """The table with the weights' addresses as they are now."""
    table = _table(plan)
    odd = table.bind(_cpu.WEIGHT, plan.params)
    if odd:
        for index in odd:
            param, layout = plan.params[index], plan.layouts[index]
            if param.dtype != layout.dtype or param.device != layout.device or param.shape != layout.shape:
                device = plan.device
                plan.refresh()
                if plan.device != device or plan.parts:
                    raise DeviceChangedError
                return _bind_params(plan, staging)
        _bind_odd(table, _cpu.WEIGHT, plan, plan.params, odd, staging, written=True)
    return table


def _bind_lists(table: Any, plan: Plan, xs: Sequence[TensorList], staging: _Staging) -> None:
    for number, x in enumerate(xs):
        tensors = x if isinstance(x, list) else list(x)
        odd = table.bind(_cpu.LIST + number, tensors)
        if odd:
            _bind_odd(table, _cpu.LIST + number, plan, tensors, odd, staging, written=False)


def _bind_state(table: Any, plan: Plan, base: Base, staging: _Staging, written: bool) -> None:
    for number, column in enumerate(base.columns):
        if not column:
            table.clear(_cpu.STATE + number)
            continue
        odd = table.bind(_cpu.STATE + number, column)
        if odd:
            _bind_odd(table, _cpu.STATE + number, plan, column, odd, staging, written)
    if base.steps:
        odd = table.bind(_cpu.STEP, base.steps)
        for index in odd:
            step = base.steps[index]
            raise ValueError(
                f"step of {plan.names[index]} must be one float32 or float64 element on the CPU, got {step!r}"
            )


def _bind_odd(
    table: Any,
    column: int,
    plan: Plan,
    tensors: TensorList,
    odd: Sequence[int],
    staging: _Staging,
    written: bool,
) -> None:
    """Fills the cells that the table could not read: checks the tensors, and copies those laid out differently."""
    for index in odd:
        tensor, layout = tensors[index], plan.layouts[index]
        role = plan.names[index] if column == _cpu.WEIGHT else f"the gradient or state of {plan.names[index]}"
        assert tensor is not None
        check_supported(tensor, role)
        if tensor.shape != layout.shape:
            raise ValueError(f"{role} has shape {tuple(tensor.shape)}, expected {tuple(layout.shape)}")
        if tensor.device != layout.device:
            raise ValueError(f"{role} is on {tensor.device}, expected {layout.device}")
        if tensor.is_complex() and not layout.dtype.is_complex:
            raise ValueError(f"{role} is complex ({tensor.dtype}), expected {layout.dtype}")
        if layout.dtype.is_complex != tensor.is_complex() or not layout.matches(tensor):
            tensor = staging.stand_in(tensor, layout, written)
        table.set(column, index, tensor.data_ptr(), _code(tensor.dtype))


def _code(dtype: torch.dtype) -> int:
    return _DTYPE_CODES[REAL_DTYPE.get(dtype, dtype)]


def gram(plan: Plan, xs: Sequence[TensorList], weighted: bool, snapshot: Snapshot | None = None) -> Tensor:
    staging = _Staging()
    table = _bind_params(plan, staging) if weighted else _table(plan)
    if not weighted:
        table.clear(_cpu.WEIGHT)
    _bind_lists(table, plan, xs, staging)
    _, matrix, _ = table.gram(len(xs), weighted, _taken(table, plan, snapshot), torch.get_num_threads())
    size = _cpu.MAX_LISTS
    return torch.tensor(matrix, dtype=torch.float64).reshape(size, size)[: len(xs), : len(xs)].clone()


def perturb_(
    plan: Plan, xs: Sequence[TensorList], coefficients: Tensor, scale: Sequence[float], snapshot: Snapshot | None
) -> None:
    staging = _Staging()
    table = _bind_params(plan, staging)
    _bind_lists(table, plan, xs, staging)
    table.perturb(len(xs), _scaled(scale, coefficients), _taken(table, plan, snapshot), torch.get_num_threads())
    _finish(table, plan, staging)


def restore_(plan: Plan, snapshot: Snapshot) -> None:
    staging = _Staging()
    table = _bind_params(plan, staging)
    table.restore(_taken(table, plan, snapshot), torch.get_num_threads())
    _finish(table, plan, staging)


def combine_(plan: Plan, xs: Sequence[TensorList], coefficients: Tensor, scale: Sequence[float]) -> None:
    staging = _Staging()
    table = _bind_params(plan, staging)
    _bind_lists(table, plan, xs, staging)
    table.combine(len(xs), _scaled(scale, coefficients), torch.get_num_threads())
    _finish(table, plan, staging)


def ascent_(
    plan: Plan, xs: Sequence[TensorList], rule: Rule, scale: Sequence[float], snapshot: Snapshot | None
) -> LaunchReport:
    staging = _Staging()
    table = _bind_params(plan, staging)
    _bind_lists(table, plan, xs, staging)
    taken = _taken(table, plan, snapshot)
    threads = torch.get_num_threads()
    finite, matrix, coefficients = table.ascent(len(xs), rule.code, rule.epsilon, rule.alpha, scale, taken, threads)
    _finish(table, plan, staging)
    return _report(len(xs), finite, matrix, coefficients)


def descent_(
    plan: Plan,
    xs: Sequence[TensorList],
    base: Base,
    snapshot: Snapshot | None,
    rule: Rule,
    scale: Sequence[float],
    weighted: bool,
    inverse_grad_scale: float,
    skip_update: bool,
    preview: bool = False,
) -> LaunchReport:
    staging = _Staging()
    table = _bind_params(plan, staging)
    _bind_lists(table, plan, xs, staging)
    _bind_state(table, plan, base, staging, written=not preview)
    finite, matrix, coefficients = table.descent(
        len(xs),
        rule.code,
        rule.epsilon,
        rule.alpha,
        rule.needs_gram,
        weighted,
        scale,
        _taken(table, plan, snapshot),
        base.code,
        base.settings,
        getattr(base, "first", None),
        inverse_grad_scale,
        skip_update,
        preview,
        torch.get_num_threads(),
    )
    _finish(table, plan, staging)
    return _report(len(xs), finite, matrix, coefficients)


def _finish(table: Any, plan: Plan, staging: _Staging) -> None:
    """Tells autograd what the launch has written: it would otherwise compute wrong gradients without an error."""
    if staging.results:
        staging.write_back()
    rows = table.written_rows()
    increment_version(plan.params if rows is None else [plan.params[i] for i in rows])


def _taken(table: Any, plan: Plan, snapshot: Snapshot | None) -> bytearray | None:
    if snapshot is None:
        return None
    snapshot.fit(plan)
    # A snapshot's memory moves only when it is allocated anew, so its addresses are read once.
    if plan.tables.get("cpu snapshot") is not snapshot.tensors:
        for index, tensor in enumerate(snapshot.tensors):
            table.set(_cpu.SNAPSHOT, index, tensor.data_ptr(), _code(tensor.dtype))
        plan.tables["cpu snapshot"] = snapshot.tensors
    return snapshot.taken


def _scaled(scale: Sequence[float], coefficients: Tensor) -> list[float]:
    """The scales of all groups times the coefficients, group by group."""
    factors = coefficients.tolist()
    return [value * factors[index % len(factors)] for index, value in enumerate(scale)]


def _report(count: int, finite: bool, matrix: list[float], coefficients: list[float]) -> LaunchReport:
    size = _cpu.MAX_LISTS
    used = [matrix[i * size + j] for i in range(count) for j in range(count)]
    return LaunchReport(finite, used, coefficients[:count])
