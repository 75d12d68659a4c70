"""How a step is made: drivers begin it, pass gradients to it, and have its update made, combined or abandoned."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sam_kernels.host import gradients as gradients_of
from sam_kernels.host import missing, same_objects

from . import updating
from .base_update import combined_gradient
from .begun_step import BegunStep, refuse_overwritten, versions_of
from .compiling import untraced
from .errors import InvalidSettingError, StepOrderError
from .passes import FIXED, Gradients, Pass, Passes, PassGroup, Update
from .report import StepReport
from .step_state import LeftUpdate, StepState, UpdateHandler

if TYPE_CHECKING:
    from .optimizer import SharpnessAwareOptimizer

Follower = Callable[[Pass | None], None]

_NOTHING = StepReport()

# Optimizers in the middle of a step, by the identities of their steppers; mostly none.
_under_way: dict[int, weakref.ref[SharpnessAwareOptimizer]] = {}


class Stepper:
    """The side of an optimizer that drivers use: its own methods, :class:`TrainStep`, the glue for trainers.

    It has a weak reference to the optimizer, which holds it, so that memory is freed as soon as the optimizer is.

    Attributes:
        step: the state of the step under way.
    """

    __slots__ = ("__weakref__", "_followers", "_owner", "step")

    def __init__(self, optimizer: SharpnessAwareOptimizer) -> None:
        self._owner = weakref.ref(optimizer)
        self._followers: list[Follower] = []
        self.step = StepState()

    @property
    def optimizer(self) -> SharpnessAwareOptimizer:
        """The optimizer whose steps these are."""
        optimizer = self._owner()
        assert optimizer is not None, "the optimizer is gone"
        return optimizer

    def devices(self) -> set[torch.device]:
        """Of the parameters."""
        return {param.device for group in self.optimizer.param_groups for param in group["params"]}

    @property
    def waiting(self) -> Pass | None:
        """The pass whose gradient the step under way waits for; None between steps."""
        run = self.step.run
        return None if run is None else run.waiting

    # ------------------------------------------------------------------ gradients

    @untraced
    def begin(self, action: str = "begin()") -> Pass | None:
        """Begins a step, for drivers that hand each gradient over by :meth:`advance`. Clears the gradients.

        Args:
            action: the name of what was called, for messages.

        Returns:
            The pass whose gradient the method wants first; None if it wants none, in which case the step is over.

        Raises:
            StepOrderError: if a step is already begun (the weights are then restored).
        """
        self.refuse_second_begin(action)
        self._clear_leftovers()
        self._begin(self.optimizer, is_told_of_passes=True)
        return self.waiting

    @untraced
    def advance(self, zero_grad: bool = False, to_last: bool = False) -> Pass | None:
        """Hands ``p.grad`` to the method as the gradient it waits for; begins a step if none is begun.

        Args:
            zero_grad: clear the gradients afterwards.
            to_last: leave a step's last gradient where it is, for drivers that leave the update to ``step()``.

        Returns:
            The pass whose gradient the method wants next, or None if the step is complete. With ``to_last``, if the
            present pass is the last, it is returned again.

        Raises:
            StepOrderError: if there is no gradient; or with ``to_last``, if the method makes its update although it
                declared no pass to be the last. The weights are then restored.
        """
        optimizer, step = self.optimizer, self.step
        # An interrupt may strike after no_grad() was entered and before its block, and it is then never left.
        grad_enabled = torch.is_grad_enabled()
        try:
            if self._followers:
                self._tell(None)
            gradients = gradients_of(optimizer._params())
            run = step.run or self._begin(optimizer)
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
            if self._followers:
                self._tell(self.waiting)
        except BaseException:
            torch.set_grad_enabled(grad_enabled)
            self.restore()
            raise
        if zero_grad or kept:
            optimizer.zero_grad()
        return self.waiting

    def each_group(self) -> Iterator[PassGroup]:
        """As ``each_pass()``, for drivers that run passes side by side; the body sets each group's ``gradients``.

        Raises:
            StepOrderError: if a step is already begun (the weights are then restored), or gradients are missing.
        """
        self.refuse_second_begin("each_group()")
        self._clear_leftovers()
        step = self.step
        step.runs_in_parallel = True
        run: BegunStep | None = None
        try:
            run = self._begin(self.optimizer, is_told_of_passes=True)
            while run is not None:
                group = PassGroup(run.expected)
                yield group
                if len(group.gradients) != len(group.passes):
                    raise StepOrderError(f"{len(group.gradients)} gradients were given for {len(group.passes)} passes")
                goes_on = True
                self._tell(None)
                for gradients in group.gradients:
                    self._refuse_no_gradient(gradients, run)
                    goes_on = run.receive(gradients)
                if not self._make_updates(run, goes_on):
                    run = None
                self._tell(self.waiting)
        finally:
            step.runs_in_parallel = False
            if run is not None and step.run is run:
                self.restore()

    def _begin(self, optimizer: SharpnessAwareOptimizer, is_told_of_passes: bool = False) -> BegunStep | None:
        """Begins a step with the plan as it is; None if the method wants no gradient for it.

        Args:
            is_told_of_passes: the driver makes as many passes as are asked for; others always make two.
        """
        step = self.step
        plans = optimizer._plans
        if _under_way:
            self._refuse_shared_parameters()
        step.report = _NOTHING
        if optimizer._kept.follow_shapes():
            plans.plan.refresh()
        plans.catch_up()
        optimizer._check_settings()
        _under_way[id(self)] = self._owner
        try:
            is_short = is_told_of_passes and optimizer.plain_steps_take_one_pass and optimizer._is_plain_step()
            passes = _plain_passes() if is_short else optimizer.passes()
            try:
                run = step.run = BegunStep(passes, type(optimizer).__name__)
            except StopIteration:
                self._end()
                return None
            if self._followers:
                self._tell(run.waiting)
        except BaseException:
            self.restore()
            raise
        return run

    def _end(self) -> None:
        optimizer = self.optimizer
        plans = optimizer._plans
        if plans.holds_copies:
            raise StepOrderError(
                f"passes() of {type(optimizer).__name__} ended with the weights perturbed: it has to yield Update(...) "
                "last, which takes them back. For a step without an update, call return_to_copies()"
            )
        self.step.run = None
        _under_way.pop(id(self), None)
        # Schedulers check that step() was called before them. A step that updates nothing (SAMPa's first, or one with
        # gradients that are not finite) need not have called it, nor that of the base.
        optimizer._opt_called = optimizer._base._opt_called = True  # type: ignore[attr-defined]
        plans.remember_writes()

    @untraced
    def has_gradients(self) -> bool:
        """Whether some parameter has a gradient in ``p.grad``."""
        gradients = gradients_of(self.optimizer._params())
        return len(missing(gradients)) < len(gradients)

    def _clear_leftovers(self) -> None:
        """Clears what an earlier step has left in ``p.grad``: it would be added to the first gradient of this one."""
        if self.has_gradients():
            self.optimizer.zero_grad()

    # ------------------------------------------------------------------ the update

    def _make_updates(self, run: BegunStep, goes_on: bool, is_expected: bool = True) -> bool:
        """Makes updates that the method has yielded. Returns False if the step is over."""
        if goes_on and run.update is not None:
            if not is_expected:
                raise StepOrderError(
                    f"{type(self.optimizer).__name__} makes its update after a pass that it did not say was the last, "
                    "which the driver would have to know: drive it by each_pass(), TrainStep or a closure, or let "
                    "passes() yield Pass(..., last=True)"
                )
            self.update(run.update)
            goes_on = run.go_on()
        if not goes_on:
            self._end()
        if self.step.post_hooks_due is not None:
            updating.run_due_post_hooks(self)
        return goes_on

    def update(self, update: Update) -> None:
        """Restores the weights and updates them with the base optimizer, through ``step()`` unless that is running.

        If there is a handler of :meth:`updates_to`, that gets the update instead.
        """
        optimizer, step = self.optimizer, self.step
        refuse_overwritten(update.lists)
        if step.is_combining:
            raise StepOrderError(
                f"{type(optimizer).__name__} makes its update within passes(): it has to yield Update(...) for that to "
                "wait until its gradient has been clipped"
            )
        handler = step.handler
        if handler is not None:
            step.handler = None
            try:
                handler(update)
            finally:
                step.handler = handler
        elif step.is_in_step_call:
            updating.make(self, optimizer, update)
        elif step.caller is None and optimizer._needs_no_step_call():
            # step() would only come back here.
            step.arguments = (optimizer,), {}
            try:
                updating.make(self, optimizer, update)
            finally:
                step.arguments = None
        else:
            self.update_through(step.caller or optimizer.step, update)

    def update_through(self, call: Callable[[], object], update: Update) -> None:
        """As :meth:`update`, with the ``step()`` that ``call`` calls, directly or by GradScaler.

        The update goes through ``step()`` so that step hooks run and schedulers see it, however passes are driven.
        """
        optimizer, step = self.optimizer, self.step
        step.left = LeftUpdate(update)
        if call != optimizer.step:
            gradients = gradients_of(optimizer._params())
            step.left = LeftUpdate(update, gradients, versions_of(gradients))
        try:
            call()
            if step.left is not None:
                raise StepOrderError(
                    "what was to make the update did not call this optimizer's step(). (accelerate's does not within "
                    "accumulate(), except for the last micro-batch: run all of them in each pass.) To skip an update, "
                    "call restore() and leave the loop."
                )
        finally:
            step.left = None

    def make_left_update(self, left: LeftUpdate) -> None:
        """Makes the update that :meth:`update_through` has left to somebody, who now calls ``step()``.

        The caller may have changed ``p.grad``. An update that uses that as it is uses what is there now.
        """
        optimizer, update = self.optimizer, left.update
        self.step.left = None
        # GradScaler's search for infinities counts as a write, although it changes nothing.
        if left.gradients is not None and not hasattr(optimizer, "grad_scale"):
            gradients = gradients_of(optimizer._params())
            if update.is_one_gradient and same_objects(update.lists[0], left.gradients):
                update = Update(gradients)
            elif not same_objects(gradients, left.gradients) or versions_of(gradients) != left.versions:
                raise StepOrderError(
                    "what makes the update has changed p.grad, which is the gradient of the last pass, and "
                    f"{type(optimizer).__name__} combines it with those of earlier ones: call combine_gradients() "
                    "after the backward of the pass that is last; the update is then what p.grad holds"
                )
        self.update(update)

    @contextmanager
    def updates_to(self, handler: UpdateHandler) -> Iterator[None]:
        """Within the block, updates go to ``handler``, which passes them to :meth:`update` when it has done its part.

        A handler that does not must restore the weights, with the optimizer's ``return_to_copies()``.
        """
        step = self.step
        before, step.handler = step.handler, handler
        try:
            yield
        finally:
            step.handler = before

    @untraced
    def combine_gradients(self) -> None:
        """See :meth:`SharpnessAwareOptimizer.combine_gradients`."""
        optimizer, step = self.optimizer, self.step
        run = step.run
        if run is None or run.waiting is None or not run.waiting.last:
            raise StepOrderError("combine_gradients() was called before the backward of a step's last pass")
        with optimizer.restore_on_error():
            self._tell(None)
            gradients = gradients_of(optimizer._params())
            self._refuse_no_gradient(gradients, run)
            step.is_combining = True
            try:
                run.receive(gradients)
            finally:
                step.is_combining = False
            update = run.update or Update(gradients)
            combined = self.writable_gradient(update)
            step.skips_combined = combined is None
            if combined is None:
                combined = updating.not_a_number(self, update.lists)
            for param, gradient in zip(optimizer._params(), combined, strict=True):
                param.grad = gradient

    def _make_combined_update(self, run: BegunStep, gradients: Gradients) -> bool:
        """Makes the update with what :meth:`combine_gradients` left in ``p.grad``. False if the step is over."""
        if run.update is None:
            return False
        self.update(Update(gradients, rule=updating.ones if self.step.skips_combined else FIXED))
        return run.go_on()

    def combination(self, update: Update) -> Gradients | None:
        """The gradient that an update uses, in new tensors; None where no list has an entry.

        The result is None if the rule needs a Gram matrix that is not finite: the update would change nothing.
        """
        optimizer = self.optimizer
        refuse_overwritten(update.lists)
        plan = optimizer._plans.plan
        return combined_gradient(plan, update.lists, update.rule, update.scale, optimizer.backend)

    def writable_gradient(self, update: Update) -> Gradients | None:
        """As :meth:`combination`, but the last pass's gradient itself if the update is that alone and not kept."""
        run = self.step.run
        if run is not None and update.is_one_gradient:
            last, is_kept = run.last
            if update.lists[0] is last and not is_kept:
                return last
        return self.combination(update)

    # ------------------------------------------------------------------ safety

    @untraced
    def restore(self) -> None:
        """See :meth:`SharpnessAwareOptimizer.restore`."""
        optimizer, step = self.optimizer, self.step
        run, step.run = step.run, None
        _under_way.pop(id(self), None)
        step.left = step.post_hooks_due = None
        self._tell(None)
        # If the generator is running, the exception comes from it and ends it.
        if run is not None and inspect.getgeneratorstate(run.passes) != inspect.GEN_RUNNING:
            run.passes.close()
        plans = optimizer._plans
        if plans.plan.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            plans.forget_copies()  # nothing has been done yet, so nothing is to be undone
        elif run is not None or plans.holds_copies:
            optimizer.return_to_copies()
            plans.remember_writes()
        if run is not None:
            optimizer.zero_grad()

    def is_as_if_not_begun(self) -> bool:
        """Whether the step under way still waits for its first gradient, at the unperturbed weights."""
        run = self.step.run
        return run is not None and run.number == 0 and not self.optimizer._plans.holds_copies

    def refuse_mid_step(self, action: str) -> None:
        """Raises :class:`StepOrderError` if a step is under way."""
        if self.step.run is not None:
            raise StepOrderError(
                f"{action} in the middle of a step, while the weights are perturbed; complete it with second_step() or "
                "abandon it with restore() first"
            )

    def refuse_second_begin(self, action: str) -> None:
        """As :meth:`refuse_mid_step`, for calls that begin a step; abandons the step under way."""
        if self.step.run is not None:
            self.restore()
            raise StepOrderError(
                f"{action} was called although a step was begun and not completed. The weights have been restored to "
                "what they were before that step, and the gradients cleared; begin again. After an exception in the "
                "second pass, call restore(), or run that pass within restore_on_error()."
            )

    def _refuse_shared_parameters(self) -> None:
        """Refuses perturbations of one weight by two optimizers: each would take the other's for the weight itself."""
        own = {id(p) for p in self.optimizer._params()}
        for number, reference in list(_under_way.items()):
            other = reference()
            if other is None:  # it has gone in the middle of its step
                del _under_way[number]
            elif other.stepper is not self and any(id(p) in own for g in other.param_groups for p in g["params"]):
                raise StepOrderError(
                    "a step was begun although that of another optimizer, which holds some of the same parameters, is "
                    "not completed: their weights may be perturbed. Make one step after the other, or give the shared "
                    "parameters to one optimizer alone. A step that was given up has to be restored: restore()"
                )

    def _refuse_no_gradient(self, gradients: Gradients, run: BegunStep) -> None:
        """Refuses a step without gradients, in which torch does nothing: a backward pass was forgotten."""
        if gradients and gradients[0] is not None:
            return
        assert run.waiting is not None
        if run.waiting.may_be_empty or len(missing(gradients)) < len(gradients):
            return
        if any(param.requires_grad for param in self.optimizer._params()):
            raise StepOrderError(
                f"no parameter has a gradient for pass {run.number + 1}: call loss.backward() first. (A closure "
                "that runs all passes itself needs closure_runs='every_pass'. A model whose parameters were replaced, "
                "by load_state_dict(assign=True) or to_empty() from the meta device, needs a new optimizer.)"
            )

    # ------------------------------------------------------------------ GradScaler, and trainers that clip

    def obstacle_to_grad_scaler(self) -> str | None:
        """Why the method cannot be used with GradScaler; None if it can."""
        optimizer = self.optimizer
        if optimizer.takes_scaled_gradients:
            if optimizer.process_group is None:
                return None
            reason = "each rank of the process_group would look for infinities in its own part alone"
        else:
            reason = optimizer._scaling_obstacle
        name = type(optimizer).__name__
        return f"{name} cannot be used with GradScaler: {reason}. Use bfloat16, which needs no scaling."

    def refuse_scaler(self, scaler: Any) -> None:
        """For drivers that know the scaler before a step begins; otherwise it is refused at the end.

        Args:
            scaler: a GradScaler, or None.

        Raises:
            StepOrderError: if it is enabled and the method cannot be used with it.
        """
        if scaler is not None and getattr(scaler, "is_enabled", bool)():
            self.refuse_scaled_step()

    def refuse_scaled_step(self) -> None:
        """Raises :class:`StepOrderError` if the method cannot be used with GradScaler."""
        obstacle = self.obstacle_to_grad_scaler()
        if obstacle is not None:
            raise StepOrderError(obstacle)

    def refuse_clipped_passes(self) -> None:
        """Raises :class:`InvalidSettingError` if a trainer clips each gradient of a step that combines them."""
        if self.step.has_clipped_passes:
            raise InvalidSettingError(
                f"{type(self.optimizer).__name__} cannot be used with what clips the gradient of each pass, not the "
                "update's: gradient_clip_val or a configure_gradient_clipping() of one's own in Lightning's automatic "
                "optimization, GradientNormClipping in skorch. With Lightning use manual optimization, "
                "combine_gradients() and clip_grad_norm_; with skorch clip in a step pre-hook"
            )

    # ------------------------------------------------------------------ followers, captured steps

    def follow_passes(self, call: Follower) -> None:
        """Registers a function that is called with the next pass whenever a gradient is taken or a step abandoned.

        None stands for the end of a step, and may come before a call with another pass of the same step.
        """
        self._followers.append(call)

    def unfollow_passes(self, call: Follower) -> None:
        """Undoes :meth:`follow_passes`."""
        if call in self._followers:
            self._followers.remove(call)

    def gradients_are_cleared(self) -> None:
        """Notes that a step by hand begins here: earlier forward passes do not belong to it."""
        if self.step.run is None:
            self._tell(None)

    def _tell(self, waiting: Pass | None) -> None:
        """Tells followers that a gradient was taken, and which pass is wanted next."""
        for call in self._followers:
            call(waiting)

    def keep_state_in_place(self) -> None:
        """From now on the method's state keeps its place in memory, as a captured step needs."""
        self.optimizer._kept.stays_in_place = True

    @property
    def loads(self) -> int:
        """How often state was loaded. A graph recorded before that works on tensors that are no longer the state."""
        return self.optimizer._checkpoints.loads

    def replayed(self, report: StepReport) -> None:
        """Notes that a CUDA graph has made a step again, which gave this report when it was recorded."""
        self.optimizer._plans.remember_writes()
        self.step.report = report.unread()


def _plain_passes() -> Passes:
    """The passes of a step that is the base optimizer's own."""
    g = yield Pass(last=True)
    yield Update(g)
