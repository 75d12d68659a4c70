"""The base optimizer's update: fused into the descent if the kernels know it, otherwise made by the base itself.

The state stays in the base optimizer under torch's own keys, so that checkpoints move to and from plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

import sam_kernels
from sam_kernels import LaunchReport, Plan, Snapshot
from sam_kernels.bases import KNOWN_CLASSES, Base, base_of, settings_of
from sam_kernels.host import gradients as gradients_of
from sam_kernels.host import inverse_of, is_set, lookup, missing, pick, same_objects
from sam_kernels.layouts import wide_dtype
from sam_kernels.registry import has_updates
from sam_kernels.rules import Fixed, RuleLike
from sam_kernels.scales import NUMBER, Scale

from .errors import InvalidSettingError
from .passes import Gradients
from .randomness import RandomState
from .recorded import Recorded
from .step_hooks import has_own_step, without_global_hooks, without_hooks

_FIXED = Fixed()

# Of each group, as the base's class in sam_kernels.bases has them.
Settings = list[Any]


class Descent(NamedTuple):
    """The arguments of one descent; see :func:`sam_kernels.descent_`.

    Attributes:
        is_kept: the method reads the gradients again afterwards, so a base that writes into them must get copies.
    """

    plan: Plan
    snapshot: Snapshot
    lists: Sequence[Gradients]
    rule: RuleLike
    scale: Scale
    grad_scale: Tensor | None
    found_inf: Tensor | None
    backend: str | None
    is_kept: bool = False

    @property
    def overflowed(self) -> bool:
        """Whether GradScaler has found the gradients infinite."""
        return is_set(self.found_inf)


class Outcome(NamedTuple):
    """What a descent did. A GPU is waited for only when the report or the flag is read."""

    report: LaunchReport
    found_inf: Tensor | None

    @property
    def updated(self) -> bool:
        """Whether the update was made. It may have been made with a gradient that is not finite, as in torch."""
        return self.report.finite is not False and not is_set(self.found_inf)

    @property
    def is_known(self) -> bool:
        """Whether :attr:`updated` is known without waiting for a GPU."""
        return self.report.is_known and (self.found_inf is None or self.found_inf.device.type == "cpu")


class BaseUpdate:
    """Makes the update that ends a step, with a given base optimizer.

    Args:
        has_masters: whether weights in bfloat16 and float16 have masters. Then their state is in float32 too, and the
            base must be one that the kernels know: others would update the weights and not the masters.
    """

    def __init__(self, base_optimizer: Optimizer, has_masters: bool = False) -> None:
        self.base_optimizer, self.has_masters = base_optimizer, has_masters
        self._fused_state = FusedState(base_optimizer, has_masters)

    def check_masters(self) -> None:
        """Raises :class:`InvalidSettingError` if there are masters and the base cannot update them."""
        if self.has_masters and self._fused_state.settings() is None:
            raise InvalidSettingError(
                f"master_weights needs a base_optimizer that the kernels know ({', '.join(KNOWN_CLASSES)}), not "
                "differentiable, with its own step() and with all settings but lr as numbers: other updates know "
                "nothing of masters"
            )

    def settings(self) -> Settings | None:
        """The settings of each group; None if the kernels do not know the base's class, or not with these settings."""
        return self._fused_state.settings()

    def fused_settings(self, plan: Plan, backend: str | None, by_base_itself: bool) -> Settings | None:
        """What the kernels need to make the update; None if the base's own ``step()`` makes it.

        Args:
            by_base_itself: do not fuse, unless there are masters.
        """
        self.check_masters()
        if self.has_masters or not (by_base_itself or not has_updates(plan, backend)):
            return self._fused_state.settings()
        return None

    def descend(self, descent: Descent, settings: Settings | None) -> Outcome:
        """Restores the weights and updates them.

        Before a fused update the base's pre-hooks have been run; otherwise its ``step()`` runs them.

        Args:
            settings: of :meth:`fused_settings`.
        """
        return self._by_base(descent) if settings is None else self._fused(descent, settings)

    def make_state(self, params: list[Tensor]) -> None:
        """Makes the state, as it is before any update, of parameters that have gradients and no state yet."""
        settings = self._fused_state.settings()
        if settings is not None:
            _, created = self._fused_state.prepare(params, gradients_of(params), settings)
            self._fused_state.commit(params, created)
        else:
            self.base_optimizer.step()

    def widen_state(self, saved: dict[Tensor, dict[str, Any]] | None = None) -> None:
        """If there are masters, see :meth:`FusedState.widen`."""
        if self.has_masters:
            self._fused_state.widen(saved)

    def look_ahead(
        self,
        plan: Plan,
        snapshot: Snapshot,
        gradients: Gradients,
        overflow: bool | Tensor,
        backend: str | None,
        params: list[Tensor] | None = None,
    ) -> None:
        """w <- base(copy of w, gradients) where a copy is held. The base's state and the copies stay as they are.

        After an overflow w <- copy of w.

        Args:
            params: the parameters whose state is used, for a fused base; by default those of the plan.
        """
        settings = self._fused_state.settings()
        if settings is not None:
            update, _ = self._fused_state.prepare(plan.params if params is None else params, gradients, settings)
            sam_kernels.look_ahead_(plan, [gradients], update, snapshot=snapshot, found_inf=overflow, backend=backend)
            return
        copies = bytes(snapshot.taken)
        sam_kernels.restore_(plan, snapshot, backend=backend)
        snapshot.taken[:] = copies
        if is_set(overflow):
            return
        base = self.base_optimizer
        before = Recorded(base, plan.params)
        draws = RandomState({param.device for param in plan.params}, before.generators)
        for param, gradient, held in zip(plan.params, gradients, copies, strict=True):
            # A copy: some bases write into gradients, and this one is kept until the end of the next step.
            param.grad = gradient.clone() if held and gradient is not None else None
        with without_hooks(base):
            base.step()
        for param in plan.params:
            param.grad = None
        before.put_back()
        draws.restore()

    def _fused(self, descent: Descent, settings: Settings) -> Outcome:
        base = self.base_optimizer
        params = descent.plan.params
        update, created = self._fused_state.prepare(params, _first_of(descent.lists), settings)
        report = sam_kernels.descent_(
            descent.plan,
            descent.lists,
            update,
            rule=descent.rule,
            scale=descent.scale,
            snapshot=descent.snapshot,
            grad_scale=descent.grad_scale,
            found_inf=descent.found_inf,
            backend=descent.backend,
        )
        outcome = Outcome(report, descent.found_inf)
        # New state is all zeros. After a skipped update it is no different from none, but for updates that tell the two
        # apart, as SGD's dampening does; only then is the outcome waited for.
        if created and ((not outcome.is_known and not self._fused_state.first_differs(settings)) or outcome.updated):
            self._fused_state.commit(params, created)
        # A scheduler on the base checks whether the base has stepped; it has.
        base._opt_called = True  # type: ignore[attr-defined]
        return outcome

    def _by_base(self, descent: Descent) -> Outcome:
        """Restores, puts the combined gradient into ``p.grad`` and calls ``base.step()``."""
        plan, snapshot, lists, rule = descent.plan, descent.snapshot, descent.lists, descent.rule
        plain = rule == _FIXED
        report = LaunchReport.without_gram(len(lists))
        skip = descent.overflowed
        if snapshot.is_taken:
            sam_kernels.check_memory(plan, lists, snapshot=snapshot, backend=descent.backend)
        if not skip and not plain:
            report = sam_kernels.apply_rule(rule, lists, plan, backend=descent.backend)
            skip = not report.finite
        in_place = plain and descent.scale == 1.0 and descent.grad_scale is None and not descent.is_kept
        if not skip and not (in_place and len(lists) == 1 and same_objects(lists[0], gradients_of(plan.params))):
            _combine_into_grad(descent, report.coefficients * inverse_of(descent.grad_scale))
        copies = bytes(snapshot.taken)
        sam_kernels.restore_(plan, snapshot, backend=descent.backend)
        outcome = Outcome(report, descent.found_inf)
        if skip:
            return outcome
        # The copies stay valid until the base has finished, so that its exceptions leave the weights as they were.
        snapshot.taken[:] = copies
        try:
            with without_global_hooks():
                self.base_optimizer.step()
        except Exception as error:
            error.add_note(
                f"This came from the step() of the base optimizer, {type(self.base_optimizer).__name__}, which made "
                "the update. A base that asks for more than p.grad (a closure, second derivatives) cannot serve."
            )
            raise
        snapshot.discard()
        return outcome


