"""The optimizer that all methods share: groups, state, the drivers of a step, and safety.

A method is a generator of gradient passes (:meth:`SharpnessAwareOptimizer.passes`); everything here serves to run it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

import sam_kernels
from sam_kernels import LaunchReport, Plan, Snapshot
from sam_kernels.host import gradients as gradients_of
from sam_kernels.host import missing, pick, same_objects
from sam_kernels.ops import Scale
from sam_kernels.rules import Fixed, RuleLike

from .base_update import FusedUpdate
from .errors import InvalidSettingError, StepOrderError
from .passes import Gradients, Pass, Passes
from .randomness import RandomState

ClosureRuns = Literal["second_pass", "every_pass"]
Closure = Callable[[], Any]
BaseOptimizer = Optimizer | Callable[..., Optimizer]

_FIXED = Fixed()


class StepReport(NamedTuple):
    """What the last step did. Nothing in it is computed unless read.

    Attributes:
        ascent: scalars of the perturbation: norms, coefficients, and ``finite``, False if the gradient was not finite
            and the weights were therefore left unperturbed.
        descent: scalars of the update; None before it.
        updated: whether the base optimizer's update was made. False after an overflow that GradScaler found, or where
            the gradients of the descent were needed in a Gram matrix and were not finite.
    """

    ascent: LaunchReport | None = None
    descent: LaunchReport | None = None
    updated: bool = False


class _Run(NamedTuple):
    """A begun step: the method's generator and the pass it waits for."""

    passes: Passes
    waiting: Pass
    number: int  # of the pass, from 1


