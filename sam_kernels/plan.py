"""Plans and snapshots: what is known of a list of parameters before a launch.

A :class:`Plan` is a cache and never changes a result; it also carries what is fixed for each tensor, its group and its
geometry. A :class:`Snapshot` holds the copies that a perturbation takes and that restoring needs, or masters of weights
whose type is too coarse to be trained in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import DeviceChangedError, UnsupportedTensorError, WeightsConvertedError
from .host import pick
from .sharding import Peers, local_part, shares_of

REAL_DTYPE = {torch.complex64: torch.float32, torch.complex128: torch.float64}
SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, *REAL_DTYPE)

# Types too coarse to hold a perturbation or an update that is small beside the weight, and that of their masters.
LOW_PRECISION = (torch.bfloat16, torch.float16)
MASTER_DTYPE = torch.float32


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which a weight's master and its optimizer's state are kept, where weights have masters."""
    return MASTER_DTYPE if dtype in LOW_PRECISION else dtype


# Flags of a snapshot. Native code sets and clears the first, and starts from the copy where there is either.
TAKEN, MASTER = 1, 2
_WITHOUT_TAKEN = bytes(flag & ~TAKEN for flag in range(256))

# Start of each tensor within a snapshot's buffer, in bytes: a cache line, and more than any vector load needs.
_ALIGNMENT = 64


