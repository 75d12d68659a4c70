"""The update that ends a step: made through whoever calls ``step()``, of one gradient or a combination of several."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from sam_kernels.host import gradients as gradients_of
from sam_kernels.host import missing, same_objects
from sam_kernels.rules import Fixed, RuleLike
from sam_kernels.scales import Scale

from .base_update import BaseUpdate, Descent, combined_gradient
from .compiling import untraced
from .errors import StepOrderError
from .moves import StepReport
from .passes import BegunStep, Gradients, Pass, Update, refuse_overwritten, versions_of
from .planning import PlanCache
from .state import GroupsAndState
from .step_hooks import Arguments, post_hooks_of, pre_hooks_of, run_post_hooks, run_pre_hooks

DescentHandler = Callable[[Sequence[Gradients], RuleLike, Scale], None]
_FIXED = Fixed()


class Updates(GroupsAndState):
    """Groups and state, and the updates of them."""

    @abstractmethod
    def restore_on_error(self) -> AbstractContextManager[None]:
        """Abandons the step under way if the body raises."""

    @abstractmethod
    def _end(self) -> None:
        """The step is over."""

    @abstractmethod
    def _refuse_clipped_passes(self) -> None:
        """Raises if somebody clips each gradient of a step that combines them."""

    @abstractmethod
    def _tell_followers(self, waiting: Pass | None) -> None:
        """The gradient of the pass under way is taken, and this one is wanted next."""

    def descend(self, *lists: Gradients, rule: RuleLike = _FIXED, scale: Scale = 1.0) -> None:
        """Restores the weights and updates them by the base optimizer with a combination of gradient lists.

        For drivers; a method yields its :class:`Update`.
        """
        refuse_overwritten(lists)
        if self._container["combining"]:
            raise StepOrderError(
                f"{type(self).__name__} makes its update within passes(): it has to yield Update(...) for that to wait "
                "until its gradient has been clipped"
            )
        handler: DescentHandler | None = self._container["descent handler"]
        if handler is not None:
            self._container["descent handler"] = None
            try:
                handler(lists, rule, scale)
            finally:
                self._container["descent handler"] = handler
            return
        if not self._container["in step()"]:
            self.descend_through(self._container["step call"] or self.step, *lists, rule=rule, scale=scale)
            return
        if len(lists) > 1:
            self._refuse_clipped_passes()
        if len(lists) > 1 and hasattr(self, "grad_scale"):
            if self.grad_scale is None:
                raise StepOrderError(
                    "GradScaler's unscale_() has unscaled the gradient of the last pass, but not those of earlier ones "
                    f"that {type(self).__name__} combines it with: call combine_gradients() before it"
                )
            if rule == _FIXED:
                rule = _ones  # GradScaler has looked for infinities in p.grad alone
        plans: PlanCache = self._container["plans"]
        update: BaseUpdate = self._container["update"]
        run: BegunStep | None = self._container["run"]
        descent = Descent(
            plans.plan,
            plans.snapshot,
            lists,
            rule,
            scale,
            # GradScaler sets its scale and overflow flag as attributes around step().
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            self.backend,
            is_kept=run is not None and run.last[1],
        )
        grad_scale = descent.grad_scale
        fused = update.fuses(plans.plan, self.backend, self._is_plain_step())
        hooks = pre_hooks_of(self)
        hooks_of_base = pre_hooks_of(self.base_optimizer, with_global=False) if fused else []
        if hooks or hooks_of_base:
            descent = self._after_pre_hooks(descent, hooks, hooks_of_base, fused)
        outcome = update.descend(descent, fused)
        last: StepReport = self._container["report"]
        if grad_scale is not None:
            # Norms of gradients that were scaled alike; those of a combination after the hooks are unscaled already.
            ascent = None if last.ascent is None else last.ascent.unscaled(grad_scale)
            if descent.grad_scale is not None:
                outcome = outcome._replace(report=outcome.report.unscaled(grad_scale))
            last = last._replace(ascent=ascent)
        self._container["report"] = last._replace(descent=outcome.report, outcome=outcome)
        if fused:
            self._run_post_hooks_of_base()
        if post_hooks_of(self):
            self._container["post hooks due"] = self._container["step arguments"]
            if run is None or run.update is None:
                self._run_due_post_hooks()

    # ------------------------------------------------------------------ what a base may have besides

    @property
    def train(self) -> Callable[[], None]:
        """``train()`` of a base optimizer that has two modes, as schedule-free ones do; missing where it has none.

        Raises:
            StepOrderError: if called in the middle of a step, unless it changes nothing.
        """
        return self._mode("train")

    @property
    def eval(self) -> Callable[[], None]:
        """As :attr:`train`; the model then holds the weights that are to be evaluated and saved."""
        return self._mode("eval")

    def _mode(self, name: str) -> Callable[[], None]:
        switch = getattr(self.base_optimizer, name, None)
        if not callable(switch):
            base = type(self.base_optimizer).__name__
            raise AttributeError(f"{type(self).__name__} has no {name}(): its base optimizer {base} has none")

        def change() -> None:
            # Hugging Face's Trainer calls train() before each micro-batch, of every pass.
            if not self._is_step_as_if_not_begun():
                if name == self._container["mode"] == "train" and self.is_step_begun:
                    return
                self._refuse_mid_step(f"{name}() was called")
            switch()
            self._container["mode"] = name

        return change

    # ------------------------------------------------------------------ step hooks

    def _patch_step_function(self) -> None:
        # torch would wrap a step() of a subclass, which calls the one here, and the hooks would run twice.
        cls: Any = type(self)
        if not getattr(cls.step, "hooked", False):
            cls.step.hooked = True
        super()._patch_step_function()

    def _after_pre_hooks(self, descent: Descent, hooks: list[Any], hooks_of_base: list[Any], fused: bool) -> Descent:
        """Runs hooks with what the update will take in ``p.grad``, and the weights themselves in the model.

        What ``p.grad`` holds afterwards is what the update takes. Gradients that the method reads again are not given
        away: they stay those of their passes.
        """
        params = descent.plan.params
        gradients = self._gradient_in_place(descent)
        skips = gradients is None
        if gradients is None:  # the update will be left out; hooks are told by NaN, as clip_grad_norm_ would be
            gradients = combined_gradient(descent.plan, descent.lists, _FIXED, 1.0, self.backend) or []
            for gradient in gradients:
                if gradient is not None:
                    gradient.fill_(math.nan)
        if not same_objects(gradients, gradients_of(params)):
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient
        plans: PlanCache = self._container["plans"]
        if plans.holds_copies:
            copies = bytes(plans.snapshot.taken)
            self.return_to_copies()
            plans.snapshot.taken[:] = copies  # until the hooks are through, for what they may raise
        run_pre_hooks(self, hooks, self._container["step arguments"])
        run_pre_hooks(self.base_optimizer, hooks_of_base, ((self.base_optimizer,), {}))
        # What hooks have written into weights counts.
        if fused:
            plans.forget_copies()
            plans.catch_up(unseen=True)
        else:
            plans.renew_copies()
        return descent._replace(
            lists=[gradients_of(params)],
            rule=_ones if skips else _FIXED,
            scale=1.0,
            grad_scale=None,
            is_kept=False,
        )

    def _gradient_in_place(self, descent: Descent) -> Gradients | None:
        """What a descent takes, unscaled: ``p.grad`` itself if that is all, and no method keeps it."""
        lists, run = descent.lists, self._container["run"]
        if descent.grad_scale is None and Update(*lists, rule=descent.rule, scale=descent.scale).is_one_gradient:
            is_kept = run is not None and run.last[1] and same_objects(lists[0], run.last[0])
            if not is_kept and same_objects(lists[0], gradients_of(descent.plan.params)):
                return lists[0]
        return combined_gradient(
            descent.plan, lists, descent.rule, descent.scale, self.backend, grad_scale=descent.grad_scale
        )

    def _run_post_hooks_of_base(self) -> None:
        hooks = post_hooks_of(self.base_optimizer, with_global=False)
        if hooks:
            plans: PlanCache = self._container["plans"]
            run_post_hooks(self.base_optimizer, hooks, ((self.base_optimizer,), {}))
            plans.catch_up(unseen=True)

    def _run_due_post_hooks(self) -> None:
        """Those of the update that was made last, once the method has done what it does after it."""
        arguments: Arguments | None = self._container["post hooks due"]
        if arguments is not None:
            self._container["post hooks due"] = None
            run_post_hooks(self, post_hooks_of(self), arguments)
            plans: PlanCache = self._container["plans"]
            plans.catch_up(unseen=True)

    def descend_through(
        self, call: Callable[[], object], *lists: Gradients, rule: RuleLike = _FIXED, scale: Scale = 1.0
    ) -> None:
        """As :meth:`descend`, made by the ``step()`` that ``call`` calls, which is ``step`` itself or GradScaler's.

        Through ``step()``, so that step hooks fire and schedulers see it, however the passes are driven.
        """
        before = None
        if call != self.step:
            gradients = gradients_of(self._params())
            before = gradients, versions_of(gradients)
        self._container["descent"] = (lists, rule, scale, before)
        try:
            call()
            if "descent" in self._container:
                raise StepOrderError(
                    "what was to make the update did not call this optimizer's step(). (accelerate's does not within "
                    "accumulate(), except for the last micro-batch: run all of them in each pass.) To skip an update, "
                    "call restore() and leave the loop."
                )
        finally:
            self._container.pop("descent", None)

    def _descend_for_caller(self) -> None:
        """The update that :meth:`descend_through` has left to somebody who calls ``step()``.

        He may have changed ``p.grad`` before: where the update takes that as it is, it takes what is there now.
        """
        lists, rule, scale, before = self._container.pop("descent")
        # GradScaler looks for infinities, which it writes as if it changed something.
        if before is not None and not hasattr(self, "grad_scale"):
            gradients = gradients_of(self._params())
            if Update(*lists, rule=rule, scale=scale).is_one_gradient and same_objects(lists[0], before[0]):
                lists = [gradients]
            elif not same_objects(gradients, before[0]) or versions_of(gradients) != before[1]:
                raise StepOrderError(
                    "what makes the update has changed p.grad, which is the gradient of the last pass, and "
                    f"{type(self).__name__} combines it with those of earlier ones: call combine_gradients() after the "
                    "backward of the pass that is last; the update is then what p.grad holds"
                )
        self.descend(*lists, rule=rule, scale=scale)

    @contextmanager
    def descents_to(self, handler: DescentHandler) -> Iterator[None]:
        """Within the block, what methods would hand to :meth:`descend` goes to ``handler`` instead.

        While the handler runs, :meth:`descend` is the real one. A handler that does not call it has to restore the
        weights, see :meth:`return_to_copies`.
        """
        before = self._container["descent handler"]
        self._container["descent handler"] = handler
        try:
            yield
        finally:
            self._container["descent handler"] = before

    def _is_plain_step(self) -> bool:
        """Whether this step is the base's own, bit for bit, and must therefore be made by the base itself."""
        return False

    def _make_updates(self, run: BegunStep, goes_on: bool, is_expected: bool = True) -> bool:
        """Makes the update if it is its turn. False if the step is over."""
        while goes_on and run.update is not None:
            if not is_expected:
                raise StepOrderError(
                    f"{type(self).__name__} makes its update after a pass that it did not say was the last, which the "
                    "driver would have to know: drive it by each_pass(), TrainStep or a closure, or let passes() yield "
                    "Pass(..., last=True)"
                )
            update = run.update
            self.descend(*update.lists, rule=update.rule, scale=update.scale)
            goes_on = run.go_on()
        if not goes_on:
            self._end()
        self._run_due_post_hooks()
        return goes_on

    @untraced
    def combine_gradients(self) -> None:
        """After the backward of a step's last pass: puts the gradient that the update will take into ``p.grad``.

        For clipping by hand, and before GradScaler's ``unscale_``, with methods whose update combines gradients of
        several passes: to clip the last one alone would change their weights against each other. The step's end,
        ``second_step()`` or ``step()``, then takes what ``p.grad`` holds. Where the update takes the last gradient as
        it is, nothing has to be done, and nothing is.

        Raises:
            StepOrderError: before the last pass, or if there is no gradient (the weights are then restored).
        """
        run: BegunStep | None = self._container["run"]
        if run is None or run.waiting is None or not run.waiting.last:
            raise StepOrderError("combine_gradients() was called before the backward of a step's last pass")
        with self.restore_on_error():
            self._tell_followers(None)
            gradients = gradients_of(self._params())
            self._refuse_no_gradient(gradients, run)
            self._container["combining"] = True
            try:
                run.receive(gradients)
            finally:
                self._container["combining"] = False
            update = run.update or Update(gradients)
            combined = self.writable_gradient(update.lists, update.rule, update.scale)
            self._container["skips combined"] = combined is None
            if combined is None:
                combined = self.combined(update.lists) or []
                for gradient in combined:
                    if gradient is not None:
                        gradient.fill_(math.nan)  # for GradScaler to find, and whoever looks at the norm
            for param, gradient in zip(self._params(), combined, strict=True):
                param.grad = gradient

    def _make_combined_update(self, run: BegunStep, gradients: Gradients) -> bool:
        """The update with what :meth:`combine_gradients` has left in ``p.grad``. False if the step is over."""
        if run.update is None:
            return False
        self.descend(gradients, rule=_ones if self._container["skips combined"] else _FIXED)
        return run.go_on()

    def writable_gradient(
        self, lists: Sequence[Gradients], rule: RuleLike = _FIXED, scale: Scale = 1.0
    ) -> Gradients | None:
        """As :meth:`combined`, but the last pass's gradient itself where that is all there is and nobody keeps it."""
        run: BegunStep | None = self._container["run"]
        if run is not None and Update(*lists, rule=rule, scale=scale).is_one_gradient:
            last, is_kept = run.last
            if lists[0] is last and not is_kept:
                return last
        return self.combined(lists, rule, scale)

    def _refuse_no_gradient(self, gradients: Gradients, run: BegunStep) -> None:
        """Torch's optimizers make no step then. Here a backward pass has been forgotten, unless all is frozen."""
        assert run.waiting is not None
        if run.waiting.may_be_empty or len(missing(gradients)) < len(gradients):
            return
        if any(param.requires_grad for param in self._params()):
            raise StepOrderError(
                f"no parameter has a gradient for pass {run.number + 1}: call loss.backward() first. (A closure "
                "that runs all passes itself needs closure_runs='every_pass'. A model whose parameters were replaced, "
                "by load_state_dict(assign=True) or to_empty() from the meta device, needs a new optimizer.)"
            )


def _ones(gram: Tensor) -> Tensor:
    """As :class:`Fixed`, but of a Gram matrix, which skips the update if a gradient list is not finite."""
    return torch.ones_like(gram[0])
