"""Plans: what is known of a list of parameters before a launch.

A :class:`Plan` is a cache and never changes a result; it also carries what is fixed for each tensor, its group and its
geometry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import DeviceChangedError, UnsupportedTensorError
from .host import pick
from .layouts import Layout
from .sharding import Peers, local_part, shares_of


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
        parts: plans of one device each, with the indices of their tensors; empty if there is only one device.
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
        self.bindings: dict[str, Any] = {}  # the tables of native backends, by their names
        self.backends: dict[str | None, Any] = {}  # chosen for its device, by what was asked for
        self.memory: dict[Any, tuple[Any, bool]] = {}  # what was found of shared memory, and for which addresses
        devices = dict.fromkeys(layout.device for layout in self.layouts)
        self.device = next(iter(devices), torch.device("cpu"))
        self.parts: list[tuple[Plan, list[int]]] = []
        if len(devices) > 1:
            for device in devices:
                index = [i for i, layout in enumerate(self.layouts) if layout.device == device]
                self.parts.append((self.subset(index), index))

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

    def __len__(self) -> int:
        return len(self.params)
