"""The CUDA backend: native kernels (``csrc/cuda``) over a table of pointers that travels with the launch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailableError
from ..graphs import is_capturing
from ..plan import Plan
from ..rules import LaunchRule, Rule, is_known
from .binding import Binding, table_arguments
from .gpu import GpuBackend

# What a build without the extension says of it.
_MISSING = Path(__file__).parents[1] / "_cuda_missing.txt"

try:
    from .. import _cuda  # type: ignore[attr-defined]
except ImportError as error:
    _cuda = None
    _import_error = f"built without it: {_MISSING.read_text().strip()}" if _MISSING.exists() else str(error)


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


class _CudaBinding(Binding):
    """With memory for sums and tickets, which launches expect to be zero and leave so."""

    __slots__ = ("has_zeros", "scratch")

    def __init__(self, native: Any, table: Any) -> None:
        super().__init__(native, table)
        self.has_zeros = False
        self.scratch: Tensor | None = None

    def make_scratch(self, device: torch.device) -> None:
        """While a graph is captured it is zeroed by each replay, but for no other launch: that gets its own."""
        self.scratch = torch.zeros(self.table.scratch_size(), dtype=torch.float64, device=device)
        self.table.set_scratch(self.scratch.data_ptr())
        self.has_zeros = not is_capturing(device)


class CudaBackend(GpuBackend):
    """The operations by the kernels of one native module.

    Args:
        native: the extension module, None if it is not built.
        name: of the backend.
    """

    def __init__(self, native: Any, name: str = "cuda") -> None:
        super().__init__(name, native, Tuning())
        self._usable: dict[torch.device, str] = {}

    def unavailable_reason(self) -> str | None:
        if self._native is None:
            return (
                f"the extension sam_kernels._cuda is not there ({_import_error}); "
                "reinstall where nvcc is on the PATH or CUDA_HOME is set"
            )
        if torch.version.hip is not None:
            return "torch is a build for ROCm"
        if not torch.cuda.is_available():
            return "torch.cuda.is_available() is False: torch is a build without CUDA, or there is no GPU or driver"
        return None

    def describe(self) -> str:
        return "CUDA C++, " + ", ".join(
            sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        )

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def knows(self, rule: object) -> bool:
        return is_known(rule)

    def launch_count(self, tensors: int, columns: int) -> int:
        """Launches of an operation over tensors of one group and type.

        Args:
            tensors: how many.
            columns: lists of tensors that the operation reads or writes: weights, copies, gradients, state.
        """
        return int(self._native.launch_count(tensors, columns))

    def _new_binding(self, plan: Plan) -> Binding:
        reason = self._usable.get(plan.device)
        if reason is None:
            reason = self._usable[plan.device] = self._native.why_unusable(plan.device.index or 0)
        if reason:
            raise BackendUnavailableError(f"the CUDA kernels cannot run on {plan.device}: {reason}")
        table = self._native.Table(device=plan.device.index or 0, **table_arguments(plan))
        return _CudaBinding(self._native, table)

    def _prepare(self, binding: Binding, plan: Plan) -> None:
        super()._prepare(binding, plan)
        assert isinstance(binding, _CudaBinding)
        if not binding.has_zeros:
            binding.make_scratch(plan.device)

    def _rule(self, rule: LaunchRule) -> tuple[int, float, float]:
        assert isinstance(rule, Rule)
        return rule.code, rule.epsilon, rule.alpha


backend: CudaBackend = CudaBackend(_cuda)
