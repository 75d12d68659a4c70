"""Step hooks, as torch's optimizers run them: before the update, with its gradient in ``p.grad``, and after it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .errors import StepOrderError

Step = TypeVar("Step", bound=Callable[..., Any])

# The arguments of step(), the optimizer first, as torch passes them to its hooks.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def runs_its_own_hooks(step: Step) -> Step:
    """Makes a ``step()`` run its hooks around its update; torch's own wrapper would run them around all passes."""

    @functools.wraps(step)
    def recorded_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.stepper.step
        before, state.arguments = state.arguments, ((self, *args), kwargs)
        try:
            if not is_profiled():
                return step(self, *args, **kwargs)
            with torch.autograd.profiler.record_function(f"Optimizer.step#{type(self).__name__}.step"):
                result = step(self, *args, **kwargs)
                self._optimizer_step_code()
                return result
        except TypeError:  # arguments that step() does not take: it has not begun, and cannot restore the weights
            self.restore()
            raise
        finally:
            state.arguments = before

    recorded_step.hooked = True  # type: ignore[attr-defined]
    return cast(Step, recorded_step)


def is_profiled() -> bool:
    """Whether torch's profiler is running. To announce a step to it takes as long as a kernel on a small model."""
    return getattr(torch.autograd.profiler, "_is_profiler_enabled", True)


def has_own_step(optimizer: Any) -> bool:
    """Whether somebody has replaced the ``step()`` of the class. (That of a scheduler only notes that it ran.)"""
    step = vars(optimizer).get("step")
    if step is None:
        return False
    is_schedulers = getattr(step, "_wrapped_by_lr_sched", False)
    return not (is_schedulers and getattr(step, "__wrapped__", None) is type(optimizer).step)


def pre_hooks_of(optimizer: Any, with_global: bool = True) -> list[Callable[..., Any]]:
    """The pre-hooks of one optimizer, in torch's order; an optimizer that does not derive from torch's has none."""
    own = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    if not own and not (with_global and _global_optimizer_pre_hooks):
        return []
    return [*(_global_optimizer_pre_hooks.values() if with_global else ()), *(own or {}).values()]


def post_hooks_of(optimizer: Any, with_global: bool = True) -> list[Callable[..., Any]]:
    """As :func:`pre_hooks_of`, for hooks that run after the update."""
    own = getattr(optimizer, "_optimizer_step_post_hooks", None)
    if not own and not (with_global and _global_optimizer_post_hooks):
        return []
    return [*(own or {}).values(), *(_global_optimizer_post_hooks.values() if with_global else ())]


def run_pre_hooks(optimizer: Any, hooks: Iterable[Callable[..., Any]], arguments: Arguments) -> None:
    """Runs hooks that may edit or assign ``p.grad``.

    Raises:
        RuntimeError: if a hook returns what torch's hooks may not return.
        StepOrderError: if a hook changes the arguments of ``step()``.
    """
    args, kwargs = arguments
    for hook in hooks:
        changed = hook(optimizer, args, kwargs)
        if changed is None:
            continue
        if not (isinstance(changed, tuple) and len(changed) == 2):
            raise RuntimeError(
                f"a step pre-hook must return None or a tuple of (new_args, new_kwargs), but got {changed}."
            )
        if tuple(changed[0]) != args or dict(changed[1]) != kwargs:
            raise StepOrderError(
                "a step pre-hook gave step() other arguments, which comes too late here: the hooks run when the "
                "passes have been made, and before the update. Call step() with these arguments instead."
            )


def run_post_hooks(optimizer: Any, hooks: Iterable[Callable[..., Any]], arguments: Arguments) -> None:
    """Runs hooks after an update."""
    for hook in hooks:
        hook(optimizer, *arguments)


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """For the base's ``step()`` within a step whose global hooks have run already: torch would run them again."""
    with _silenced(_global_optimizer_pre_hooks, _global_optimizer_post_hooks):
        yield


@contextmanager
def without_hooks(optimizer: Optimizer) -> Iterator[None]:
    """For a ``step()`` without hooks, because all that it does is undone afterwards."""
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    own = [getattr(optimizer, name, {}) for name in names]
    with _silenced(_global_optimizer_pre_hooks, _global_optimizer_post_hooks, *own):
        yield


@contextmanager
def _silenced(*registers: dict[int, Any]) -> Iterator[None]:
    if not any(registers):
        yield
        return
    before = [list(register.items()) for register in registers]
    try:
        for register in registers:
            register.clear()
        yield
    finally:
        for register, entries in zip(registers, before, strict=True):
            added = list(register.items())
            register.clear()
            register.update([*entries, *added])