class FusedState:
    """The settings and state tensors of a base optimizer that the kernels know, in the form that they take."""

    def __init__(self, base_optimizer: Optimizer, has_masters: bool = False) -> None:
        self.base_optimizer, self._has_masters = base_optimizer, has_masters
        self._base = base_of(type(base_optimizer))
        self._needed: list[tuple[int, ...]] | None = None
        self._keys_of: list[set[str]] = []
        self._keys: list[str] = []
        self._params: list[Tensor] = []
        self._values: list[Any] = []
        self._states: list[dict[str, Any]] = []

    def settings(self) -> Settings | None:
        """The settings of each group; None if the base's class or these settings have no fused form."""
        if self._base is None or has_own_step(self.base_optimizer):
            return None
        return settings_of(self.base_optimizer)

    def prepare(
        self, params: list[Tensor], gradients: Gradients, settings: Settings
    ) -> tuple[Base, dict[int, dict[str, Any]]]:
        """The base for one descent, and the state it creates for parameters that have none yet.

        Once the update has been made, :meth:`commit` puts the second result into the base optimizer.
        """
        base = self._base
        assert base is not None
        states = self._states_of(params)
        groups = self.base_optimizer.param_groups
        needed = [base.states(own) for own in settings]
        if needed != self._needed:
            self._choose_keys(base, needed)
        keys_of = self._keys_of
        columns = {key: lookup(states, key) for key in self._keys}
        created: dict[int, dict[str, Any]] = {}
        own: dict[int, dict[str, Any]] = {}  # a parameter that stands twice in the list has one state
        group_of = None
        for key, column in columns.items():
            for index in missing(column):
                if gradients[index] is None:
                    continue
                if group_of is None:
                    group_of = [number for number, g in enumerate(groups) for _ in g["params"]]
                if key not in keys_of[group_of[index]]:
                    continue
                entries = created[index] = own.setdefault(id(params[index]), {})
                if key not in entries:
                    new_step = key == "step"
                    entries[key] = (
                        _new_step(params[index], groups[group_of[index]]) if new_step else self._zeros(params[index])
                    )
                column[index] = entries[key]
        more: dict[str, Any] = {}
        if base.marks_first:
            more["first"] = bytearray(len(params))
            for index in created:
                more["first"][index] = 1
        return base(settings, **columns, **more), created  # type: ignore[call-arg]

    def _choose_keys(self, base: type[Base], needed: list[tuple[int, ...]]) -> None:
        """The keys of the state that each group needs, and of all together."""
        self._needed = needed
        steps = ["step"] if base.counts_steps else []
        self._keys_of = [{*(base.state_keys[number] for number in own), *steps} for own in needed]
        self._keys = [key for key in (*base.state_keys, *steps) if any(key in own for own in self._keys_of)]

    def first_differs(self, settings: Settings) -> bool:
        """Whether the updates of some group treat new state differently from zeros."""
        base = self._base
        return base is not None and any(base.first_differs(own) for own in settings)

    def commit(self, params: list[Tensor], created: dict[int, dict[str, Any]]) -> None:
        for index, entries in created.items():
            self.base_optimizer.state[params[index]].update(entries)

    def _states_of(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """Each parameter's state. Hashing a tensor is slow, so the look-up is repeated only if a state was replaced."""
        state = self.base_optimizer.state
        values = list(state.values())
        if not (same_objects(values, self._values) and same_objects(params, self._params)):
            self._states = [state.get(p, {}) for p in params]
            self._values, self._params = values, list(params)
        return self._states

    def _zeros(self, param: Tensor) -> Tensor:
        dtype = wide_dtype(param.dtype) if self._has_masters else param.dtype
        return torch.zeros_like(param, dtype=dtype, requires_grad=False)

    def widen(self, saved: dict[Tensor, dict[str, Any]] | None = None) -> None:
        """Converts the state of weights that have masters to the masters' type.

        Args:
            saved: the state to convert; when torch loads state, it rounds it to its parameter's type.
        """
        state = self.base_optimizer.state
        for param, entries in (state if saved is None else saved).items():
            dtype = wide_dtype(param.dtype)
            if dtype == param.dtype or param not in state:
                continue
            for key, value in entries.items():
                if key != "step" and isinstance(value, Tensor) and value.is_floating_point():
                    state[param][key] = value.detach().to(device=param.device, dtype=dtype, copy=saved is not None)


def combined_gradient(
    plan: Plan,
    lists: Sequence[Gradients],
    rule: RuleLike,
    scale: Scale,
    backend: str | None,
    grad_scale: Tensor | None = None,
) -> Gradients | None:
    """sum_i scale_i c_i x_i / grad_scale in new tensors, None where no list has an entry.

    The result is None if the rule needs a Gram matrix that is not finite; to know this waits for the GPU.
    """
    coefficients = torch.ones(len(lists), dtype=torch.float64, device="cpu")
    if rule != _FIXED:
        report = sam_kernels.apply_rule(rule, lists, plan, backend=backend)
        if not report.finite:
            return None
        coefficients = report.coefficients
    if grad_scale is not None:
        coefficients = coefficients.to(grad_scale.device) * grad_scale.double().reciprocal()
    out: Gradients = [None] * len(plan)
    for index, tensor in _combine(plan, lists, coefficients, scale, backend):
        out[index] = tensor
    return out


def added(total: Gradients | None, gradients: Gradients, factor: float, backend: str | None) -> Gradients:
    """total + factor * gradients, in place if there is a total."""
    total = [None] * len(gradients) if total is None else total
    present = [i for i, gradient in enumerate(gradients) if gradient is not None]
    for i in present:
        if total[i] is None:
            total[i] = torch.zeros_like(gradients[i])  # type: ignore[arg-type]
    out = pick(total, present)
    if out:
        sam_kernels.combine_(out, [out, pick(gradients, present)], [1.0, factor], backend=backend)
    return total


def _combine_into_grad(descent: Descent, coefficients: Tensor) -> None:
    """p.grad <- sum_i c_i x_i, or None for a parameter without a gradient in any list."""
    combined = dict(_combine(descent.plan, descent.lists, coefficients, descent.scale, descent.backend))
    for index, param in enumerate(descent.plan.params):
        param.grad = combined.get(index)


def _combine(
    plan: Plan, lists: Sequence[Gradients], coefficients: Tensor, scale: Scale, backend: str | None
) -> list[tuple[int, Tensor]]:
    """New tensors with sum_i c_i x_i, and the indices of their parameters."""
    index = [i for i, entry in enumerate(_first_of(lists)) if entry is not None]
    out = Plan([torch.empty_like(plan.params[i], requires_grad=False) for i in index], pick(plan.groups, index))
    scale = scale if isinstance(scale, NUMBER) else scale[: out.group_count]
    sam_kernels.combine_(out, [pick(x, index) for x in lists], coefficients, scale=scale, backend=backend)
    return list(zip(index, out.params, strict=True))


def _new_step(param: Tensor, group: dict[str, Any]) -> Tensor:
    """A step count as torch would make it: on the device, in float32, only in ``capturable`` and ``fused`` groups."""
    if group.get("capturable") or group.get("fused"):
        return torch.zeros((), dtype=torch.float32, device=param.device)
    # torch keeps it in the default dtype; float64 only if that is float64.
    double = torch.get_default_dtype() == torch.float64
    return torch.zeros((), dtype=torch.float64 if double else torch.float32, device="cpu")


def _first_of(lists: Sequence[Gradients]) -> Gradients:
    """For each parameter the first gradient that some list has of it; None if no list has one."""
    if len(lists) == 1:
        return lists[0]
    return [next((x for x in entries if x is not None), None) for entries in zip(*lists, strict=True)]
