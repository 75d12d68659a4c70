"""Filling a native backend's table of pointers: what the CPU and the CUDA backend have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..bases import Base, TensorList
from ..errors import DeviceChangedError, SharedMemoryError
from ..layouts import REAL_DTYPE, Layout, is_overlapping
from ..memory import extent_of, shares_memory
from ..plan import Plan
from ..snapshot import Snapshot

# The codes of enum class DType in csrc/common/scalar_types.h.
_DTYPE_CODES = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}

# Among a plan's tables, whether some tensor that is written was found to be expanded.
EXPANDED = "expanded"


class Staging:
    """Dense copies of tensors that the kernels cannot address, for one launch."""

    def __init__(self) -> None:
        self.alive: list[Tensor] = []
        self.results: list[tuple[int, Tensor, Tensor]] = []

    def stand_in(self, tensor: Tensor, layout: Layout, row: int, written: bool) -> Tensor:
        dtype = tensor.dtype if tensor.is_complex() == layout.dtype.is_complex else layout.dtype
        copy = layout.empty(dtype)
        copy.copy_(tensor.detach())
        self.alive.append(copy)
        if written:
            self.results.append((row, tensor, copy))
        return copy

    @torch.no_grad()
    def write_back(self, rows: Sequence[int] | None) -> None:
        """Of the rows that the launch has written, None for all: others may be views of what it has."""
        for row, tensor, copy in self.results:
            if rows is None or row in rows:
                tensor.copy_(copy)


class Binder:
    """Binds tensors to the tables of one native module.

    Args:
        native: the extension module.
        name: of the backend; its tables are kept in ``plan.tables`` under it.
        make_table: makes the module's table for a plan from the arguments of :meth:`arguments_of`.
    """

    def __init__(self, native: Any, name: str, make_table: Callable[[Plan, dict[str, Any]], Any]) -> None:
        self.native, self.name, self._make_table = native, name, make_table

    def table(self, plan: Plan) -> Any:
        """The plan's table, with whatever addresses it has."""
        table = plan.tables.get(self.name)
        if table is None:
            table = plan.tables[self.name] = self._make_table(plan, self.arguments_of(plan))
        return table

    @staticmethod
    def arguments_of(plan: Plan) -> dict[str, Any]:
        """What native tables are made from."""
        return {
            "shapes": [layout.shape for layout in plan.layouts],
            "strides": [layout.strides for layout in plan.layouts],
            "numels": [layout.numel for layout in plan.layouts],
            "dtypes": [dtype_code(layout.dtype) for layout in plan.layouts],
            "groups": plan.groups,
            "etas": [-1.0 if eta is None else eta for eta in plan.geometry],
        }

    def bind_params(self, plan: Plan, staging: Staging) -> Any:
        """The table with the weights' addresses as they are now."""
        table = self.table(plan)
        odd = table.bind(self.native.WEIGHT, plan.tensors)
        if odd:
            if not all(plan.layouts[index].is_of(plan.tensors[index]) for index in odd):
                refreshed(plan)
                return self.bind_params(plan, staging)
            self._bind_odd(table, self.native.WEIGHT, plan, plan.tensors, odd, staging, written=True)
        return table

    def bind_lists(self, table: Any, plan: Plan, xs: Sequence[TensorList], staging: Staging) -> None:
        for number in range(self.native.MAX_LISTS):
            if number >= len(xs):
                table.clear(self.native.LIST + number)
                continue
            x = xs[number]
            tensors = x if isinstance(x, list) else list(x)
            odd = table.bind(self.native.LIST + number, tensors)
            if odd:
                self._bind_odd(table, self.native.LIST + number, plan, tensors, odd, staging, written=False)

    def bind_state(self, table: Any, plan: Plan, base: Base, staging: Staging, written: bool) -> None:
        """All of a base's state but its step counts."""
        for number in range(self.native.STEP - self.native.STATE):
            column = base.columns[number] if number < len(base.columns) else ()
            if not column:
                table.clear(self.native.STATE + number)
                continue
            odd = table.bind(self.native.STATE + number, column)
            if odd:
                self._bind_odd(table, self.native.STATE + number, plan, column, odd, staging, written)

    def _bind_odd(
        self,
        table: Any,
        column: int,
        plan: Plan,
        tensors: TensorList,
        odd: Sequence[int],
        staging: Staging,
        written: bool,
    ) -> None:
        """Fills the cells that the table could not read: checks the tensors, and copies those laid out differently."""
        for index in odd:
            if index in plan.unreadable:
                plan.refuse_unreadable(index)
            if column != self.native.WEIGHT and not plan.layouts[index].is_of(plan.tensors[index]):
                # Weights that this launch does not read may have been replaced, too.
                plan.refresh()
                raise DeviceChangedError
            tensor, layout = tensors[index], plan.layouts[index]
            role = (
                plan.names[index] if column == self.native.WEIGHT else f"the gradient or state of {plan.names[index]}"
            )
            assert tensor is not None
            layout.check(tensor, role)
            begin, end = extent_of(tensor)
            if written and is_overlapping(tensor):
                plan.tables[EXPANDED] = True
            if layout.dtype.is_complex != tensor.is_complex() or not layout.matches(tensor):
                tensor = staging.stand_in(tensor, layout, index, written)
            table.set(column, index, tensor.data_ptr(), dtype_code(tensor.dtype), begin, end)

    def check_memory(
        self,
        table: Any,
        plan: Plan,
        xs: Sequence[TensorList] = (),
        base: Base | None = None,
        snapshot: Snapshot | None = None,
        is_sum: bool = False,
    ) -> None:
        """The last check before a launch that writes the weights, and with a base its state.

        Raises:
            SharedMemoryError: if the reference has to make it; see :func:`sam_kernels.memory.shares_memory`.
        """
        looks_closer = table.may_overlap(len(xs), base is not None, is_sum) or EXPANDED in plan.tables
        if looks_closer and shares_memory(plan, xs, base, snapshot, is_sum):
            raise SharedMemoryError

    def bind_snapshot(self, table: Any, plan: Plan, snapshot: Snapshot | None) -> bytearray | None:
        """Binds the snapshot's memory and returns its flags."""
        if snapshot is None:
            return None
        snapshot.fit(plan)
        # A snapshot's memory moves only when it is allocated anew, so its addresses are read once.
        key = self.name + " snapshot"
        if plan.tables.get(key) is not snapshot.tensors:
            self._bind_own(table, self.native.SNAPSHOT, snapshot.tensors)
            plan.tables[key] = snapshot.tensors
        return snapshot.taken

    def _bind_own(self, table: Any, column: int, tensors: list[Tensor]) -> None:
        """Binds tensors that this package has allocated, in the layout of the table's."""
        for index in table.bind(column, tensors):
            table.set(column, index, tensors[index].data_ptr(), dtype_code(tensors[index].dtype))

    def finish(self, table: Any, plan: Plan, staging: Staging) -> None:
        """Tells autograd what the launch has written: it would otherwise compute wrong gradients without an error."""
        rows = table.written_rows()
        if staging.results:
            staging.write_back(rows)
        increment_version(plan.tensors if rows is None else [plan.tensors[i] for i in rows])


