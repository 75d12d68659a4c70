"""Steps whose passes are run by closures, ``optimizer.step(closure)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .compiling import untraced
from .errors import InvalidSettingError, StepOrderError
from .randomness import Draws
from .trainers_closures import accumulated_by, clips_each_pass

if TYPE_CHECKING:
    from .stepper import Stepper

ClosureRuns = Literal["second_pass", "every_pass"]
Closure = Callable[[], Any]

_STALE_GRAPH = (
    "the closure went backward through the graph of an earlier pass. Each pass is taken at other weights, so the "
    "closure must run the forward pass again: put loss = loss_fn(model(x), y) inside it."
)


def run_closures(stepper: Stepper, closures: dict[str, Closure | None], closure_runs: ClosureRuns) -> Any:
    """Makes or completes a step.

    Args:
        closures: for each batch that a pass may be on; None where there is none.

    Returns:
        What the first call returned; None if no pass was left.
    """
    optimizer = stepper.optimizer
    draws = Draws(stepper.devices(), generators=optimizer.generators)
    losses: list[Any] = []
    if stepper.step.run is None:
        if closure_runs == "every_pass":
            stepper.begin("step()")
        else:
            optimizer.advance(zero_grad=True)
    waiting = stepper.waiting
    while waiting is not None:
        chosen = closures.get(waiting.data)
        if losses or waiting.may_be_empty:
            optimizer.zero_grad()
        if chosen is None:
            if not waiting.may_be_empty:
                raise StepOrderError(f"{type(optimizer).__name__} needs a closure for the {waiting.data} batch as well")
        else:
            with draws.of(waiting.data, waiting.perturbed):
                loss = _call(chosen)
            if isinstance(loss, Tensor) and loss.requires_grad and any(loss is other for other in losses):
                raise StepOrderError(_STALE_GRAPH)
            losses.append(loss)
        waiting = optimizer.advance()
    return losses[0] if losses else None


@untraced
def refuse_what_trainers_do_between(stepper: Stepper, closure: Closure) -> None:
    """Checks what a trainer's closure does besides forward and backward passes.

    Raises:
        InvalidSettingError: for what cannot be right with this method.
    """
    optimizer = stepper.optimizer
    accumulated = accumulated_by(closure)
    if accumulated != 1:
        raise InvalidSettingError(
            f"Invalid accumulate_grad_batches: {accumulated}; with {type(optimizer).__name__} in automatic "
            "optimization it must be 1, since Lightning's closure runs the last micro-batch alone. Use manual "
            "optimization, and run all micro-batches in each pass of each_pass()"
        )
    stepper.step.has_clipped_passes = clips_each_pass(closure)
    if not optimizer.takes_scaled_gradients:
        stepper.refuse_clipped_passes()


def refuse_scaler(optimizer: Any) -> None:
    """Raises :class:`StepOrderError` if GradScaler calls ``step()`` with a closure."""
    if hasattr(optimizer, "found_inf") or hasattr(optimizer, "grad_scale"):
        raise StepOrderError(
            "a closure cannot be used with GradScaler.step, which would see its scaled gradients too late. Call "
            "backward and first_step(), backward again, then scaler.step(optimizer)."
        )


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
