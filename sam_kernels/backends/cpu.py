"""The CPU backend: native kernels (``csrc/cpu``) over a table of pointers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..bases import Base, TensorList
from ..host import inverse_of, is_set
from ..plan import Plan
from ..report import LaunchReport
from ..rules import Rule, is_known
from ..scales import FlatScale, numbers, times
from ..snapshot import Snapshot
from .binding import Binder, Staging

try:
    from .. import _cpu  # type: ignore[attr-defined]
except ImportError as error:  # built without the extension: the reference backend serves CPU tensors
    _cpu = None
    _import_error = str(error)

name = "cpu"

_binder = Binder(_cpu, name, lambda plan, arguments: _cpu.Table(**arguments))


def unavailable_reason() -> str | None:
    if _cpu is None:
        return f"the extension sam_kernels._cpu is not there ({_import_error}); reinstall with a C++17 compiler"
    return None


def describe() -> str:
    threads = "OpenMP" if _cpu.openmp else "one thread: the compiler had no OpenMP"
    return f"C++, {_cpu.instruction_set()}, {threads}"


def serves(device: torch.device) -> bool:
    return device.type == "cpu"


def knows(rule: object) -> bool:
    return is_known(rule)


def gram(plan: Plan, xs: Sequence[TensorList], weighted: bool, snapshot: Snapshot | None = None) -> Tensor:
    staging = Staging()
    table = _binder.bind_params(plan, staging) if weighted else _binder.table(plan)
    if not weighted:
        table.clear(_cpu.WEIGHT)
    _binder.bind_lists(table, plan, xs, staging)
    taken = _binder.bind_snapshot(table, plan, snapshot)
    _, matrix, _ = table.gram(len(xs), weighted, taken, torch.get_num_threads())
    size = _cpu.MAX_LISTS
    return torch.tensor(matrix, dtype=torch.float64, device="cpu").reshape(size, size)[: len(xs), : len(xs)].clone()


def perturb_(
    plan: Plan, xs: Sequence[TensorList], coefficients: Tensor, scale: FlatScale, snapshot: Snapshot | None
) -> None:
    staging = Staging()
    table = _binder.bind_params(plan, staging)
    _binder.bind_lists(table, plan, xs, staging)
    taken = _binder.bind_snapshot(table, plan, snapshot)
    _binder.check_memory(table, plan, xs, snapshot=snapshot)
    table.perturb(len(xs), numbers(times(scale, coefficients)), taken, torch.get_num_threads())
    _binder.finish(table, plan, staging)


def restore_(plan: Plan, snapshot: Snapshot) -> None:
    staging = Staging()
    table = _binder.bind_params(plan, staging)
    taken = _binder.bind_snapshot(table, plan, snapshot)
    _binder.check_memory(table, plan, snapshot=snapshot)
    table.restore(taken, torch.get_num_threads())
    _binder.finish(table, plan, staging)


def check_memory(plan: Plan, xs: Sequence[TensorList], snapshot: Snapshot | None) -> None:
    staging = Staging()
    table = _binder.bind_params(plan, staging)
    _binder.bind_lists(table, plan, xs, staging)
    _binder.check_memory(table, plan, xs, snapshot=snapshot)


def combine_(plan: Plan, xs: Sequence[TensorList], coefficients: Tensor, scale: FlatScale) -> None:
    staging = Staging()
    table = _binder.bind_params(plan, staging)
    _binder.bind_lists(table, plan, xs, staging)
    _binder.check_memory(table, plan, xs, is_sum=True)
    table.combine(len(xs), numbers(times(scale, coefficients)), torch.get_num_threads())
    _binder.finish(table, plan, staging)


def ascent_(
    plan: Plan, xs: Sequence[TensorList], rule: Rule, scale: FlatScale, snapshot: Snapshot | None
) -> LaunchReport:
    staging = Staging()
    table = _binder.bind_params(plan, staging)
    _binder.bind_lists(table, plan, xs, staging)
    taken = _binder.bind_snapshot(table, plan, snapshot)
    _binder.check_memory(table, plan, xs, snapshot=snapshot)
    finite, matrix, coefficients = table.ascent(
        len(xs), rule.code, rule.epsilon, rule.alpha, numbers(scale), taken, torch.get_num_threads()
    )
    _binder.finish(table, plan, staging)
    return _report(len(xs), finite, matrix, coefficients)


def descent_(
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
    table = _binder.bind_params(plan, staging)
    _binder.bind_lists(table, plan, xs, staging)
    _binder.bind_state(table, plan, base, staging, written=not preview)
    _bind_steps(table, plan, base)
    _binder.check_memory(table, plan, xs, base, snapshot)
    skip_update = is_set(found_inf)
    finite, matrix, found = table.descent(
        len(xs),
        rule.code,
        rule.epsilon,
        rule.alpha,
        rule.needs_gram,
        weighted,
        numbers(scale if coefficients is None else times(scale, coefficients)),
        _binder.bind_snapshot(table, plan, snapshot),
        base.code,
        base.settings,
        [float(settings.lr) for settings in base.settings],
        getattr(base, "first", None),
        inverse_of(grad_scale),
        skip_update,
        preview,
        torch.get_num_threads(),
    )
    _binder.finish(table, plan, staging)
    if skip_update or not rule.needs_gram:
        return LaunchReport.without_gram(len(xs))
    return _report(len(xs), finite, matrix, found)


def _bind_steps(table: Any, plan: Plan, base: Base) -> None:
    if not base.steps:
        return
    for index in table.bind(_cpu.STEP, base.steps):
        step = base.steps[index]
        raise ValueError(f"step of {plan.names[index]} must be one float32 or float64 element on the CPU, got {step!r}")


def _report(count: int, finite: bool, matrix: list[float], coefficients: list[float]) -> LaunchReport:
    size = _cpu.MAX_LISTS
    used = [matrix[i * size + j] for i in range(count) for j in range(count)]
    return LaunchReport(finite, used, coefficients[:count])
