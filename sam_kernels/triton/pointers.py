"""The table of pointers where ``sam_kernels._cpu`` is not built: as ``csrc/python/pointer_table.h``, but slower."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.binding import dtype_code
from ..backends.contract import Lists
from ..bases import BASES, TensorList
from ..layouts import SUPPORTED_DTYPES
from ..plan import Plan
from ..snapshot import TAKEN
from . import layout as at

_FLOAT64 = dtype_code(torch.float64)
_BASES = {base.code: base for base in BASES}
_STEP_DTYPES = (torch.float32, torch.float64)


class PointerTable:
    """Addresses and types of a plan's tensors and of those that belong to them."""

    def __init__(self, plan: Plan) -> None:
        self._layouts, self._groups, self._device = plan.layouts, plan.groups, plan.device
        count = len(plan)
        self._addresses = [[0] * count for _ in range(at.COLUMNS)]
        self._dtypes = [[0] * count for _ in range(at.COLUMNS)]
        self._wanted = [False] * count
        self._host_steps: list[Tensor | None] = [None] * count
        self._counted: list[tuple[Tensor, float]] = []

    def bind_launch(
        self,
        weights: TensorList | None,
        lists: Lists,
        state: Lists | None,
        steps: TensorList,
        steps_on_host: bool,
        writes: int,
    ) -> bool:
        self._odd: list[tuple[int, int]] = []
        columns: dict[int, TensorList | None] = {at.WEIGHT: weights}
        columns.update(dict.fromkeys(range(at.LIST, at.STATE)))
        columns.update({at.LIST + number: x for number, x in enumerate(lists)})
        if state is not None:
            columns.update(dict.fromkeys(range(at.STATE, at.STEP)))
            columns.update({at.STATE + number: column or None for number, column in enumerate(state)})
        for column, tensors in columns.items():
            if tensors is None:
                self._clear(column)
            else:
                self._odd += [(column, row) for row in self.bind(column, tensors)]
        if state is not None:
            self._clear(at.STEP)
            self._host_steps = [None] * len(self._layouts)
            self._odd += [(at.STEP, row) for row in self._bind_steps(steps, steps_on_host)]
        return False  # whoever asks looks closer then

    def odd_cells(self) -> list[tuple[int, int]]:
        return self._odd

    def has_host_step(self) -> bool:
        return any(step is not None for step in self._host_steps)

    def bind(self, column: int, tensors: TensorList) -> list[int]:
        if len(tensors) != len(self._layouts):
            raise ValueError(f"expected one entry for each of {len(self._layouts)} tensors, got {len(tensors)}")
        odd = []
        for row, (tensor, layout) in enumerate(zip(tensors, self._layouts, strict=True)):
            self._addresses[column][row] = self._dtypes[column][row] = 0
            if tensor is None:
                continue
            # What check_supported() and the layouts have to say about others is left to the caller.
            usable = (
                type(tensor) in (Tensor, torch.nn.Parameter)
                and tensor.layout is torch.strided
                and tensor.dtype in SUPPORTED_DTYPES
                and tensor.device == layout.device
                and tensor.is_complex() == layout.dtype.is_complex
                and (column != at.WEIGHT or tensor.dtype == layout.dtype)
                and layout.matches(tensor)
            )
            if usable:
                self.set(column, row, tensor.data_ptr(), dtype_code(tensor.dtype))
            else:
                odd.append(row)
        return odd

    def _bind_steps(self, tensors: TensorList, on_host_only: bool) -> list[int]:
        odd = []
        for row, tensor in enumerate(tensors):
            if tensor is None:
                continue
            on_host = on_host_only or tensor.device.type == "cpu" != self._device.type
            if tensor.dim() > 0 or tensor.dtype not in _STEP_DTYPES or not (on_host or tensor.device == self._device):
                odd.append(row)
                continue
            self.set(at.STEP, row, tensor.data_ptr(), dtype_code(tensor.dtype))
            if on_host:
                self._host_steps[row] = tensor
        return odd

    def set(self, column: int, row: int, address: int, dtype: int, begin: int = 0, end: int = 0) -> None:
        self._addresses[column][row], self._dtypes[column][row] = address, dtype

    def may_overlap(self, lists: int, writes: int) -> bool:
        return True  # whoever asks looks closer then

    def _clear(self, column: int) -> None:
        count = len(self._layouts)
        self._addresses[column], self._dtypes[column] = [0] * count, [0] * count

    def written_rows(self) -> list[int] | None:
        return None if all(self._wanted) else [row for row, wanted in enumerate(self._wanted) if wanted]

    def select_gradients(self, lists: int, taken: bytearray | None) -> None:
        held = taken or bytes(len(self._layouts))
        copies = self._dtypes[at.SNAPSHOT] if taken else []
        for copy, weight, flag in zip(copies, self._dtypes[at.WEIGHT], held, strict=False):
            if not flag and weight and copy not in (0, weight):
                raise ValueError("a snapshot's tensor is of another type than its weight, and no master")
        self._wanted = [self._has_gradient(row, lists) or held[row] != 0 for row in range(len(self._layouts))]

    def select_copies(self, taken: bytearray) -> None:
        self._wanted = [flag != 0 for flag in taken]

    def select_all(self) -> None:
        self._wanted = [True] * len(self._layouts)

    def dtypes(self) -> bytes:
        return bytes(code for row in zip(*self._dtypes, strict=True) for code in row)

    def fill(
        self,
        address: int,
        row_words: int,
        flags_word: int,
        pointers_word: int,
        lists: int,
        taken: bytearray | None,
        first: bytearray | None,
    ) -> None:
        records = _words_at(address, len(self._layouts), row_words)
        flags = []
        for row in range(len(self._layouts)):
            word = at.HELD if taken is not None and taken[row] else 0
            word |= at.FIRST if first is not None and first[row] else 0
            word |= at.HAS_GRADIENT if self._has_gradient(row, lists) else 0
            word |= at.STEP_ON_DEVICE if self._is_step_on_device(row) else 0
            word |= at.STEP_IS_DOUBLE if self._dtypes[at.STEP][row] == _FLOAT64 else 0
            flags.append(word)
        records[:, flags_word] = torch.tensor(flags, dtype=torch.int64, device="cpu")
        records[:, pointers_word : pointers_word + at.COLUMNS] = torch.tensor(
            self._addresses, dtype=torch.int64, device="cpu"
        ).T

    def fill_corrections(
        self, address: int, row_words: int, word: int, lists: int, base: str, settings: Sequence[Any]
    ) -> None:
        known = _BASES[base]
        numbers = _words_at(address, len(self._layouts), row_words).view(torch.float64)
        self._counted = []
        for row, tensor in enumerate(self._host_steps):
            if tensor is None or not self._wanted[row] or not self._has_gradient(row, lists):
                continue
            step = 1.0 + float(tensor)
            numbers[row, word], numbers[row, word + 1] = known.corrections(settings[self._groups[row]], step)
            self._counted.append((tensor, step))

    def count_steps(self) -> None:
        for tensor, step in self._counted:
            tensor.fill_(step)

    def has_step_on_device(self) -> bool:
        return any(self._is_step_on_device(row) for row in range(len(self._layouts)))

    def mark_rows(self, flags: bytearray, taken: bool) -> None:
        for row, wanted in enumerate(self._wanted):
            if wanted:
                flags[row] = flags[row] | TAKEN if taken else flags[row] & ~TAKEN

    def check_complete(self, lists: int, base: str, settings: Sequence[Any]) -> None:
        known = _BASES[base]
        for row, group in enumerate(self._groups):
            if not self._has_gradient(row, lists):
                continue
            if group >= len(settings):
                raise ValueError("a tensor's group has no settings")
            needed = [at.STATE + number for number in known.states(settings[group])]
            needed += [at.STEP] if known.counts_steps else []
            if any(self._dtypes[column][row] == 0 for column in needed):
                raise ValueError("a tensor with a gradient has no optimizer state")

    def _has_gradient(self, row: int, lists: int) -> bool:
        return any(self._dtypes[at.LIST + number][row] for number in range(lists))

    def _is_step_on_device(self, row: int) -> bool:
        return self._dtypes[at.STEP][row] != 0 and self._host_steps[row] is None


def _words_at(address: int, rows: int, row_words: int) -> Tensor:
    """A view of memory as int64 words."""
    if rows == 0:
        return torch.empty(0, row_words, dtype=torch.int64, device="cpu")
    memory = (ctypes.c_int64 * (rows * row_words)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.int64).view(rows, row_words)
