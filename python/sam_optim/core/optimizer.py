"""The optimizer that all methods share: groups, state, the drivers of a step, and safety.

A method is a generator of gradient passes (:meth:`SharpnessAwareOptimizer.passes`); everything here serves to run it.
"""

from __future__ import annotations

import inspect
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal, TypeVar, get_args, overload
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sam_kernels.host import gradients as gradients_of
from sam_kernels.host import missing
from sam_kernels.registry import backend_named

from .base_update import BaseUpdate
from .compiling import prepare, untraced
from .construction import WRAP_AROUND, BaseOptimizer, defaults_of, make_base, takes_single_samples
from .errors import InvalidSettingError, StepOrderError
from .kept import KeptState
from .moves import StepReport
from .passes import MEMORY, PREVIOUS, TRAIN, VALIDATION, BegunStep, Pass, Passes, PassGroup, Update
from .planning import PlanCache
from .randomness import Draws
from .settings import check_choice, radius
from .step_hooks import runs_its_own_hooks
from .trainers_closures import accumulated_by, clips_each_pass
from .updates import Updates
from .watching import UnperturbedEntries

ClosureRuns = Literal["second_pass", "every_pass"]
Closure = Callable[[], Any]
Loss = TypeVar("Loss")


_STALE_GRAPH = (
    "the closure went backward through the graph of an earlier pass. Each pass is taken at other weights, so the "
    "closure must run the forward pass again: put loss = loss_fn(model(x), y) inside it."
)
_UNDECLARED = (
    "its class does not say takes_scaled_gradients = True beside passes(), as a method may where gradients of another "
    "scale make the same perturbation, an update of that scale, and nothing else"
)
_PROMISES: dict[str, Any] = {
    "takes_scaled_gradients": False,
    "is_capturable": False,
    "perturbs_micro_batches": False,
    "plain_steps_take_one_pass": False,
    "_scaling_obstacle": _UNDECLARED,
}


# Optimizers in the middle of a step; mostly none.
_under_way: WeakSet[SharpnessAwareOptimizer] = WeakSet()


