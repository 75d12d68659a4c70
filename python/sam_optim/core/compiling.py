"""Where ``torch.compile`` stops: the optimizer's own work is done by kernels that it cannot look into."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Method = TypeVar("Method", bound=Callable[..., Any])

_REASON = "sam_optim: the optimizer's part of a step is made by its own kernels"
_waiting: list[Callable[[], None]] = []

# Of the compiler; where torch does not give it, the compiler is taken for looking.
_callback: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)


def untraced(method: Method) -> Method:
    """Keeps the compiler out of a method: a compiled function that calls it has one break in its graph, and no warning.

    It needs :func:`prepare` first, which imports the compiler; importing this package does not.
    """
    run: Callable[..., Any] = method

    def prepared() -> None:
        nonlocal run
        run = torch.compiler.disable(method, reason=_REASON)

    _waiting.append(prepared)

    @functools.wraps(method)
    def untraced_method(*args: Any, **kwargs: Any) -> Any:
        # To switch the compiler off takes longer than much of what is called so.
        return (run if _is_compiler_looking() else method)(*args, **kwargs)

    return untraced_method  # type: ignore[return-value]


def _is_compiler_looking() -> bool:
    """Whether a compiled function is being traced, or has called code that is not compiled."""
    return torch.compiler.is_dynamo_compiling() or _callback() is not None


def prepare() -> None:
    """Must be called before anything is compiled that calls an untraced method.

    It imports the compiler, as torch's own optimizers do when they are constructed.
    """
    while _waiting:
        _waiting.pop()()
