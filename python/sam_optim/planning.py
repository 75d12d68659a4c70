"""The kernels' view of an optimizer's groups, made anew only when they change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from sam_kernels import Plan, Snapshot
from sam_kernels.host import same_objects

from .construction import names_of
from .errors import StepOrderError
from .passes import Gradients

Group = dict[str, Any]


class PlanCache:
    """Plan and snapshot of all parameters, and which of them stay unperturbed.

    Args:
        geometry_of: from a group to T of each of its parameters, see :class:`sam_kernels.Plan`.
        is_perturbed: whether a group takes part in the perturbation.
    """

    def __init__(
        self, geometry_of: Callable[[Group], Sequence[float | None]], is_perturbed: Callable[[Group], bool]
    ) -> None:
        self._geometry_of, self._is_perturbed = geometry_of, is_perturbed
        self._key: list[Any] | None = None
        self._unperturbed: list[int] = []
        self._snapshot: Snapshot | None = None
        self._points: dict[str, Plan] = {}
        self._without_geometry: Plan | None = None
        self.plan = Plan([])

    def update(self, groups: list[Group]) -> Plan:
        """The plan of all parameters of all groups, as they are now.

        Raises:
            StepOrderError: if they have changed while copies of the weights are held.
        """
        params = list(chain.from_iterable(group["params"] for group in groups))
        key = [(len(g["params"]), g.get("adaptive"), g.get("eta"), g.get("perturb")) for g in groups]
        if key == self._key and same_objects(params, self.plan.params) and not self.plan.has_moved:
            return self.plan
        if self.holds_copies:
            raise StepOrderError("parameters or their geometry were changed in the middle of a step")
        self.plan = Plan(
            params,
            [number for number, group in enumerate(groups) for _ in group["params"]],
            list(chain.from_iterable(self._geometry_of(group) for group in groups)),
            list(chain.from_iterable(names_of(number, group) for number, group in enumerate(groups))),
        )
        flags = [self._is_perturbed(group) for group in groups for _ in group["params"]]
        self._unperturbed = [index for index, perturbed in enumerate(flags) if not perturbed]
        self._snapshot, self._key = None, key
        self._points, self._without_geometry = {}, None
        return self.plan

    @property
    def without_geometry(self) -> Plan:
        """The plan with T = 1 everywhere."""
        if not self.plan.is_weighted:
            return self.plan
        if self._without_geometry is None:
            self._without_geometry = Plan(self.plan.params, self.plan.groups, names=self.plan.names)
        return self._without_geometry

    @property
    def snapshot(self) -> Snapshot:
        """Where the plan's weights are copied to; allocated when first needed."""
        if self._snapshot is None:
            self._snapshot = Snapshot(self.plan)
        return self._snapshot

    def point(self, name: str) -> tuple[Plan, Snapshot]:
        """Memory for other weights than the model's: its plan, and the model's weights as what to start from."""
        own = self._points.get(name)
        if own is None or own.layouts != self.plan.layouts:
            plan = self.plan
            own = Plan([layout.empty() for layout in plan.layouts], plan.groups, plan.geometry, plan.names)
            self._points[name] = own
        return own, Snapshot.of(own, self.plan.tensors)

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