class SharpnessAwareOptimizer(Updates):
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
        master_weights: keep float32 masters of weights in bfloat16 and float16, and the base optimizer's state in
            float32. Weights so coarse lose most of a perturbation and of a small update; with masters the model holds
            the roundings of w and of w + e. The masters take the place of the copies that a perturbation needs
            otherwise. For ``SGD``, ``Adam`` and ``AdamW``; part of ``state_dict()``.
        process_group: of the ranks that hold other parameters of the same model, as plain tensors: the stages of a
            pipeline, experts, parts that are not DTensors. Norms and products are then of all their parameters
            together, and all of them have to make the same steps. DTensors and replicas need nothing.
        counts_in_norm: for a parameter, whether this rank counts it in those sums; by default all are counted. Of a
            parameter that several ranks of the group hold, one has to.
        **base_kwargs: of the base optimizer's class.

    Attributes:
        base_optimizer: the base; ``param_groups`` and ``state`` are its own.
        last_step: a :class:`StepReport`.
        generators: random generators of the program's own from which passes draw, see :class:`RandomState`; to be set.
            What runs a step's passes (closures, ``TrainStep``, the glue for trainers) lets them draw alike, as it does
            with the global ones. They are not copied or saved with the optimizer.

    Raises:
        InvalidSettingError: for a setting out of range, and for a group's key that would do nothing.
        ValueError, BackendUnavailableError: for a backend that there is not.
        TypeError: for a base that cannot serve, keywords with an instance, or a keyword that nobody knows.
    """

    # GradScaler.step then hands the gradient's scale to step() and leaves unscaling and skipping to it.
    _step_supports_amp_scaling = True

    # Whether passes on the batch of the step before are asked for.
    uses_previous_batch = False

    # Whether passes() yields passes together, which a driver may run side by side.
    yields_passes_together = False

    # What passes() promises. Each holds for the passes() that it is declared with, or after; see __init_subclass__.

    # GradScaler may be used: gradients c times as large, in all passes of a step, make the perturbation that they would
    # make without c and an update c times as large, and nothing that is kept from step to step depends on c.
    takes_scaled_gradients: bool = False

    # Every step makes the same moves, so that one can be recorded and replayed for all.
    is_capturable: bool = False

    # Micro-batches may be perturbed each along its own gradient, one step of the method for each.
    perturbs_micro_batches: bool = False

    # A step with radius 0 in all groups does nothing but the base's update with the gradient at w, so that this one
    # gradient is enough for drivers that ask how many passes there are. Whoever keeps averages cannot promise it.
    plain_steps_take_one_pass: bool = False

    # Why GradScaler may not be used.
    _scaling_obstacle = _UNDECLARED

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Promises of a class hold for its own ``passes()``, not for one that a class derived from it puts in place."""
        super().__init_subclass__(**kwargs)
        owners = cls.__mro__
        passes = next(number for number, owner in enumerate(owners) if "passes" in vars(owner))
        for name, value in _PROMISES.items():
            declared = next(number for number, owner in enumerate(owners) if name in vars(owner))
            if declared > passes:
                setattr(cls, name, value)

    generators: Sequence[Any] = ()

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        method_defaults: dict[str, Any],
        *,
        closure_runs: ClosureRuns = "second_pass",
        backend: str | None = None,
        master_weights: bool = False,
        process_group: Any = None,
        counts_in_norm: Callable[[Tensor], bool] | None = None,
        **base_kwargs: Any,
    ) -> None:
        check_choice("closure_runs", closure_runs, get_args(ClosureRuns))
        check_choice("master_weights", master_weights, [False, True])
        if backend is not None:
            backend_named(backend)
        if counts_in_norm is not None and not callable(counts_in_norm):
            raise InvalidSettingError(f"Invalid counts_in_norm: {counts_in_norm!r}; it is a function of a parameter")
        if counts_in_norm is not None and process_group is None:
            raise InvalidSettingError("counts_in_norm says nothing without a process_group")
        base = make_base(params, base_optimizer, base_kwargs, type(self))
        shared = sorted(set(defaults_of(base)) & set(method_defaults))
        if shared:
            raise InvalidSettingError(
                f"{type(base).__name__} cannot be the base optimizer: it keeps {', '.join(shared)} in its groups, "
                f"where {type(self).__name__} has a setting of that name"
            )
        prepare()
        self._method_defaults = dict(method_defaults)
        self._given_defaults = dict(getattr(base, "defaults", {}))
        vars(self)["base_optimizer"] = base
        for group in base.param_groups:
            self._complete_group(group, method_defaults)

        self.closure_runs = closure_runs
        self.backend = backend
        self.master_weights = master_weights
        self.process_group = process_group
        self.counts_in_norm = counts_in_norm
        self._reset_caches()
        update: BaseUpdate = self._container["update"]
        update.check_masters()
        update.widen_state()
        # torch's constructor sets up hooks and profiling. It also empties groups and state, which are the base's own,
        # and adds a group, which makes some bases share their parameters out anew.
        vars(self)["base_optimizer"] = SimpleNamespace(defaults={}, add_param_group=lambda group: None)
        super().__init__([{"params": []}], {**self._given_defaults, **method_defaults})
        vars(self)["base_optimizer"] = base
        self._watch_base()

    # ------------------------------------------------------------------ the method

    @abstractmethod
    def passes(self) -> Passes:
        """One step of the method: yields :class:`Pass` objects and is sent their gradients, and yields its update."""

    def radii(self, setting: str = "rho") -> list[list[float | Tensor]]:
        """Each group's radius, as :meth:`ascend` takes it for its scale with one gradient list.

        Args:
            setting: its name in the groups.

        Raises:
            InvalidSettingError: unless each is a finite number of at least 0.
        """
        return [[radius(group[setting], setting)] for group in self.param_groups]

    def validate_group(self, group: dict[str, Any]) -> None:
        """Looks at ``rho``, for methods that keep one; methods with other settings add to it."""
        if "rho" in group:
            radius(group["rho"])

    def obstacle_to_side_by_side(self) -> str | None:
        """Why no passes of this method can run side by side; None if some can."""
        if self.yields_passes_together:
            return None
        return f"{type(self).__name__} has no passes that can run side by side: each needs the gradient before it"

    def obstacle_to_grad_scaler(self) -> str | None:
        """Why this method cannot be used with GradScaler; None if it can."""
        if self.takes_scaled_gradients:
            if self.process_group is None:
                return None
            reason = "each rank of the process_group would look for infinities in its own part alone"
        else:
            reason = self._scaling_obstacle
        return f"{type(self).__name__} cannot be used with GradScaler: {reason}. Use bfloat16, which needs no scaling."

    def refuse_scaler(self, scaler: Any) -> None:
        """For drivers that know the scaler before a step begins, which otherwise is refused at its end.

        Args:
            scaler: a GradScaler, or None.

        Raises:
            StepOrderError: if it is enabled and the method cannot be used with it.
        """
        if scaler is not None and getattr(scaler, "is_enabled", bool)():
            self._refuse_scaled_step()

    @property
    def loads(self) -> int:
        """How often state was loaded: what was recorded before works on tensors that are no longer the state."""
        return int(self._container["loads"])

    def devices(self) -> set[torch.device]:
        """Of the parameters."""
        return {param.device for group in self.param_groups for param in group["params"]}

    def report_again(self, report: StepReport) -> None:
        """Makes a report that of the last step, for a step that a CUDA graph has made again."""
        self._container["report"] = report.unread()

    # ------------------------------------------------------------------ drivers

    def advance(self, zero_grad: bool = False) -> Pass | None:
        """Hands ``p.grad`` to the method as the gradient it waits for; begins a step if none is begun.

        Args:
            zero_grad: clear the gradients afterwards.

        Returns:
            The pass whose gradient the method wants next, or None if the step is complete.
        """
        return self._advance(zero_grad)

    def advance_to_last(self, zero_grad: bool = False) -> Pass | None:
        """As :meth:`advance`, for drivers that leave the update to ``step()``: a step's last gradient is not taken.

        Returns:
            The pass whose gradient the method wants next, which is the one that it wants now where that is the last.

        Raises:
            StepOrderError: if the method makes its update although no pass was said to be the last (the weights are
                then restored), or there is no gradient.
        """
        return self._advance(zero_grad, to_last=True)

    @untraced
    def _advance(self, zero_grad: bool = False, to_last: bool = False) -> Pass | None:
        # An interrupt may strike between the entering of no_grad() and its block, which then never leaves it.
        grad_enabled = torch.is_grad_enabled()
        try:
            self._tell_followers(None)
            gradients = gradients_of(self._params())
            run: BegunStep | None = self._container["run"] or self._begin()
            if run is None:
                return None
            waiting = run.waiting
            kept = waiting is not None and waiting.kept
            if not (to_last and waiting is not None and waiting.last):
                if waiting is not None:
                    self._refuse_no_gradient(gradients, run)
                    goes_on = run.receive(gradients)
                else:
                    goes_on = self._make_combined_update(run, gradients)
                self._make_updates(run, goes_on, not to_last)
            self._tell_followers(self.waiting)
        except BaseException:
            torch.set_grad_enabled(grad_enabled)
            self.restore()
            raise
        if zero_grad or kept:
            self.zero_grad()
        return self.waiting

    def begin(self) -> Pass | None:
        """Begins a step, for drivers that hand each gradient over by :meth:`advance`. Clears the gradients.

        Returns:
            The pass whose gradient the method wants first; None if it wants none for this step, which is over then.

        Raises:
            StepOrderError: if a step is already begun (the weights are then restored).
        """
        return self._begin_for("begin()")

    @untraced
    def _begin_for(self, action: str) -> Pass | None:
        self._refuse_second_begin(action)
        self._clear_leftovers()
        self._begin(is_told_of_passes=True)
        return self.waiting

    def each_pass(self, step: Callable[[], object] | None = None) -> Iterator[Pass]:
        """Makes a step of any method in a loop whose body runs forward and backward for the pass it is given::

            for p in optimizer.each_pass():
                x, y = train_batch if p.data == "train" else validation_batch
                loss_fn(model(x), y).backward()

        Gradients are cleared before the first pass and after each, so accumulate within the body. If the body raises,
        or is left by break, the weights are restored and the gradients cleared. To clip, do it after the backward of
        the pass that is ``last``. Passes of two optimizers go one within the other or one after the other: ``zip()``
        leaves the second before its update, and a warning says so.

        Args:
            step: what makes the update, called when the last pass is through; by default this optimizer's ``step()``.
                For wrappers whose own step() must be called, ``accelerated_optimizer.step``, and for GradScaler,
                ``lambda: scaler.step(optimizer)``. Where it changes ``p.grad`` before, the update takes what is there
                then; with methods that combine gradients, after :meth:`combine_gradients` alone.

        Raises:
            StepOrderError: if a step is already begun (the weights are then restored), or ``step`` is of a wrapper that
                has to be called in every pass.
        """
        wrapper = getattr(step, "__self__", None)
        # accelerate's wrapper knows its scaler.
        self.refuse_scaler(getattr(wrapper, "scaler", None))
        if takes_single_samples(wrapper):
            raise StepOrderError(
                f"{type(wrapper).__name__} cannot make the update of each_pass(): it clips gradients of single "
                f"samples, and has to do so in every pass. {WRAP_AROUND}"
            )
        waiting = self._begin_for("each_pass()")
        passes = None if waiting is None else self._container["run"].passes
        try:
            while waiting is not None:
                yield waiting
                self._container["step call"] = step
                try:
                    waiting = self.advance(zero_grad=True)
                finally:
                    self._container["step call"] = None
        finally:
            # A body that was left early leaves this step under way; another step is none of this loop's business.
            if self.is_step_begun and self._container["run"].passes is passes:
                makes_no_update = waiting is not None and waiting.last and self._has_gradients()
                self.restore()
                if makes_no_update:
                    warnings.warn(
                        "each_pass() was left after the backward of its last pass, so this step makes no update. (Of "
                        "zip(one.each_pass(), two.each_pass()) that happens to the second in every step.) Where it is "
                        "meant, call restore() before leaving.",
                        stacklevel=2,
                    )

    @untraced
    def _has_gradients(self) -> bool:
        gradients = gradients_of(self._params())
        return len(missing(gradients)) < len(gradients)

    def _clear_leftovers(self) -> None:
        """What a pass of a step before left behind would be added to the first gradient of this one."""
        if self._has_gradients():
            self.zero_grad()

    def each_group(self) -> Iterator[PassGroup]:
        """As :meth:`each_pass`, for drivers that run passes side by side; the body sets each group's ``gradients``.

        Raises:
            StepOrderError: if a step is already begun (the weights are then restored), or gradients are missing.
        """
        self._refuse_second_begin("each_group()")
        self._clear_leftovers()
        self._container["side by side"] = True
        run: BegunStep | None = None
        try:
            run = self._begin(is_told_of_passes=True)
            while run is not None:
                group = PassGroup(run.expected)
                yield group
                if len(group.gradients) != len(group.passes):
                    raise StepOrderError(f"{len(group.gradients)} gradients were given for {len(group.passes)} passes")
                goes_on = True
                self._tell_followers(None)
                for gradients in group.gradients:
                    self._refuse_no_gradient(gradients, run)
                    goes_on = run.receive(gradients)
                if not self._make_updates(run, goes_on):
                    run = None
                self._tell_followers(self.waiting)
        finally:
            self._container["side by side"] = False
            if run is not None and self._container["run"] is run:
                self.restore()

    def first_step(self, zero_grad: bool = False) -> None:
        """Perturbs the weights along the gradient in ``p.grad``.

        With GradScaler the gradient may stay scaled: the perturbation does not depend on the scale. In a step of one
        pass, of methods that have such steps, the gradient is not used: ``second_step()`` updates with its own, which
        is right and costs the pass that other drivers save.

        Raises:
            StepOrderError: if a step is already begun (the weights are then restored), or there is no gradient.
        """
        self._refuse_second_begin("first_step()")
        # Only second_step() makes updates, or GradScaler's step() in its place, which knows the gradient's scale.
        self.advance_to_last(zero_grad)

    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and updates them with the gradient in ``p.grad``; runs hooks as ``step()`` does.

        Raises:
            StepOrderError: if no step is begun.
        """
        if not self.is_step_begun:
            raise StepOrderError("second_step() was called without first_step()")
        if self.advance() is not None:
            number = self._container["run"].number
            self.restore()
            raise StepOrderError(
                f"second_step() was called after pass {number}, but the method needs more; drive it with each_pass()"
            )
        if zero_grad:
            self.zero_grad()

    @overload
    def step(
        self,
        closure: None = None,
        validation_closure: Closure | None = None,
        previous_closure: Closure | None = None,
        *,
        memory_closure: Closure | None = None,
        closure_runs: ClosureRuns | None = None,
    ) -> None: ...

    @overload
    def step(
        self,
        closure: Callable[[], Loss],
        validation_closure: Closure | None = None,
        previous_closure: Closure | None = None,
        *,
        memory_closure: Closure | None = None,
        closure_runs: ClosureRuns | None = None,
    ) -> Loss: ...

    @runs_its_own_hooks
    def step(
        self,
        closure: Closure | None = None,
        validation_closure: Closure | None = None,
        previous_closure: Closure | None = None,
        *,
        memory_closure: Closure | None = None,
        closure_runs: ClosureRuns | None = None,
    ) -> Any:
        """Makes or completes a step.

        Args:
            closure: clears nothing, runs forward and backward, and returns the loss. Which passes it runs is said by
                ``closure_runs``. None completes a step begun with ``first_step``; this is how GradScaler calls it.
                With lr 0 in all groups and gradients of zeros it makes state for a checkpoint, as torch's tools ask.
            validation_closure: the same for the validation batch, for methods that use one.
            previous_closure: the same for the batch of the step before, for methods that use it; by default the
                closure that was given for that step.
            memory_closure: the same for the batch from memory, for methods that use one; None while there is none.
            closure_runs: overrides the constructor's.

        Returns:
            What the closure returned: for its only pass, or for the first of several (the loss at the weights
            themselves). None without a closure, and where no pass was left for it, as in steps of one pass by
            ``"second_pass"``.

        Raises:
            StepOrderError: without closure if no step is begun or passes are missing; with a closure that cannot run
                again, or under GradScaler, which some methods cannot take at all; without a validation closure where
                the method needs one. Whatever is raised, also by a closure, the weights are then as they were before
                the step, and gradients of its passes are cleared.
        """
        grad_enabled = torch.is_grad_enabled()
        try:
            self._container["in step()"] = True
            if hasattr(self, "grad_scale"):
                self._refuse_scaled_step()
            if "descent" in self._container:
                return self._descend_for_caller()
            if closure is None:
                return self._finish()
            self._refuse_amp_closure()
            self._refuse_what_trainers_do_between(closure)
            previous = previous_closure or self._container["previous closure"]
            closures = {
                TRAIN: closure,
                VALIDATION: validation_closure,
                PREVIOUS: previous,
                MEMORY: memory_closure,
            }
            custom = self.closure_runs if closure_runs is None else closure_runs
            check_choice("closure_runs", custom, get_args(ClosureRuns))
            loss = self._run_closures(closures, custom)
            self._container["previous closure"] = closure if self.uses_previous_batch else None
            return loss
        except BaseException:
            torch.set_grad_enabled(grad_enabled)
            self._forget_amp_scaling()
            self.restore()
            raise
        finally:
            self._container["in step()"] = False

    def _run_closures(self, closures: dict[str, Closure | None], closure_runs: ClosureRuns) -> Any:
        draws = Draws(self.devices(), generators=self.generators)
        losses: list[Any] = []
        if not self.is_step_begun:
            if closure_runs == "every_pass":
                self._begin_for("step()")
            else:
                self.advance(zero_grad=True)
        waiting = self.waiting
        while waiting is not None:
            chosen = closures.get(waiting.data)
            if losses or waiting.may_be_empty:
                self.zero_grad()
            if chosen is None:
                if not waiting.may_be_empty:
                    raise StepOrderError(f"{type(self).__name__} needs a closure for the {waiting.data} batch as well")
            else:
                with draws.of(waiting.data, waiting.perturbed):
                    loss = _call(chosen)
                if isinstance(loss, Tensor) and loss.requires_grad and any(loss is other for other in losses):
                    raise StepOrderError(_STALE_GRAPH)
                losses.append(loss)
            waiting = self.advance()
        return losses[0] if losses else None

    def _begin(self, is_told_of_passes: bool = False) -> BegunStep | None:
        """Begins a step with the plan as it is; None if the method wants no gradient for it.

        Args:
            is_told_of_passes: the driver makes as many as are asked for, and not two whatever they are.
        """
        if _under_way:
            self._refuse_shared_parameters()
        self._container["report"] = StepReport()
        kept: KeptState = self._container["method state"]
        if kept.follow_shapes():
            plans: PlanCache = self._container["plans"]
            plans.plan.refresh()
        self.catch_up()
        _under_way.add(self)
        try:
            try:
                is_short = is_told_of_passes and self.plain_steps_take_one_pass and self._is_plain_step()
                passes = _plain_passes() if is_short else self.passes()
                run = self._container["run"] = BegunStep(passes, type(self).__name__)
            except StopIteration:
                self._end()
                return None
            self._tell_followers(run.waiting)
        except BaseException:
            self.restore()
            raise
        return run

    def _refuse_shared_parameters(self) -> None:
        """Two perturbations of one weight would each take the other for the weight itself, and lose its update."""
        own = {id(p) for p in self._params()}
        for other in list(_under_way):
            if other is not self and any(id(p) in own for group in other.param_groups for p in group["params"]):
                raise StepOrderError(
                    "a step was begun although that of another optimizer, which holds some of the same parameters, is "
                    "not completed: their weights may be perturbed. Make one step after the other, or give the shared "
                    "parameters to one optimizer alone. A step that was given up has to be restored: restore()"
                )

    def _end(self) -> None:
        plans: PlanCache = self._container["plans"]
        if plans.holds_copies:
            raise StepOrderError(
                f"passes() of {type(self).__name__} ended with the weights perturbed: it has to yield Update(...) "
                "last, which takes them back. For a step without an update, call return_to_copies()"
            )
        self._container["run"] = None
        _under_way.discard(self)
        # Schedulers ask whether step() has come before them. A step that updates nothing (SAMPa's first, or one whose
        # gradients are not finite) need not have called it, nor the base's.
        self._opt_called = self.base_optimizer._opt_called = True  # type: ignore[attr-defined]
        self.remember_writes()

    def catch_up(self, *, unseen: bool = False) -> None:
        """Lets master weights follow what somebody else has written into the weights since the last step.

        Every step begins with it. Elements that still are their masters' roundings keep them.

        Args:
            unseen: look at all weights, also at those that seem unchanged. What is written through ``p.data`` cannot
                be seen.
        """
        plans: PlanCache = self._container["plans"]
        plans.catch_up(unseen)

    def remember_writes(self) -> None:
        """Tells :meth:`catch_up` that what was written into the weights so far was a step of this optimizer."""
        plans: PlanCache = self._container["plans"]
        plans.remember_writes()

    def _finish(self) -> None:
        run: BegunStep | None = self._container["run"]
        if run is None:
            if self._is_state_asked_for():
                self._make_state()
                return
            raise StepOrderError(
                "step() without a closure completes a step, and none is begun. Call first_step() after the first "
                "backward and step() or second_step() after the second, or pass a closure. (GradScaler takes no "
                "closure, so Lightning with precision='16-mixed' needs manual optimization.)"
            )
        if self.advance() is not None:
            raise StepOrderError(
                f"step() was called after pass {run.number}, but the method needs more; drive it with each_pass()"
            )

    def _refuse_amp_closure(self) -> None:
        if hasattr(self, "found_inf") or hasattr(self, "grad_scale"):
            raise StepOrderError(
                "a closure cannot be used with GradScaler.step, which would see its scaled gradients too late. Call "
                "backward and first_step(), backward again, then scaler.step(optimizer)."
            )

    @untraced
    def _refuse_what_trainers_do_between(self, closure: Closure) -> None:
        accumulated = accumulated_by(closure)
        if accumulated != 1:
            raise InvalidSettingError(
                f"Invalid accumulate_grad_batches: {accumulated}; with {type(self).__name__} in automatic optimization "
                "it must be 1, since Lightning's closure runs the last micro-batch alone. Use manual optimization, and "
                "run all micro-batches in each pass of each_pass()"
            )
        self._container["clips each pass"] = clips_each_pass(closure)
        if not self.takes_scaled_gradients:
            self._refuse_clipped_passes()

    def _refuse_clipped_passes(self) -> None:
        if self._container["clips each pass"]:
            raise InvalidSettingError(
                f"{type(self).__name__} cannot be used with what clips the gradient of each pass, not the update's: "
                "gradient_clip_val or a configure_gradient_clipping() of one's own in Lightning's automatic "
                "optimization, GradientNormClipping in skorch. With Lightning use manual optimization, "
                "combine_gradients() and clip_grad_norm_; with skorch clip in a step pre-hook"
            )

    # ------------------------------------------------------------------ safety

    @property
    def is_step_begun(self) -> bool:
        """Whether a step is under way; the weights may be perturbed then."""
        return self._container["run"] is not None

    @property
    def waiting(self) -> Pass | None:
        """The pass whose gradient the step under way waits for; None between steps."""
        run: BegunStep | None = self._container["run"]
        return None if run is None else run.waiting

    @property
    def last_step(self) -> StepReport:
        """What the last step, or the one under way, did."""
        report: StepReport = self._container["report"]
        return report

    def follow_passes(self, call: Callable[[Pass | None], None]) -> None:
        """Calls back whenever a gradient is taken, or a step abandoned: with the pass that is wanted next.

        None is for the end of a step, and may come before the call with the next pass of the same step.
        """
        self._container["followers"].append(call)

    def unfollow_passes(self, call: Callable[[Pass | None], None]) -> None:
        """Undoes :meth:`follow_passes`."""
        followers: list[Callable[[Pass | None], None]] = self._container["followers"]
        if call in followers:
            followers.remove(call)

    @untraced
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. By hand it is where a step begins: what forward passes have done before is none of its passes."""
        super().zero_grad(set_to_none)
        if not self.is_step_begun:
            self._tell_followers(None)

    def _tell_followers(self, waiting: Pass | None) -> None:
        for call in self._container["followers"]:
            call(waiting)

    @untraced
    def restore(self) -> None:
        """Abandons a step under way: the weights are as they were before it, bit for bit, and gradients are cleared.

        They belong to a pass that is given up, and would be added to the next one's. Between steps nothing is done.
        """
        run: BegunStep | None = self._container["run"]
        self._container["run"] = None
        _under_way.discard(self)
        self._container.pop("descent", None)
        self._container["post hooks due"] = None
        self._tell_followers(None)
        # A generator that is running is the one that the exception comes from, and ends by it.
        if run is not None and inspect.getgeneratorstate(run.passes) != inspect.GEN_RUNNING:
            run.passes.close()
        plans: PlanCache = self._container["plans"]
        if plans.plan.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            plans.forget_copies()  # nothing has been done yet, so nothing is to be undone
        elif run is not None or plans.holds_copies:
            self.return_to_copies()
            plans.remember_writes()
        if run is not None:
            self.zero_grad()

    @contextmanager
    def restore_on_error(self) -> Iterator[None]:
        """For passes driven by hand: if the body raises, calls :meth:`restore` and clears the gradients."""
        try:
            yield
        except BaseException:
            self.restore()
            self.zero_grad()
            raise

    def watch(self, model: nn.Module) -> RemovableHandle:
        """From now on ``model.state_dict()`` holds the weights themselves, also in the middle of a step.

        For checkpoints that are written when something went wrong: of an exception in a pass driven by hand this
        optimizer knows nothing, and the model is left at its perturbed weights until :meth:`restore` is called. In the
        middle of a step the entries are copies, and of a sharded model refused. Whatever else reads the model, such as
        ``torch.save(model)``, finds what it holds.

        Returns:
            A handle; its ``remove()`` ends this.
        """
        handle: RemovableHandle = model.register_state_dict_post_hook(UnperturbedEntries(self))
        return handle

    def _refuse_second_begin(self, action: str) -> None:
        if self.is_step_begun:
            self.restore()
            raise StepOrderError(
                f"{action} was called although a step was begun and not completed. The weights have been restored to "
                "what they were before that step, and the gradients cleared; begin again. After an exception in the "
                "second pass, call restore(), or run that pass within restore_on_error()."
            )

    def _refuse_scaled_step(self) -> None:
        obstacle = self.obstacle_to_grad_scaler()
        if obstacle is not None:
            raise StepOrderError(obstacle)

    def _forget_amp_scaling(self) -> None:
        """GradScaler removes its attributes only if step() returns; a later step must not find them."""
        self.__dict__.pop("grad_scale", None)
        self.__dict__.pop("found_inf", None)


def _plain_passes() -> Passes:
    """The base optimizer's step."""
    g = yield Pass(last=True)
    yield Update(g)


def _call(closure: Closure) -> Any:
    try:
        with torch.enable_grad():
            return closure()
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise StepOrderError(_STALE_GRAPH) from error
        if "modified by an inplace operation" in str(error):
            error.add_note(f"If the tensor is a weight, {_STALE_GRAPH}")
        raise
