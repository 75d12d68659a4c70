"""What Lightning and skorch do in the closures that they pass to ``step()``. They do not tell, but it can be seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def accumulated_by(closure: Callable[[], Any]) -> int:
    """How many micro-batches Lightning accumulates. Its closure runs only the last of them."""
    return int(getattr(_trainer_of(_lightning_module_of(closure)), "accumulate_grad_batches", 1))


def clips_each_pass(closure: Callable[[], Any]) -> bool:
    """Whether the closure clips the gradient after its backward pass."""
    module = _lightning_module_of(closure)
    if module is not None:
        is_own = not _is_lightnings(module.configure_gradient_clipping)
        return is_own or bool(getattr(_trainer_of(module), "gradient_clip_val", None))
    for cell in getattr(closure, "__closure__", None) or ():
        try:
            callbacks = vars(cell.cell_contents).get("callbacks_")  # of skorch's net
        except (TypeError, ValueError):  # no object with attributes, or an empty cell
            continue
        if isinstance(callbacks, list) and any(_clips(entry) for entry in callbacks):
            return True
    return False


def _lightning_module_of(closure: Callable[[], Any]) -> Any:
    """In automatic optimization the closure is a partial of the module, which knows its trainer."""
    if not isinstance(closure, partial):
        return None
    return next((argument for argument in closure.args if getattr(argument, "automatic_optimization", False)), None)


def _trainer_of(module: Any) -> Any:
    return getattr(module, "_trainer", None)


def _is_lightnings(method: Any) -> bool:
    """Whether a method is the one that Lightning's own class has."""
    return str(getattr(method, "__module__", "")).partition(".")[0] in ("lightning", "pytorch_lightning")


def _clips(entry: Any) -> bool:
    """skorch keeps its callbacks with their names."""
    callback = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
    return "GradientNormClipping" in [owner.__name__ for owner in type(callback).__mro__]
