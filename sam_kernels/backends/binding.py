"""Filling a native table of addresses: what the CPU backend and those for GPUs have in common.

A launch is bound by one native call that reads all of its tensors. Only what that call cannot read, and memory that
may overlap, is looked at here.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from .contract import Lists

# The codes of enum class DType in csrc/common/scalar_types.h.
_DTYPE_CODES = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}

# What a launch writes, enum Writes in csrc/python/table_binding.h. State is written with the weights; a sum may be
# written over an entry of its lists.
NOTHING, WEIGHTS, WEIGHTS_AND_STATE, SUM = range(4)


class Binding:
    """A plan's table in one backend, and what it has been filled with.

    Args:
        native: names the table's columns (``WEIGHT``, ``LIST``, ...): the extension module, or what stands for it.
        table: launches over the plan's tensors.
        pointers: what holds their addresses; the table itself by default.

    Attributes:
        tuning: of the table's launches, as its backend set it last.
    """

    __slots__ = ("_copies", "_native", "_pointers", "_snapshot", "table", "tuning")

    def __init__(self, native: Any, table: Any, pointers: Any = None) -> None:
        self.table, self._native = table, native
        self._pointers = table if pointers is None else pointers
        self._snapshot: list[Tensor] | None = None
        self._copies: _DenseCopies | None = None
        self.tuning: Any = None

    def bind(
        self,
        plan: Plan,
        lists: Lists,
        snapshot: Snapshot | None,
        writes: int,
        base: Base | None,
        reads_weights: bool,
        is_preview: bool,
        steps_on_host: bool,
    ) -> bool:
        """Binds all that a launch reads and writes, as it is now. The last check before the launch.

        Returns:
            False if the weights are others than the plan knows: it has to be refreshed.

        Raises:
            SharedMemoryError: if the reference has to make the launch; see :func:`sam_kernels.memory.shares_memory`.
            DeviceChangedError: if the launch has to be chosen anew.
        """
        self._copies = None
        state, steps = (None, ()) if base is None else (base.columns, base.steps)
        weights = plan.tensors if reads_weights else None
        can_launch = self._pointers.bind_launch(weights, lists, state, steps, steps_on_host, writes)
        if not can_launch and not self._look_closer(plan, lists, snapshot, writes, base, is_preview):
            return False
        if snapshot is not None:
            snapshot.fit(plan)
            # A snapshot's memory moves only when it is allocated anew, so its addresses are read once.
            if self._snapshot is not snapshot.tensors:
                self._bind_snapshot(snapshot)
        return True

    def _look_closer(
        self, plan: Plan, lists: Lists, snapshot: Snapshot | None, writes: int, base: Base | None, is_preview: bool
    ) -> bool:
        """Fills the cells that the native call could not read: checks the tensors, copies those laid out otherwise."""
        native = self._native
        copies = _DenseCopies()
        is_expanded = False  # some tensor that is written
        for column, index in self._pointers.odd_cells():
            if column == native.WEIGHT:
                if not plan.layouts[index].is_of(plan.tensors[index]):
                    return False
                tensor, role, is_written = plan.tensors[index], plan.names[index], writes != NOTHING
            else:
                if column == native.STEP:
                    assert base is not None
                    _refuse_step(plan, index, base.steps[index])
                if column < native.STATE:
                    tensor, is_written = lists[column - native.LIST][index], False
                else:
                    assert base is not None
                    tensor, is_written = base.columns[column - native.STATE][index], not is_preview
                role = f"the gradient or state of {plan.names[index]}"
            if index in plan.unreadable:
                plan.refuse_unreadable(index)
            if not plan.layouts[index].is_of(plan.tensors[index]):
                # Weights that this launch does not read may have been replaced, too.
                plan.refresh()
                raise DeviceChangedError
            layout = plan.layouts[index]
            layout.check(tensor, role)
            begin, end = extent_of(tensor)
            is_expanded = is_expanded or (is_written and is_overlapping(tensor))
            if layout.dtype.is_complex != tensor.is_complex() or not layout.matches(tensor):
                tensor = copies.of(tensor, layout, index, is_written)
            self._pointers.set(column, index, tensor.data_ptr(), dtype_code(tensor.dtype), begin, end)
        self._copies = copies
        if writes == NOTHING or not (is_expanded or self._pointers.may_overlap(len(lists), writes)):
            return True
        if shares_memory(plan, lists, base, snapshot, writes == SUM):
            raise SharedMemoryError
        return True

    def _bind_snapshot(self, snapshot: Snapshot) -> None:
        column = self._native.SNAPSHOT
        for index in self._pointers.bind(column, snapshot.tensors):
            copy = snapshot.tensors[index]
            self._pointers.set(column, index, copy.data_ptr(), dtype_code(copy.dtype))
        self._snapshot = snapshot.tensors

    def forget_copies(self) -> None:
        """Lets go of what the launch has read, where it has written nothing."""
        self._copies = None

    def finish(self, plan: Plan) -> None:
        """Tells autograd what the launch has written: it would otherwise compute wrong gradients without an error."""
        rows = self._pointers.written_rows()
        if self._copies is not None:
            self._copies.write_back(rows)
            self._copies = None
        increment_version(plan.tensors if rows is None else [plan.tensors[i] for i in rows])


class _DenseCopies:
    """Dense copies of tensors that the kernels cannot address, for one launch."""

    def __init__(self) -> None:
        self._alive: list[Tensor] = []
        self._written: list[tuple[int, Tensor, Tensor]] = []

    def of(self, tensor: Tensor, layout: Layout, row: int, is_written: bool) -> Tensor:
        dtype = tensor.dtype if tensor.is_complex() == layout.dtype.is_complex else layout.dtype
        copy = layout.empty(dtype)
        copy.copy_(tensor.detach())
        self._alive.append(copy)
        if is_written:
            self._written.append((row, tensor, copy))
        return copy

    @torch.no_grad()
    def write_back(self, rows: Sequence[int] | None) -> None:
        """Of the rows that the launch has written, None for all: others may be views of what it has."""
        for row, tensor, copy in self._written:
            if rows is None or row in rows:
                tensor.copy_(copy)


def table_arguments(plan: Plan) -> dict[str, Any]:
    """What native tables are made from."""
    return {
        "shapes": [layout.shape for layout in plan.layouts],
        "strides": [layout.strides for layout in plan.layouts],
        "numels": [layout.numel for layout in plan.layouts],
        "dtypes": [dtype_code(layout.dtype) for layout in plan.layouts],
        "groups": plan.groups,
        "etas": [-1.0 if eta is None else eta for eta in plan.geometry],
    }


def refreshed(plan: Plan) -> None:
    """Inspects changed parameters anew.

    Raises:
        DeviceChangedError: if they are now on another device, which another backend may serve.
    """
    device = plan.device
    plan.refresh()
    if plan.device != device or plan.parts:
        raise DeviceChangedError


def check(plan: Plan, lists: Lists = (), base: Base | None = None, snapshot: Snapshot | None = None) -> None:
    """What binding to a native table checks, for backends without one. Raises before anything is changed."""
    if not all(layout.is_of(t) for layout, t in zip(plan.layouts, plan.tensors, strict=True)):
        refreshed(plan)
    columns: list[TensorList] = [*lists, *(() if base is None else base.columns)]
    for column in columns:
        for index, entry in enumerate(column):
            if entry is not None:
                if index in plan.unreadable:
                    plan.refuse_unreadable(index)
                plan.layouts[index].check(entry, f"the gradient or state of {plan.names[index]}")
    for index, step in enumerate(() if base is None else base.steps):
        if step is not None and (step.numel() != 1 or step.dtype not in (torch.float32, torch.float64)):
            _refuse_step(plan, index, step)
    if snapshot is None:
        return
    snapshot.fit(plan)
    for copy, layout, flag in zip(snapshot.tensors, plan.layouts, snapshot.taken, strict=True):
        if copy.dtype != layout.dtype and not flag:
            raise ValueError("a snapshot's tensor is of another type than its weight, and no master")


def _refuse_step(plan: Plan, index: int, step: Tensor | None) -> None:
    where = "on the CPU" if plan.device.type == "cpu" else f"on the CPU or on {plan.device}"
    raise ValueError(f"step of {plan.names[index]} must be one float32 or float64 element {where}, got {step!r}")


def dtype_code(dtype: torch.dtype) -> int:
    """The code of a dtype in the native tables; that of a complex one is its real one's."""
    return _DTYPE_CODES[REAL_DTYPE.get(dtype, dtype)]