def refreshed(plan: Plan) -> None:
    """Inspects changed parameters anew.

    Raises:
        DeviceChangedError: if they are now on another device, which another backend may serve.
    """
    device = plan.device
    plan.refresh()
    if plan.device != device or plan.parts:
        raise DeviceChangedError


def check(
    plan: Plan, xs: Sequence[TensorList] = (), base: Base | None = None, snapshot: Snapshot | None = None
) -> None:
    """What binding to a native table checks, for backends without one. Raises before anything is changed."""
    if not all(layout.is_of(t) for layout, t in zip(plan.layouts, plan.tensors, strict=True)):
        refreshed(plan)
    columns = [*xs, *(() if base is None else base.columns)]
    for column in columns:
        for index, entry in enumerate(column):
            if entry is not None:
                if index in plan.unreadable:
                    plan.refuse_unreadable(index)
                plan.layouts[index].check(entry, f"the gradient or state of {plan.names[index]}")
    for index, step in enumerate(() if base is None else base.steps):
        if step is not None and (step.numel() != 1 or step.dtype not in (torch.float32, torch.float64)):
            raise ValueError(f"step of {plan.names[index]} must be one float32 or float64 element, got {step!r}")
    if snapshot is None:
        return
    snapshot.fit(plan)
    for copy, layout, flag in zip(snapshot.tensors, plan.layouts, snapshot.taken, strict=True):
        if copy.dtype != layout.dtype and not flag:
            raise ValueError("a snapshot's tensor is of another type than its weight, and no master")


def dtype_code(dtype: torch.dtype) -> int:
    """The code of a dtype in the native tables; that of a complex one is its real one's."""
    return _DTYPE_CODES[REAL_DTYPE.get(dtype, dtype)]