class SharpnessAwareOptimizer(Optimizer):
    """Base class of the methods.

    Args:
        params: parameters, (name, parameter) pairs or group dicts, as for any torch optimizer.
        base_optimizer: a class or factory, called as ``base_optimizer(params, **base_kwargs)``, or an instance, whose
            groups are then used as they are. ``torch.optim.SGD``, ``Adam`` and ``AdamW`` are fused into the last pass
            over the weights; any other runs by its own ``step()`` after the weights have been restored.
        method_defaults: default of each setting that this method keeps in the groups.
        closure_runs: what ``step(closure)`` calls its closure for. ``"second_pass"``, the custom of SAM classes: the
            first gradient is already in ``p.grad``. ``"every_pass"``, as in L-BFGS: the closure is called once for
            each pass, each time with the same random state.
        backend: name of the kernels' backend; by default the best there is.
        **base_kwargs: of the base optimizer's class.

    Attributes:
        base_optimizer: the base; ``param_groups`` and ``state`` are its own.
        last_step: a :class:`StepReport`.

    Raises:
        InvalidSettingError: for a setting out of range.
        TypeError: for a base that cannot serve, or keywords with an instance.
    """

    # GradScaler.step then hands the gradient's scale to step() and leaves unscaling and skipping to it.
    _step_supports_amp_scaling = True

    base_optimizer: Optimizer

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        method_defaults: dict[str, Any],
        *,
        closure_runs: ClosureRuns = "second_pass",
        backend: str | None = None,
        **base_kwargs: Any,
    ) -> None:
        if closure_runs not in ("second_pass", "every_pass"):
            raise InvalidSettingError(f"Invalid closure_runs: {closure_runs!r}; it is 'second_pass' or 'every_pass'")
        base = _make_base(params, base_optimizer, base_kwargs)
        groups, state = base.param_groups, base.state
        for group in groups:
            self._complete_group(group, method_defaults)

        self.base_optimizer = base
        self.closure_runs = closure_runs
        self.backend = backend
        self._method_defaults = dict(method_defaults)
        self._reset_caches()
        # torch's constructor sets up hooks and profiling, and empties groups and state, which are the base's own.
        super().__init__([{"params": []}], {})
        base.param_groups, base.state = groups, state

    # ------------------------------------------------------------------ the method

    @abstractmethod
    def passes(self) -> Passes:
        """One step of the method: yields :class:`Pass` objects and is sent their gradients."""

    def validate_group(self, group: dict[str, Any]) -> None:
        """Raises :class:`InvalidSettingError` if a group's settings are out of range."""

    def geometry_of(self, group: dict[str, Any]) -> Sequence[float | None]:
        """For each parameter of a group None for T = 1, or eta for T(w) = |w| + eta."""
        return [None] * len(group["params"])

    def is_perturbed_group(self, group: dict[str, Any]) -> bool:
        """Whether a group takes part in the perturbation and in its norm."""
        return bool(group.get("perturb", True))

    # ------------------------------------------------------------------ moves of a method

    def ascend(self, *lists: Gradients, rule: RuleLike, scale: Scale = 1.0) -> None:
        """Perturbs the weights along a combination of gradient lists, keeping their copies."""
        plan: Plan = self._container["plan"]
        xs = [self._perturbed_only(x) for x in lists]
        ascent = sam_kernels.ascent_(
            plan, xs, rule=rule, scale=scale, snapshot=self._current_snapshot(plan), backend=self.backend
        )
        self._container["report"] = StepReport(ascent)

    def descend(self, *lists: Gradients, rule: RuleLike = _FIXED, scale: Scale = 1.0) -> None:
        """Restores the weights and updates them by the base optimizer with a combination of gradient lists."""
        plan: Plan = self._container["plan"]
        snapshot = self._current_snapshot(plan)
        grad_scale, found_inf = self._amp_scaling()
        if not self._is_plain_step() and FusedUpdate.supports(self.base_optimizer):
            report, updated = self._fused_descent(plan, snapshot, lists, rule, scale, grad_scale, found_inf)
        else:
            report, updated = self._descent_by_base(plan, snapshot, lists, rule, scale, grad_scale, found_inf)
        last: StepReport = self._container["report"]
        self._container["report"] = last._replace(descent=report, updated=updated)

    def _fused_descent(
        self,
        plan: Plan,
        snapshot: Snapshot,
        lists: Sequence[Gradients],
        rule: RuleLike,
        scale: Scale,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> tuple[LaunchReport, bool]:
        base = self.base_optimizer
        fused: FusedUpdate = self._container["fused"]
        for hook in list(base._optimizer_step_pre_hooks.values()):
            hook(base, (), {})
        update, created = fused.prepare(plan.params, _first_of(lists))
        report = sam_kernels.descent_(
            plan,
            lists,
            update,
            rule=rule,
            scale=scale,
            snapshot=snapshot,
            grad_scale=grad_scale,
            found_inf=found_inf,
            backend=self.backend,
        )
        updated = report.finite and (found_inf is None or not bool(found_inf))
        if updated and created:
            fused.commit(plan.params, created)
        # A scheduler on the base asks whether the base has stepped; it has.
        base._opt_called = True  # type: ignore[attr-defined]
        for post_hook in list(base._optimizer_step_post_hooks.values()):
            post_hook(base, (), {})
        return report, updated

    def _descent_by_base(
        self,
        plan: Plan,
        snapshot: Snapshot,
        lists: Sequence[Gradients],
        rule: RuleLike,
        scale: Scale,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> tuple[LaunchReport, bool]:
        """For bases without a fused form: restore, put the combined gradient into ``p.grad``, ``base.step()``."""
        report = LaunchReport(True, [math.nan] * len(lists) ** 2, [1.0] * len(lists))
        skip = found_inf is not None and bool(found_inf)
        if not skip and rule != _FIXED:
            gram = sam_kernels.gram(lists, plan, backend=self.backend)
            finite = bool(gram.isfinite().all())
            report = LaunchReport(finite, gram, torch.as_tensor(rule(gram)) if finite else [0.0] * len(lists))
            skip = not finite
        in_place = rule == _FIXED and scale == 1.0 and grad_scale is None and len(lists) == 1
        if not skip and not (in_place and same_objects(lists[0], gradients_of(plan.params))):
            inverse = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
            self._combine_into_grad(plan, lists, report.coefficients * inverse, scale)
        copies = bytes(snapshot.taken)
        sam_kernels.restore_(plan, snapshot, backend=self.backend)
        if skip:
            return report, False
        # The copies stay valid until the base is through, so that its exceptions leave the weights as they were.
        snapshot.taken[:] = copies
        self.base_optimizer.step()
        snapshot.discard()
        return report, True

    def _combine_into_grad(
        self, plan: Plan, lists: Sequence[Gradients], coefficients: Tensor, scale: Scale
    ) -> None:
        """p.grad <- sum_i c_i x_i for every parameter that has a gradient in some list."""
        index = [i for i, entry in enumerate(_first_of(lists)) if entry is not None]
        out = Plan([torch.empty_like(plan.params[i], requires_grad=False) for i in index], pick(plan.groups, index))
        scale = scale if isinstance(scale, (int, float)) else scale[: out.group_count]
        sam_kernels.combine_(out, [pick(x, index) for x in lists], coefficients, scale=scale, backend=self.backend)
        for i, combined in zip(index, out.params, strict=True):
            plan.params[i].grad = combined

    def _is_plain_step(self) -> bool:
        """Whether this step is the base's own, bit for bit, and must therefore be made by the base itself."""
        return False

    # ------------------------------------------------------------------ drivers

    def advance(self, zero_grad: bool = False) -> Pass | None:
        """Hands ``p.grad`` to the method as the gradient it waits for; begins a step if none is begun.

        Args:
            zero_grad: clear the gradients afterwards.

        Returns:
            The pass whose gradient the method wants next, or None if the step is complete.
        """
        try:
            run = self._container["run"] or self._begin()
            gradients = gradients_of(self._current_plan().params)
            if len(missing(gradients)) == len(gradients):
                raise StepOrderError(
                    f"no parameter has a gradient for pass {run.number}: call loss.backward() first. (A closure that "
                    "runs all passes itself needs closure_runs='every_pass'.)"
                )
            try:
                waiting = run.passes.send(gradients)
            except StopIteration:
                self._container["run"] = None
                waiting = None
            else:
                self._container["run"] = _Run(run.passes, waiting, run.number + 1)
        except BaseException:
            self.restore()
            raise
        if zero_grad:
            self.zero_grad()
        return waiting

    def first_step(self, zero_grad: bool = False) -> None:
        """Perturbs the weights along the gradient in ``p.grad``.

        With GradScaler the gradient may stay scaled: the perturbation does not depend on the scale.

        Raises:
            StepOrderError: if a step is already begun (the weights are then restored), or there is no gradient.
        """
        if self.is_step_begun:
            self.restore()
            raise StepOrderError(
                "first_step() was called although a step was begun and not completed. The weights have been restored to "
                "what they were before that step; clear the gradients and begin again. After an exception in the "
                "second pass, call restore(), or run that pass within restore_on_error()."
            )
        self.advance(zero_grad)

    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and updates them with the gradient in ``p.grad``; runs hooks as ``step()`` does.

        Raises:
            StepOrderError: if no step is begun.
        """
        if not self.is_step_begun:
            raise StepOrderError("second_step() was called without first_step()")
        self.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Closure | None = None, *, closure_runs: ClosureRuns | None = None) -> Any:  # type: ignore[override]
        """Makes or completes a step.

        Args:
            closure: clears nothing, runs forward and backward, and returns the loss. Which passes it runs is said by
                ``closure_runs``. None completes a step begun with ``first_step``; this is how GradScaler calls it.
            closure_runs: overrides the constructor's.

        Returns:
            What the closure returned: for its only pass, or for the first of several (the loss at the weights
            themselves). None without a closure.

        Raises:
            StepOrderError: without closure if no step is begun or passes are missing; with a closure that cannot run
                again, or under GradScaler. Whatever is raised, also by the closure, the weights are then as they were
                before the step.
        """
        if closure is None:
            self._finish()
            return None
        if hasattr(self, "found_inf") or hasattr(self, "grad_scale"):
            self._forget_amp_scaling()
            self.restore()
            raise StepOrderError(
                "a closure cannot be used with GradScaler.step, which would see its scaled gradients too late. Call "
                "backward and first_step(), backward again, then scaler.step(optimizer)."
            )
        try:
            return self._run_closure(closure, closure_runs or self.closure_runs)
        except BaseException:
            self.restore()
            raise

    def _run_closure(self, closure: Closure, closure_runs: ClosureRuns) -> Any:
        random_state = RandomState(param.device for param in self._current_plan().params)
        losses = []
        run = self._container["run"]
        if run is not None:
            waiting: Pass | None = run.waiting
        elif closure_runs == "every_pass":
            waiting = self._begin().waiting
        else:
            waiting = self.advance(zero_grad=True)
        while waiting is not None:
            if losses:
                self.zero_grad()
                if waiting.perturbed:
                    random_state.restore()
            losses.append(_call(closure))
            waiting = self.advance()
        return losses[0] if losses else None

    def _begin(self) -> _Run:
        self._container["report"] = StepReport()
        passes = self.passes()
        run = _Run(passes, next(passes), 1)
        self._container["run"] = run
        return run

    def _finish(self) -> None:
        run: _Run | None = self._container["run"]
        if run is None:
            self._forget_amp_scaling()
            raise StepOrderError(
                "step() without a closure completes a step, and none is begun. Call first_step() after the first "
                "backward and step() or second_step() after the second, or pass a closure."
            )
        if self.advance() is not None:
            self._forget_amp_scaling()
            self.restore()
            raise StepOrderError(f"step() was called after pass {run.number}, but the method needs more; use advance()")

    # ------------------------------------------------------------------ safety

    @property
    def is_step_begun(self) -> bool:
        """Whether a step is under way; the weights may be perturbed then."""
        return self._container["run"] is not None

    @property
    def waiting(self) -> Pass | None:
        """The pass whose gradient the step under way waits for; None between steps."""
        run: _Run | None = self._container["run"]
        return None if run is None else run.waiting

    @property
    def last_step(self) -> StepReport:
        """What the last step, or the one under way, did."""
        report: StepReport = self._container["report"]
        return report

    def restore(self) -> None:
        """Abandons a step under way: the weights are as they were before it, bit for bit. Otherwise does nothing."""
        run: _Run | None = self._container["run"]
        self._container["run"] = None
        if run is not None:
            run.passes.close()
        snapshot: Snapshot | None = self._container["snapshot"]
        if snapshot is not None and snapshot.is_taken:
            sam_kernels.restore_(self._container["plan"], snapshot, backend=self.backend)

    @contextmanager
    def restore_on_error(self) -> Iterator[None]:
        """For passes driven by hand: calls :meth:`restore` if the body raises."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def _refuse_mid_step(self, action: str) -> None:
        if self.is_step_begun:
            raise StepOrderError(
                f"{action} in the middle of a step, while the weights are perturbed; complete it with second_step() or "
                "abandon it with restore() first"
            )

    def _amp_scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """GradScaler's scale and overflow flag, which it sets as attributes around step()."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    def _forget_amp_scaling(self) -> None:
        """GradScaler removes its attributes only if step() returns; a later step must not find them."""
        self.__dict__.pop("grad_scale", None)
        self.__dict__.pop("found_inf", None)

    # ------------------------------------------------------------------ groups and state

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's groups, with this method's settings added."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Defaults of the base optimizer and of the method."""
        return {**self.base_optimizer.defaults, **self._method_defaults}

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        pass

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer, with this method's defaults where it does not say otherwise."""
        self._refuse_mid_step("add_param_group() was called")
        self._complete_group(param_group, self._method_defaults)
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Base and method state, loadable by the plain base optimizer too. The perturbation is never part of it.

        Raises:
            StepOrderError: in the middle of a step.
        """
        self._refuse_mid_step("state_dict() was called")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer or of the plain base optimizer.

        Settings of the method that it lacks stay as they are.

        Raises:
            StepOrderError: in the middle of a step.
        """
        self._refuse_mid_step("load_state_dict() was called")
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        own_keys = [*self._method_defaults, "initial_rho"]
        # A different number of groups is left to torch to complain of.
        pairs = zip(state_dict["param_groups"], self.param_groups, strict=False)
        merged = [{**{k: own[k] for k in own_keys if k in own}, **saved} for saved, own in pairs]
        merged += state_dict["param_groups"][len(merged) :]
        self.base_optimizer.load_state_dict({**state_dict, "param_groups": merged})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_mid_step("the optimizer was copied or pickled")
        dropped = ("_container", "step", "grad_scale", "found_inf")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset_caches()

    def _complete_group(self, group: dict[str, Any], defaults: dict[str, Any]) -> None:
        for key, value in defaults.items():
            group.setdefault(key, value)
        self.validate_group(group)

    def _reset_caches(self) -> None:
        # In a container, because some wrappers of optimizers swallow the writing of attributes.
        self._container: dict[str, Any] = {
            "run": None,
            "report": StepReport(),
            "plan": None,
            "plan_key": None,
            "snapshot": None,
            "unperturbed": [],
            "fused": FusedUpdate(self.base_optimizer),
        }

    # ------------------------------------------------------------------ plan

    def _current_plan(self) -> Plan:
        """The kernels' plan of all parameters, made anew if parameters or their geometry have changed."""
        groups = self.param_groups
        plan: Plan | None = self._container["plan"]
        params = list(chain.from_iterable(group["params"] for group in groups))
        key = [self._plan_key(group) for group in groups]
        if plan is not None and key == self._container["plan_key"] and same_objects(params, plan.params):
            return plan
        self._refuse_replanning()
        names = list(chain.from_iterable(_names(number, group) for number, group in enumerate(groups)))
        plan = Plan(
            params,
            [number for number, group in enumerate(groups) for _ in group["params"]],
            list(chain.from_iterable(self.geometry_of(group) for group in groups)),
            names,
        )
        flags = [self.is_perturbed_group(group) for group in groups for _ in group["params"]]
        unperturbed = [index for index, perturbed in enumerate(flags) if not perturbed]
        self._container.update(plan=plan, plan_key=key, snapshot=None, unperturbed=unperturbed)
        return plan

    def _plan_key(self, group: dict[str, Any]) -> Any:
        """Settings of a group that the plan depends on."""
        return len(group["params"]), group.get("adaptive"), group.get("eta"), group.get("perturb")

    def _refuse_replanning(self) -> None:
        snapshot: Snapshot | None = self._container["snapshot"]
        if snapshot is not None and snapshot.is_taken:
            raise StepOrderError("parameters or their geometry were changed in the middle of a step")

    def _current_snapshot(self, plan: Plan) -> Snapshot:
        snapshot: Snapshot | None = self._container["snapshot"]
        if snapshot is None:
            snapshot = self._container["snapshot"] = Snapshot(plan)
        return snapshot

    def _perturbed_only(self, gradients: Gradients) -> Gradients:
        unperturbed: list[int] = self._container["unperturbed"]
        if not unperturbed:
            return gradients
        chosen = list(gradients)
        for index in unperturbed:
            chosen[index] = None
        return chosen


def _make_base(params: Any, base_optimizer: BaseOptimizer, base_kwargs: dict[str, Any]) -> Optimizer:
    if isinstance(base_optimizer, Optimizer):
        if base_kwargs:
            raise TypeError(
                f"base_optimizer is an instance, so {', '.join(base_kwargs)} cannot be set here; set them where it is made"
            )
        base = base_optimizer
        wanted = {id(p) for p in _tensors(params)}
        held = {id(p) for group in base.param_groups for p in group["params"]}
        if wanted != held:
            raise InvalidSettingError("base_optimizer is an instance that holds other parameters than params")
    elif callable(base_optimizer):
        base = base_optimizer(params, **base_kwargs)
    else:
        raise TypeError(f"base_optimizer must be an optimizer class or instance, got {base_optimizer!r}")
    if not hasattr(base, "param_groups") or not hasattr(base, "step"):
        raise TypeError(f"base_optimizer made a {type(base).__name__}, which is no optimizer")
    if isinstance(base, SharpnessAwareOptimizer):
        raise TypeError("base_optimizer is itself sharpness-aware; pass its base instead")
    if isinstance(base, torch.optim.LBFGS):
        raise TypeError("LBFGS cannot be a base optimizer: it evaluates gradients of its own within a step")
    return base


def _tensors(params: Any) -> Iterable[Tensor]:
    """The tensors of any form of ``params`` that torch takes."""
    for entry in [params] if isinstance(params, Tensor) else params:
        if isinstance(entry, dict):
            yield from _tensors(entry["params"])
        else:
            yield entry[1] if isinstance(entry, tuple) else entry


def _names(number: int, group: dict[str, Any]) -> list[str]:
    names = group.get("param_names")
    return list(names) if names else [f"parameter {i} of group {number}" for i in range(len(group["params"]))]


def _first_of(lists: Sequence[Gradients]) -> Gradients:
    """For each parameter some gradient of it, None if no list has one."""
    if len(lists) == 1:
        return lists[0]
    return [next((x for x in entries if x is not None), None) for entries in zip(*lists, strict=True)]


def _call(closure: Closure) -> Any:
    try:
        with torch.enable_grad():
            return closure()
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise StepOrderError(
                "the closure went backward through the graph a second time. Each pass is taken at other weights, so the "
                "closure must run the forward pass again: put loss = loss_fn(model(x), y) inside it."
            ) from error
        raise
