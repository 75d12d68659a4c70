"""The CPU backend: kernels in C++ (``csrc/cpu``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..host import inverse_of, is_set
from ..plan import Plan
from ..report import LaunchReport
from ..rules import Rule, is_known
from ..scales import times
from .binding import NOTHING, SUM, WEIGHTS, WEIGHTS_AND_STATE, Binding, table_arguments
from .contract import AscentArguments, CombinationArguments, DescentArguments, GramArguments, RestoreArguments
from .native import NativeBackend

try:
    from .. import _cpu  # type: ignore[attr-defined]
except ImportError as error:  # built without the extension: other backends serve CPU tensors
    _cpu = None
    _import_error = str(error)


class CpuBackend(NativeBackend):
    """The operations by the kernels of ``sam_kernels._cpu``."""

    def __init__(self) -> None:
        super().__init__("cpu", _cpu)

    def unavailable_reason(self) -> str | None:
        if _cpu is None:
            return f"the extension sam_kernels._cpu is not there ({_import_error}); reinstall with a C++17 compiler"
        return None

    def describe(self) -> str:
        threads = "OpenMP" if _cpu.openmp else "one thread: the compiler had no OpenMP"
        return f"C++, {_cpu.instruction_set()}, {threads}"

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def knows(self, rule: object) -> bool:
        return is_known(rule)

    def _new_binding(self, plan: Plan) -> Binding:
        return Binding(_cpu, _cpu.Table(**table_arguments(plan)))

    def gram(self, arguments: GramArguments) -> Tensor:
        plan, lists, weighted, snapshot = arguments
        binding = self._bound(plan, lists, snapshot, NOTHING, reads_weights=weighted)
        count = len(lists)
        taken = None if snapshot is None else snapshot.taken
        _, matrix, _ = binding.table.gram(count, weighted, taken, _threads())
        binding.forget_copies()
        return torch.tensor(matrix, dtype=torch.float64, device="cpu").reshape(count, count)

    def perturb(self, arguments: CombinationArguments) -> None:
        plan, lists, coefficients, scale, snapshot = arguments
        binding = self._bound(plan, lists, snapshot, WEIGHTS)
        taken = None if snapshot is None else snapshot.taken
        binding.table.perturb(len(lists), times(scale, coefficients), taken, _threads())
        binding.finish(plan)

    def restore(self, arguments: RestoreArguments) -> None:
        plan, snapshot = arguments
        binding = self._bound(plan, (), snapshot, WEIGHTS)
        binding.table.restore(snapshot.taken, _threads())
        binding.finish(plan)

    def combine(self, arguments: CombinationArguments) -> None:
        plan, lists, coefficients, scale, _ = arguments
        binding = self._bound(plan, lists, None, SUM)
        binding.table.combine(len(lists), times(scale, coefficients), _threads())
        binding.finish(plan)

    def ascent(self, arguments: AscentArguments) -> LaunchReport:
        plan, lists, rule, scale, snapshot = arguments
        assert isinstance(rule, Rule)
        binding = self._bound(plan, lists, snapshot, WEIGHTS)
        taken = None if snapshot is None else snapshot.taken
        finite, matrix, coefficients = binding.table.ascent(
            len(lists), rule.code, rule.epsilon, rule.alpha, scale, taken, _threads()
        )
        binding.finish(plan)
        return LaunchReport(finite, matrix, coefficients)

    def descent(self, arguments: DescentArguments) -> LaunchReport:
        plan, lists, base, snapshot, rule, scale, weighted, grad_scale, found_inf, is_preview, factors = arguments
        assert isinstance(rule, Rule)
        binding = self._bound(plan, lists, snapshot, WEIGHTS_AND_STATE, base, is_preview=is_preview)
        skip_update = is_set(found_inf)
        finite, matrix, coefficients = binding.table.descent(
            lists=len(lists),
            rule=rule.code,
            epsilon=rule.epsilon,
            alpha=rule.alpha,
            needs_gram=rule.needs_gram,
            weighted=weighted,
            scale=scale if factors is None else times(scale, factors),
            taken=None if snapshot is None else snapshot.taken,
            base=base.code,
            settings=base.settings,
            lr=[float(settings.lr) for settings in base.settings],
            first=base.first,
            inverse_grad_scale=inverse_of(grad_scale),
            skip_update=skip_update,
            preview=is_preview,
            threads=_threads(),
        )
        binding.finish(plan)
        if skip_update or not rule.needs_gram:
            return LaunchReport.without_gram(len(lists))
        return LaunchReport(finite, matrix, coefficients)


_threads = torch.get_num_threads


backend: CpuBackend = CpuBackend()
