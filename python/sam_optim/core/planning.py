"""The kernels' view of an optimizer's groups, which is made anew only when they change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sam_kernels import Peers, Plan, Snapshot
from sam_kernels.host import same_objects
from sam_kernels.layouts import Layout
from sam_kernels.memory import sharing
from sam_kernels.sharding import is_distributed, is_flat_shard
from sam_kernels.snapshot import TAKEN

from .construction import names_of
from .errors import InvalidSettingError, StepOrderError
from .passes import Gradients

Group = dict[str, Any]


class PlanCache:
    """Plan and snapshot of all parameters, and which of them stay unperturbed.

    It has no reference to the optimizer: the two would hold each other, and their memory would wait for the collector.

    Args:
        has_masters: whether weights in bfloat16 and float16 have masters, see :class:`sam_kernels.Snapshot`.
        process_group: the ranks that hold other parameters of the same model.
        is_counted: whether this rank counts a parameter in sums over these ranks.
    """

    def __init__(
        self,
        has_masters: bool = False,
        process_group: Any = None,
        is_counted: Callable[[Tensor], bool] | None = None,
    ) -> None:
        self._process_group, self._is_counted = process_group, is_counted
        self.has_masters = has_masters
        self.known_groups: list[Group] = []  # that have all settings
        self._waiting_masters: Sequence[Tensor | None] | None = None  # for a snapshot that is not made yet
        self._known_writes: list[tuple[int, int]] = []
        self._key: list[Any] | None = None
        self._unperturbed: list[int] = []
        self._snapshot: Snapshot | None = None
        self._points: dict[str, Plan] = {}
        self._without_geometry: Plan | None = None
        self._widened: Plan | None = None
        self.plan = Plan([])

    def update(
        self,
        groups: list[Group],
        geometry_of: Callable[[Group], Sequence[float | None]],
        is_perturbed: Callable[[Group], bool],
    ) -> Plan:
        """The plan of all parameters of all groups as they are now.

        Args:
            geometry_of: gives T of each parameter of a group, see :class:`sam_kernels.Plan`.
            is_perturbed: whether a group takes part in the perturbation.

        Raises:
            StepOrderError: if they have changed while copies of the weights are held.
        """
        key = [(len(g["params"]), g.get("adaptive"), g.get("eta"), g.get("perturb")) for g in groups]
        params = groups[0]["params"] if len(groups) == 1 else chain.from_iterable(group["params"] for group in groups)
        params = params if type(params) is list else list(params)
        if key == self._key and same_objects(params, self.plan.params) and not self.plan.has_moved:
            return self.plan
        if self.holds_copies:
            raise StepOrderError("parameters or their geometry were changed in the middle of a step")
        masters = {
            id(p): m
            for p, m in zip(self.plan.params, self.masters or [], strict=False)
            if m is not None and m.shape == p.shape
        }
        self.plan = Plan(
            params,
            [number for number, group in enumerate(groups) for _ in group["params"]],
            list(chain.from_iterable(geometry_of(group) for group in groups)),
            list(chain.from_iterable(names_of(number, group) for number, group in enumerate(groups))),
            self._peers_of(params),
        )
        if self.has_masters and self.plan.shares:
            raise InvalidSettingError(
                "master_weights is not for DTensors: fully_shard with MixedPrecisionPolicy(param_dtype=torch.bfloat16) "
                "keeps the shards, which the optimizer works on, in float32 by itself"
            )
        flags = [is_perturbed(group) for group in groups for _ in group["params"]]
        self._unperturbed = [index for index, perturbed in enumerate(flags) if not perturbed]
        self._snapshot, self._key = None, key
        self._points, self._without_geometry, self._widened = {}, None, None
        if masters:
            self._waiting_masters = [masters.get(id(p)) for p in params]
        return self.plan

    def _peers_of(self, params: Sequence[Tensor]) -> Peers | None:
        if self._process_group is None:
            if any(map(is_flat_shard, params)) and torch.distributed.get_world_size() > 1:
                raise InvalidSettingError(
                    "the parameters are those of FullyShardedDataParallel (FSDP 1), of which each rank would take the "
                    "norm of its own shard: use FSDP2 (torch.distributed.fsdp.fully_shard), whose shards can be seen, "
                    "or say which ranks hold the others, process_group=model.process_group"
                )
            return None
        is_counted = self._is_counted or (lambda param: True)
        return Peers(self._process_group, [bool(is_counted(param)) for param in params])

    @property
    def without_geometry(self) -> Plan:
        """The plan with T = 1 everywhere."""
        if not self.plan.is_weighted:
            return self.plan
        if self._without_geometry is None:
            plan = self.plan
            self._without_geometry = Plan(plan.params, plan.groups, names=plan.names, peers=plan.peers)
        return self._without_geometry

    @property
    def snapshot(self) -> Snapshot:
        """Holds copies of the plan's weights; allocated when first needed."""
        if self._snapshot is None:
            self._snapshot = Snapshot(self.plan, self.has_masters)
            if self._waiting_masters is not None:
                self._snapshot.adopt(self.plan, self._waiting_masters)
                self._waiting_masters = None
        return self._snapshot

    @property
    def masters(self) -> list[Tensor | None] | None:
        """The masters, with None for parameters that have none; None while there are no masters at all."""
        if self._waiting_masters is not None:
            return list(self._waiting_masters)
        if self._snapshot is None or not self.has_masters:
            return None
        found: list[Tensor | None] = [None] * len(self.plan)
        for index in self._snapshot.with_master:
            found[index] = self._snapshot.tensors[index]
        return found

    @masters.setter
    def masters(self, masters: Sequence[Tensor | None] | None) -> None:
        # Weights may be loaded after the optimizer is: whether masters belong to them is looked at when a step begins.
        self._waiting_masters, self._snapshot = (masters if self.has_masters else None), None
        self._points, self._widened = {}, None

    @property
    def has_waiting_masters(self) -> bool:
        """Whether masters were loaded that no step has compared with the weights yet."""
        return self._waiting_masters is not None

    def begin_masters(self) -> None:
        """Makes masters for weights that have none yet."""
        if self.has_masters:
            _ = self.snapshot

    def catch_up(self, unseen: bool = False) -> None:
        """Brings masters up to date with weights that somebody else has written since :meth:`remember_writes`.

        Args:
            unseen: also with writes that only a comparison of values can show.
        """
        if not self.has_masters:
            return
        writes = self._writes()
        if writes == self._known_writes and not unseen:
            return
        if any(
            Layout.of(t, "a weight") != layout for t, layout in zip(self.plan.tensors, self.plan.layouts, strict=True)
        ):
            self.plan.refresh()
        self.snapshot.adopt(self.plan, self.snapshot.tensors)
        self._known_writes = writes

    def remember_writes(self) -> None:
        """Notes that everything written into the weights so far was written through their masters."""
        if self.has_masters:
            self._known_writes = self._writes()

    @torch.no_grad()
    def renew_copies(self) -> None:
        """Copies the weights anew wherever copies are held."""
        if self.holds_copies:
            held = [index for index, flag in enumerate(self.snapshot.taken) if flag == TAKEN]
            for index in held:
                self.snapshot.tensors[index].copy_(self.plan.tensors[index])

    def _writes(self) -> list[tuple[int, int]]:
        return [(p._version, p.data_ptr()) for p in self.plan.tensors]

    @property
    def widened(self) -> Plan:
        """The plan of the masters, and of the weights that have none, with T = 1 everywhere."""
        if not self.has_masters:
            return self.without_geometry
        if self._widened is None:
            self._widened = Plan(self._unperturbed_weights(), self.plan.groups, names=self.plan.names)
        return self._widened

    def _unperturbed_weights(self) -> list[Tensor]:
        if not self.has_masters:
            return self.plan.tensors
        masters = set(self.snapshot.with_master)
        return [self.snapshot.tensors[i] if i in masters else p for i, p in enumerate(self.plan.tensors)]

    def point(self, name: str) -> tuple[Plan, Snapshot]:
        """Memory for a second set of weights: its plan, and the model's weights as a snapshot to start from.

        Raises:
            InvalidSettingError: if parameters share memory, because here each would have its own.
        """
        own = self._points.get(name)
        if own is None or own.layouts != self.plan.layouts:
            plan = self.plan
            names = sharing(plan)
            if names is not None:
                raise InvalidSettingError(
                    f"{names[0]} and {names[1]} share memory, which passes side by side would give each its own of; "
                    "run the passes one after the other, or give the optimizer each weight once"
                )
            own = Plan([layout.empty() for layout in plan.layouts], plan.groups, plan.geometry, plan.names, plan.peers)
            self._points[name] = own
        return own, Snapshot.of(own, self._unperturbed_weights())

    def weights_at(self, point: Plan) -> list[Tensor]:
        """The weights of such a point, a tensor for each parameter; those that no kernel can read are the model's."""
        unreadable = self.plan.unreadable
        if not unreadable:
            return point.params
        return [self.plan.params[i] if i in unreadable else own for i, own in enumerate(point.params)]

    def weights_to_restore(self) -> dict[int, Tensor]:
        """In the middle of a step: copies of the weights that it will restore, by the ids of their parameters.

        Raises:
            StepOrderError: if a perturbed parameter is a DTensor, of which this rank has only a part.
        """
        if not self.holds_copies:
            return {}
        found = {}
        for index, flag in enumerate(self.snapshot.taken):
            if flag & TAKEN:
                param = self.plan.params[index]
                if is_distributed(param):
                    raise StepOrderError(
                        "the weights of a sharded model were asked for in the middle of a step, while they are "
                        "perturbed; complete it with second_step() or abandon it with restore() first"
                    )
                found[id(param)] = self.snapshot.tensors[index].detach().to(param.dtype, copy=True)
        return found

    def forget_copies(self) -> None:
        """Discards the copies without restoring them."""
        if self._snapshot is not None:
            self._snapshot.discard()

    @property
    def holds_copies(self) -> bool:
        return self._snapshot is not None and self._snapshot.is_taken

    def unperturbed_only(self, gradients: Gradients) -> Gradients | None:
        """The gradients of unperturbed parameters; None if there are no such parameters."""
        if not self._unperturbed:
            return None
        chosen: Gradients = [None] * len(gradients)
        for index in self._unperturbed:
            chosen[index] = gradients[index]
        return chosen

    def perturbed_only(self, gradients: Gradients) -> Gradients:
        """The gradients without those of unperturbed parameters."""
        if not self._unperturbed:
            return gradients
        chosen = list(gradients)
        for index in self._unperturbed:
            chosen[index] = None
        return chosen
