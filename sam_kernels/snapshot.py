"""Snapshots: the copies that a perturbation takes and that restoring needs, or masters of coarse weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import WeightsConvertedError
from .host import pick
from .layouts import Layout, wide_dtype
from .plan import Plan

__all__ = ["TAKEN", "Snapshot"]

# Flags of a snapshot. Native code sets and clears the first, and starts from the copy where there is either.
TAKEN, MASTER = 1, 2
_WITHOUT_TAKEN = bytes(flag & ~TAKEN for flag in range(256))

# Start of each tensor within a snapshot's buffer, in bytes: a cache line, and more than any vector load needs.
_ALIGNMENT = 64


class Snapshot:
    """Copies of a plan's tensors, bit for bit, in one buffer for each dtype and device.

    ``taken`` has a byte for each tensor: ``TAKEN`` while the copy is valid and the tensor may hold something else.
    Kernels set and clear it themselves, so the flags are right wherever an exception strikes.

    With ``masters``, a bfloat16 or float16 tensor has a float32 master in place of a copy, flagged ``MASTER`` for good:
    the weight itself, of which the tensor is the rounding. Every operation starts from it, a descent updates it and
    rounds it to the tensor, and restoring rounds it again; a perturbation leaves it and copies nothing.

    Args:
        plan: of the tensors; masters begin as their values.
        masters: whether tensors of low precision have masters.
    """

    def __init__(self, plan: Plan, masters: bool = False) -> None:
        self.masters = masters
        self._allocate(plan)

    @torch.no_grad()
    def _allocate(self, plan: Plan) -> None:
        self.layouts = list(plan.layouts)
        self.tensors: list[Tensor] = [torch.empty(0, device="cpu")] * len(plan)
        dtypes = [self._dtype_for(layout) for layout in self.layouts]
        by_buffer: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for index, layout in enumerate(self.layouts):
            by_buffer.setdefault((dtypes[index], layout.device), []).append(index)
        for (dtype, device), members in by_buffer.items():
            unit = _ALIGNMENT // dtype.itemsize
            starts, total = [], 0
            for index in members:
                starts.append(total)
                elements = self.layouts[index].shape.numel()
                total += -(-elements // unit) * unit
            buffer = torch.empty(total, dtype=dtype, device=device)
            for index, start in zip(members, starts, strict=True):
                layout = self.layouts[index]
                self.tensors[index] = buffer.as_strided(layout.shape, layout.strides, start)
        self.taken = bytearray(MASTER if dtypes[i] != self.layouts[i].dtype else 0 for i in range(len(plan)))
        for index in self.with_master:
            self.tensors[index].copy_(plan.tensors[index])

    def _dtype_for(self, layout: Layout) -> torch.dtype:
        return wide_dtype(layout.dtype) if self.masters else layout.dtype

    @property
    def with_master(self) -> list[int]:
        """The tensors that have one."""
        return [index for index, flag in enumerate(self.taken) if flag & MASTER]

    @staticmethod
    def of(plan: Plan, tensors: Sequence[Tensor]) -> Snapshot:
        """A snapshot whose copies are the given tensors themselves, which nothing writes into.

        An operation on ``plan`` then starts from them, and leaves its results in the plan's own tensors.

        Args:
            tensors: of the shapes of the plan's, and of their types or float32 for low precision.
        """
        view = Snapshot.__new__(Snapshot)
        view.masters = False
        view.layouts = list(plan.layouts)
        view.taken = bytearray([TAKEN] * len(plan))
        view.tensors = []
        for tensor, layout in zip(tensors, plan.layouts, strict=True):
            tensor = tensor.detach()
            view.tensors.append(tensor if layout.matches(tensor) else layout.empty(tensor.dtype).copy_(tensor))
        return view

    def fit(self, plan: Plan) -> None:
        """Allocates anew if the plan's tensors changed their dtype, device, shape or strides.

        Raises:
            WeightsConvertedError: if the copies are still needed.
        """
        if self.layouts == plan.layouts:
            return
        if self.is_taken:
            raise WeightsConvertedError(
                "parameters changed their dtype, device or shape while they were perturbed; "
                "convert or move the model between steps"
            )
        before = dict(zip(self.with_master, pick(self.tensors, self.with_master), strict=True))
        self._allocate(plan)
        # A tensor that moved to another device or order of its elements has its master still, if it still fits.
        for index in self.with_master:
            if index in before and before[index].shape == self.layouts[index].shape:
                self._adopt(index, plan.tensors[index], before[index])

    @torch.no_grad()
    def put_back(self, plan: Plan) -> None:
        """Restores tensors that have been converted or moved since they were copied, those of other shapes excepted.

        The snapshot is then empty but for masters.
        """
        for tensor, copy, flag in zip(plan.tensors, self.tensors, self.taken, strict=True):
            if flag and tensor.shape == copy.shape:
                tensor.copy_(copy)
        self.discard()

    def adopt(self, plan: Plan, masters: Sequence[Tensor | None]) -> None:
        """Takes over masters from elsewhere, None for those to be left, wherever they round to the plan's tensors.

        Elements that do not are set to the plan's: what a tensor holds was written by somebody who knew nothing of its
        master. ``adopt(plan, snapshot.tensors)`` after such a write brings the masters up to date.
        """
        self.fit(plan)
        for index in self.with_master:
            master = masters[index]
            if master is not None:
                self._adopt(index, plan.tensors[index], master)

    @torch.no_grad()
    def _adopt(self, index: int, tensor: Tensor, master: Tensor) -> None:
        own = self.tensors[index]
        tensor, master = tensor.to(own.device), master.to(own)
        same = master.to(tensor.dtype) == tensor
        own.copy_(torch.where(same, master, tensor.to(own.dtype)))

    def subset(self, index: Sequence[int]) -> Snapshot:
        """A snapshot that shares the memory of some of the tensors, with flags of its own."""
        part = Snapshot.__new__(Snapshot)
        part.masters = self.masters
        part.layouts = pick(self.layouts, index)
        part.taken = bytearray(pick(self.taken, index))
        part.tensors = pick(self.tensors, index)
        return part

    @property
    def is_taken(self) -> bool:
        """Whether some tensor may hold something else than its copy or its master's rounding."""
        return TAKEN in self.taken or TAKEN | MASTER in self.taken

    def discard(self) -> None:
        """Forgets the copies without restoring them. Masters stay."""
        self.taken[:] = self.taken.translate(_WITHOUT_TAKEN)
