"""The update that ends a step, with the hooks that run around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sam_kernels.host import gradients as gradients_of
from sam_kernels.host import same_objects

from .base_update import Descent, combined_gradient
from .errors import StepOrderError
from .passes import FIXED, Gradients, Update
from .report import StepReport
from .step_hooks import post_hooks_of, pre_hooks_of, run_post_hooks, run_pre_hooks

if TYPE_CHECKING:
    from .optimizer import SharpnessAwareOptimizer
    from .stepper import Stepper

Hooks = list[Callable[..., Any]]


def ones(gram: Tensor) -> Tensor:
    """As :class:`Fixed`, but with a Gram matrix, so that the update is skipped if a gradient list is not finite."""
    return torch.ones_like(gram[0])


def make(stepper: Stepper, optimizer: SharpnessAwareOptimizer, update: Update) -> None:
    """Restores the weights, updates them with the base optimizer, and runs the step's hooks."""
    step = stepper.step
    lists, rule = update.lists, update.rule
    # GradScaler sets its scale and overflow flag as attributes around step().
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if len(lists) > 1:
        stepper.refuse_clipped_passes()
        if hasattr(optimizer, "grad_scale"):
            if grad_scale is None:
                raise StepOrderError(
                    "GradScaler's unscale_() has unscaled the gradient of the last pass, but not those of earlier ones "
                    f"that {type(optimizer).__name__} combines it with: call combine_gradients() before it"
                )
            if rule == FIXED:
                rule = ones  # GradScaler has looked for infinities in p.grad alone
    plans, base_update, run = optimizer._plans, optimizer._base_update, step.run
    descent = Descent(
        plans.plan,
        plans.snapshot,
        lists,
        rule,
        update.scale,
        grad_scale,
        found_inf,
        optimizer.backend,
        is_kept=run is not None and run.last[1],
    )
    settings = base_update.fused_settings(plans.plan, optimizer.backend, optimizer._is_plain_step())
    fused = settings is not None
    hooks = pre_hooks_of(optimizer)
    hooks_of_base = pre_hooks_of(optimizer._base, with_global=False) if fused else []
    if hooks or hooks_of_base:
        descent = _after_pre_hooks(stepper, descent, hooks, hooks_of_base, fused)
        settings = base_update.settings() if fused else None  # hooks may have changed lr
    outcome = base_update.descend(descent, settings)
    ascent = step.report.ascent
    if grad_scale is not None:
        # These norms are of gradients with one scale; those of a combination after hooks are unscaled already.
        ascent = None if ascent is None else ascent.unscaled(grad_scale)
        if descent.grad_scale is not None:
            outcome = outcome._replace(report=outcome.report.unscaled(grad_scale))
    step.report = StepReport(ascent, outcome.report, outcome)
    if fused:
        _run_post_hooks_of_base(optimizer)
    if post_hooks_of(optimizer):
        step.post_hooks_due = step.arguments
        if run is None or run.update is None:
            run_due_post_hooks(stepper)


def run_due_post_hooks(stepper: Stepper) -> None:
    """Runs the post-hooks of the last update, after what the method does after it."""
    arguments = stepper.step.post_hooks_due
    if arguments is not None:
        optimizer = stepper.optimizer
        stepper.step.post_hooks_due = None
        run_post_hooks(optimizer, post_hooks_of(optimizer), arguments)
        optimizer._plans.catch_up(unseen=True)


def not_a_number(stepper: Stepper, lists: Sequence[Gradients]) -> Gradients:
    """NaN in place of a combination that is not finite, for GradScaler and for whoever looks at the norm."""
    optimizer = stepper.optimizer
    combined = combined_gradient(optimizer._plans.plan, lists, FIXED, 1.0, optimizer.backend) or []
    for gradient in combined:
        if gradient is not None:
            gradient.fill_(math.nan)
    return combined


def _after_pre_hooks(stepper: Stepper, descent: Descent, hooks: Hooks, hooks_of_base: Hooks, fused: bool) -> Descent:
    """Runs hooks with the gradient of the update in ``p.grad``, and with unperturbed weights in the model.

    The update uses what ``p.grad`` holds afterwards. For gradients that the method reads again, hooks get copies.
    """
    optimizer, arguments = stepper.optimizer, stepper.step.arguments
    assert arguments is not None  # step() is running
    params = descent.plan.params
    gradients = _gradient_in_place(stepper, descent)
    skips = gradients is None
    if gradients is None:  # the update will be left out
        gradients = not_a_number(stepper, descent.lists)
    if not same_objects(gradients, gradients_of(params)):
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
    plans = optimizer._plans
    if plans.holds_copies:
        copies = bytes(plans.snapshot.taken)
        optimizer.return_to_copies()
        plans.snapshot.taken[:] = copies  # until the hooks are through, for what they may raise
    run_pre_hooks(optimizer, hooks, arguments)
    run_pre_hooks(optimizer._base, hooks_of_base, ((optimizer._base,), {}))
    # Hooks may have written into the weights.
    if fused:
        plans.forget_copies()
        plans.catch_up(unseen=True)
    else:
        plans.renew_copies()
    return descent._replace(
        lists=[gradients_of(params)], rule=ones if skips else FIXED, scale=1.0, grad_scale=None, is_kept=False
    )


def _gradient_in_place(stepper: Stepper, descent: Descent) -> Gradients | None:
    """The gradient that a descent uses, unscaled: ``p.grad`` itself if that is all and the method does not keep it."""
    lists, run = descent.lists, stepper.step.run
    if descent.grad_scale is None and Update(*lists, rule=descent.rule, scale=descent.scale).is_one_gradient:
        is_kept = run is not None and run.last[1] and same_objects(lists[0], run.last[0])
        if not is_kept and same_objects(lists[0], gradients_of(descent.plan.params)):
            return lists[0]
    return combined_gradient(
        descent.plan, lists, descent.rule, descent.scale, descent.backend, grad_scale=descent.grad_scale
    )


def _run_post_hooks_of_base(optimizer: SharpnessAwareOptimizer) -> None:
    base = optimizer._base
    hooks = post_hooks_of(base, with_global=False)
    if hooks:
        run_post_hooks(base, hooks, ((base,), {}))
        optimizer._plans.catch_up(unseen=True)
