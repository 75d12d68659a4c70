"""The update that ends a step: made through whoever calls ``step()``, of one gradient or a combination of several."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from sam_kernels.host import gradients as gradients_of
from sam_kernels.host import missing
from sam_kernels.rules import Fixed, RuleLike
from sam_kernels.scales import Scale

from .base_update import BaseUpdate, Descent
from .compiling import untraced
from .errors import StepOrderError
from .moves import StepReport
from .passes import BegunStep, Gradients, Update, refuse_overwritten
from .planning import PlanCache
from .state import GroupsAndState

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
    def _end_pass(self) -> None:
        """The gradient of the pass under way is taken."""

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
        outcome = update.descend(descent, by_base_itself=self._is_plain_step())
        last: StepReport = self._container["report"]
        self._container["report"] = last._replace(descent=outcome.report, outcome=outcome)

    def descend_through(
        self, call: Callable[[], object], *lists: Gradients, rule: RuleLike = _FIXED, scale: Scale = 1.0
    ) -> None:
        """As :meth:`descend`, made by the ``step()`` that ``call`` calls, which is ``step`` itself or GradScaler's.

        Through ``step()``, so that step hooks fire and schedulers see it, however the passes are driven.
        """
        self._container["descent"] = (lists, rule, scale)
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
            self._end_pass()
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
        assert run.waiting is not None
        if not run.waiting.may_be_empty and len(missing(gradients)) == len(gradients):
            raise StepOrderError(
                f"no parameter has a gradient for pass {run.number + 1}: call loss.backward() first. (A closure "
                "that runs all passes itself needs closure_runs='every_pass'.)"
            )


def _ones(gram: Tensor) -> Tensor:
    """As :class:`Fixed`, but of a Gram matrix, which skips the update if a gradient list is not finite."""
    return torch.ones_like(gram[0])
