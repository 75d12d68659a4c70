"""The state of the step under way, and what drivers have said about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .begun_step import BegunStep
from .passes import Gradients, Update
from .report import StepReport
from .step_hooks import Arguments

# Takes an update in place of the optimizer, see Stepper.updates_to().
UpdateHandler = Callable[[Update], None]


class LeftUpdate(NamedTuple):
    """An update that is left to whoever calls ``step()``.

    Attributes:
        gradients: what ``p.grad`` held when it was left; None if nobody can have changed it.
        versions: how often these had been written into.
    """

    update: Update
    gradients: Gradients | None = None
    versions: list[int] | None = None


@dataclass(slots=True)
class StepState:
    """The step of one optimizer.

    Attributes:
        run: the method's step; None between steps.
        report: what has been done so far, or by the last step.
        is_in_step_call: ``step()`` is running, so that an update need not be made through it.
        caller: makes the update in place of ``step()``; None if ``step()`` makes it.
        left: the update that somebody is about to call ``step()`` for.
        arguments: the arguments of the call of ``step()`` under way, for step hooks.
        post_hooks_due: arguments of post-hooks, which run after what the method does after its update.
        is_combining: ``combine_gradients()`` wants the update, which must not be made yet.
        skips_combined: the combination was not finite, so there will be no update.
        has_clipped_passes: a trainer clips the gradient of each pass.
        runs_in_parallel: passes yielded together may name weights of their own.
        handler: takes updates in place of the optimizer.
        previous_closure: of the step before, for methods that use its batch.
    """

    run: BegunStep | None = None
    report: StepReport = StepReport()  # noqa: RUF009  is immutable
    is_in_step_call: bool = False
    caller: Callable[[], object] | None = None
    left: LeftUpdate | None = None
    arguments: Arguments | None = None
    post_hooks_due: Arguments | None = None
    is_combining: bool = False
    skips_combined: bool = False
    has_clipped_passes: bool = False
    runs_in_parallel: bool = False
    handler: UpdateHandler | None = None
    previous_closure: Callable[[], Any] | None = None
