"""The Triton backend: kernels that need no compiler but Triton's own, for NVIDIA and AMD GPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..backends.binding import Binding, table_arguments
from ..backends.gpu import GpuBackend
from ..graphs import refuse_capture
from ..plan import Plan
from ..rules import LaunchRule, is_known
from . import layout
from .pointers import PointerTable
from .rule import TritonRule

try:
    from .. import _cpu  # type: ignore[attr-defined]
except ImportError:
    _cpu = None

# DLPack's names of devices.
_CPU, _CUDA, _ROCM = 1, 2, 10


@dataclass(frozen=True)
class Tuning:
    """How kernels are launched. No result but the last bits of the norm depends on it.

    Attributes:
        block: elements of a chunk, which one program works on; a power of two. The norm's bits depend on it.
        threads: of a program, a power of two. The norm's bits depend on it.
        programs_per_multiprocessor: of a cooperative launch, whose programs must all be resident.
        one_launch: take norm and perturbation in one cooperative launch where all tensors are of the same types, else
            in two launches. NVIDIA GPUs only.
    """

    block: int = 2048
    threads: int = 256
    programs_per_multiprocessor: int = 2
    one_launch: bool = False


class TritonBackend(GpuBackend):
    """The operations by Triton kernels.

    With ``TRITON_INTERPRET=1`` they run in Triton's interpreter, on tensors of the CPU; ask for it by name then.
    """

    def __init__(self) -> None:
        super().__init__("triton", layout, Tuning())

    def unavailable_reason(self) -> str | None:
        if not self.is_interpreted and not torch.cuda.is_available():
            return "torch.cuda.is_available() is False: torch is a build without a GPU's, or there is no GPU or driver"
        return self._import_problem

    @cached_property
    def _import_problem(self) -> str | None:
        try:
            from . import kernels  # noqa: F401
        except Exception as error:
            return f"triton cannot be imported ({error}); pip install triton"
        return None

    def describe(self) -> str:
        import triton

        if self.is_interpreted:
            return f"Triton {triton.__version__} in its interpreter, on the CPU"
        devices = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        return f"Triton {triton.__version__}, " + ", ".join(devices)

    def serves(self, device: torch.device) -> bool:
        return device.type == ("cpu" if self.is_interpreted else "cuda")

    def knows(self, rule: object) -> bool:
        return is_known(rule) or isinstance(rule, TritonRule)

    @cached_property
    def is_interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter."""
        return "TRITON_INTERPRET" in os.environ and _is_interpreting()

    def _new_binding(self, plan: Plan) -> Binding:
        from .table import Table  # which imports triton

        # Its memory would be zeroed by the graph alone, and not for the steps that are made without it.
        refuse_capture(plan.device, "the kernels have not seen these tensors before")
        pointers = self._pointers_of(plan)
        return Binding(layout, Table(pointers, plan), pointers)

    @staticmethod
    def _pointers_of(plan: Plan) -> Any:
        if _cpu is None:
            return PointerTable(plan)
        on_gpu = _CUDA if torch.version.hip is None else _ROCM
        device_type = _CPU if plan.device.type == "cpu" else on_gpu
        return _cpu.PointerTable(device_type=device_type, device=plan.device.index or 0, **table_arguments(plan))

    def _rule(self, rule: LaunchRule) -> LaunchRule:
        return rule


def _is_interpreting() -> bool:
    try:
        import triton
    except Exception:
        return False
    return bool(triton.knobs.runtime.interpret)


backend = TritonBackend()