def has_own_memory(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a dense tensor whose memory holds its values.

    Tensor subclasses that compute elsewhere (DTensor, fake and wrapped tensors) are not.
    """
    dispatches = type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl  # type: ignore[attr-defined]
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return tensor.layout is torch.strided and (plain or not dispatches) and tensor.device.type != "meta"


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one range of memory, each once, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def is_overlapping(tensor: Tensor) -> bool:
    """Whether several elements are one number in memory, as those of an expanded tensor."""
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return False
        if size > 1:
            if stride <= reach:
                return stride == 0 or offsets_of(tensor).unique().numel() < tensor.numel()
            reach += stride * (size - 1)
    return False


def offsets_of(tensor: Tensor) -> Tensor:
    """How far each element lies behind the first, in elements; int64, one dimension."""
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        offsets = offsets.unsqueeze(-1) + stride * torch.arange(size, dtype=torch.int64, device="cpu")
    return offsets.flatten()


class Layout(NamedTuple):
    """Where a parameter's elements lie."""

    shape: torch.Size
    strides: tuple[int, ...]  # the tensor's own, or those of a contiguous copy where it is not dense
    numel: int  # real elements
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: Tensor, name: str) -> Layout:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is not a tensor but {type(tensor).__name__}")
        check_supported(tensor, name)
        own_order = tensor.numel() > 0 and is_dense(tensor)
        strides = tensor.stride() if own_order else torch.empty(tensor.shape, device="meta").stride()
        numel = tensor.numel() * (2 if tensor.is_complex() else 1)
        return Layout(tensor.shape, strides, numel, tensor.dtype, tensor.device)

    def matches(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has this shape, and this order in memory (strides of dimensions of size 1 say nothing)."""
        if tensor.shape != self.shape or tensor.is_conj() or tensor.is_neg() or tensor._is_zerotensor():
            return False
        pairs = zip(tensor.stride(), self.strides, self.shape, strict=True)
        return self.numel == 0 or all(own == wanted for own, wanted, size in pairs if size != 1)

    def check(self, tensor: Tensor, role: str) -> None:
        """Raises unless ``tensor`` can be a gradient or state of the parameter.

        Raises:
            UnsupportedTensorError: if no kernel can read it.
            ValueError: if its shape, device or kind of numbers is another.
        """
        check_supported(tensor, role)
        if tensor.shape != self.shape:
            raise ValueError(f"{role} has shape {tuple(tensor.shape)}, expected {tuple(self.shape)}")
        if tensor.device != self.device:
            raise ValueError(f"{role} is on {tensor.device}, expected {self.device}")
        if tensor.is_complex() and not self.dtype.is_complex:
            raise ValueError(f"{role} is complex ({tensor.dtype}), expected {self.dtype}")

    def is_of(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is of this type, shape and device; its order in memory may be another."""
        return tensor.dtype == self.dtype and tensor.device == self.device and tensor.shape == self.shape

    def empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """A new tensor that matches."""
        return torch.empty_strided(self.shape, self.strides, dtype=dtype or self.dtype, device=self.device)


def check_supported(tensor: Tensor, name: str) -> None:
    """Raises :class:`UnsupportedTensorError` unless the kernels can read ``tensor``."""
    if tensor.layout is not torch.strided:
        kind, instead = ("nested", "Pad it") if tensor.is_nested else ("sparse", "Use sparse=False in the embedding")
        raise UnsupportedTensorError(
            f"{name} is {kind} ({tensor.layout}); the kernels need dense tensors. {instead}, or give {kind} parameters "
            "an optimizer of their own."
        )
    if not has_own_memory(tensor):
        raise UnsupportedTensorError(
            f"{name} is a {type(tensor).__name__} on {tensor.device}, which has no memory that a kernel can read; "
            "pass the plain tensor that it is made of, or keep it frozen: without a gradient it is passed over."
        )
    if tensor.dtype not in SUPPORTED_DTYPES:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
        raise UnsupportedTensorError(f"{name} is of {tensor.dtype}; supported are {supported}")


class Plan:
    """A list of parameters, prepared for many launches.

    Args:
        params: the tensors that launches change. Of a DTensor launches change this rank's part, and Gram matrices are
            summed over the ranks that hold the others.
        groups: index of each tensor's group into the per-group arguments of the operations; all 0 by default.
        geometry: for each tensor None for T = 1, or eta >= 0 for ASAM's T(w) = ``|w|`` + eta.
        names: of the tensors, for messages.
        peers: ranks that hold other tensors of the same model; Gram matrices are then of all their tensors together.

    Attributes:
        tensors: the memory of the parameters: themselves, or this rank's parts of them; an empty tensor for each
            parameter that no kernel can read.
        unreadable: those, and why. They may be in the list, as frozen quantised weights are in a model's, but never
            have a gradient: an operation that is given one raises the error.
        shares: how DTensors among them are spread over ranks; empty if there are none.
        sums_over_ranks: whether a Gram matrix takes a sum over ranks, which no launch can make.

    Raises:
        ValueError: if the lists differ in length or eta is negative.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        groups: Sequence[int] | None = None,
        geometry: Sequence[float | None] | None = None,
        names: Sequence[str] | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.params = list(params)
        self.peers = peers
        count = len(self.params)
        self.groups = [0] * count if groups is None else list(groups)
        self.geometry: list[float | None] = [None] * count if geometry is None else list(geometry)
        self.group_count = max(self.groups, default=0) + 1
        self.is_weighted = any(eta is not None for eta in self.geometry)
        self.names = [f"tensor {index}" for index in range(count)] if names is None else list(names)
        for argument in ("groups", "geometry", "names"):
            if len(getattr(self, argument)) != count:
                raise ValueError(f"{argument} has {len(getattr(self, argument))} entries for {count} tensors")
        if peers is not None and len(peers.counted) != count:
            raise ValueError(f"peers.counted has {len(peers.counted)} entries for {count} tensors")
        if any(eta is not None and not eta >= 0.0 for eta in self.geometry):
            raise ValueError(f"Invalid eta in geometry: {self.geometry}; it must be None or at least 0")
        if any(group < 0 for group in self.groups):
            raise ValueError(f"Invalid groups: {self.groups}; they must be at least 0")
        self.refresh()

    def refresh(self) -> None:
        """Inspects the parameters anew, after one of them changed its dtype, device, shape or strides."""
        self.shares = shares_of(self.params)
        self.sums_over_ranks = bool(self.shares) or self.peers is not None
        self._by_share: list[Plan] = []
        self.tensors: list[Tensor] = self.params
        if self.shares:
            self.tensors = [local_part(p, name=name) for p, name in zip(self.params, self.names, strict=True)]
        self.unreadable: dict[int, UnsupportedTensorError] = {}
        layouts = [self._layout_of(index) for index in range(len(self.params))]
        if self.unreadable:
            self._leave_out_unreadable(layouts)
        self.layouts: list[Layout] = layouts  # type: ignore[assignment]
        self.tables: dict[str, Any] = {}
        self.memory: dict[Any, tuple[Any, bool]] = {}  # what was found of shared memory, and for which addresses
        devices = dict.fromkeys(layout.device for layout in self.layouts)
        self.device = next(iter(devices), torch.device("cpu"))
        self._parts: list[tuple[Plan, list[int]]] = []
        if len(devices) > 1:
            for device in devices:
                index = [i for i, layout in enumerate(self.layouts) if layout.device == device]
                self._parts.append((self.subset(index), index))

    def _layout_of(self, index: int) -> Layout | None:
        tensor, name = self.tensors[index], self.names[index]
        try:
            if torch.nn.parameter.is_lazy(tensor):
                raise UnsupportedTensorError(f"{name} has not been initialised: run the lazy module once")
            return Layout.of(tensor, name)
        except UnsupportedTensorError as error:
            self.unreadable[index] = error
            return None

    def _leave_out_unreadable(self, layouts: list[Layout | None]) -> None:
        """Gives parameters that no kernel can read an empty tensor, on a device that launches go to anyway."""
        devices = [layout.device for layout in layouts if layout is not None]
        devices += [self.tensors[i].device for i in self.unreadable if self.tensors[i].device.type != "meta"]
        device = devices[0] if devices else torch.device("cpu")
        self.tensors = list(self.tensors)
        for index in self.unreadable:
            # Of a shape that no gradient of the parameter has: one would be noticed.
            lazy = torch.nn.parameter.is_lazy(self.tensors[index])
            shape = [0] * (1 if lazy else self.tensors[index].dim() + 1)
            self.tensors[index] = torch.empty(shape, dtype=torch.float32, device=device)
            layouts[index] = Layout.of(self.tensors[index], self.names[index])

    def refuse_unreadable(self, index: int) -> None:
        """For a parameter that no kernel could read, and that has a gradient now.

        Raises:
            UnsupportedTensorError: if none can read it still.
            DeviceChangedError: if one can: the launch has to be chosen anew.
        """
        self.refresh()
        if index in self.unreadable:
            raise self.unreadable[index]
        raise DeviceChangedError

    def subset(self, index: Sequence[int]) -> Plan:
        """The plan of some of the tensors, by themselves: without peers."""
        params, groups, geometry, names = (
            pick(column, index) for column in (self.params, self.groups, self.geometry, self.names)
        )
        return Plan(params, groups, geometry, names)

    def local(self, column: Sequence[Any]) -> Sequence[Any]:
        """An entry for each parameter, as a launch takes it: of a DTensor this rank's part.

        Raises:
            UnsupportedTensorError: if it is not spread over ranks as its parameter is.
        """
        if not self.shares or not column:
            return column
        return [
            local_part(entry, param, f"the gradient or state of {name}")
            for entry, param, name in zip(column, self.params, self.names, strict=True)
        ]

    @property
    def has_moved(self) -> bool:
        """Whether a DTensor has got another local tensor than it had."""
        return bool(self.shares) and any(
            local_part(p) is not own and index not in self.unreadable
            for index, (p, own) in enumerate(zip(self.params, self.tensors, strict=True))
        )

    @property
    def by_share(self) -> list[Plan]:
        """A plan for each of the shares."""
        if not self._by_share:
            whole = len(self.shares) == 1
            self._by_share = [self] if whole else [self.subset(share.index) for share in self.shares]
        return self._by_share

    @property
    def parts(self) -> list[tuple[Plan, list[int]]]:
        """Plans of one device each, with the indices of their tensors; empty if there is only one device."""
        return self._parts

    def __len__(self) -> int:
        return len(self.params)


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
