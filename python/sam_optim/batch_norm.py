"""BatchNorm's running statistics: updated by the pass at the weights themselves, left alone by perturbed passes.

While statistics are frozen, a module works on throw-away copies of its buffers; nothing is ever written to the real
ones. So normalisation itself is unchanged, any way of updating is covered (momentum, cumulative average, counters), and
the helpers can be nested and called twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .optimizer import SharpnessAwareOptimizer

# From a module to the names of its buffers that a forward pass in training mode updates.
StatisticsRule = Callable[[nn.Module], Iterable[str]]


def running_statistics(module: nn.Module) -> Iterable[str]:
    """The default rule: buffers with the names that torch's BatchNorm, InstanceNorm and SyncBatchNorm use.

    User-made classes that use these names are covered; for others pass a rule of your own.
    """
    return ("running_mean", "running_var", "num_batches_tracked")


class _Frozen:
    """Statistics put aside; the modules hold copies until :meth:`put_back`."""

    def __init__(self, model: nn.Module, rule: StatisticsRule) -> None:
        self._originals: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        for module in model.modules():
            for name in rule(module):
                buffer = module._buffers.get(name)
                if buffer is not None:
                    self._originals.append((module._buffers, name, buffer))
                    module._buffers[name] = buffer.clone()

    def put_back(self) -> None:
        for buffers, name, original in reversed(self._originals):
            buffers[name] = original


@contextmanager
def frozen_batch_norm(model: nn.Module, rule: StatisticsRule = running_statistics) -> Iterator[None]:
    """Within the block, forward passes leave the model's running statistics alone. May be nested.

    Args:
        model: all its modules are looked at.
        rule: names the buffers; see :func:`running_statistics`.
    """
    frozen = _Frozen(model, rule)
    try:
        yield
    finally:
        frozen.put_back()


_disabled: WeakKeyDictionary[nn.Module, _Frozen] = WeakKeyDictionary()


def disable_running_stats(model: nn.Module, rule: StatisticsRule = running_statistics) -> None:
    """Freezes the running statistics until :func:`enable_running_stats`. A second call in a row does nothing."""
    if model not in _disabled:
        _disabled[model] = _Frozen(model, rule)


def enable_running_stats(model: nn.Module) -> None:
    """Undoes :func:`disable_running_stats`. Does nothing if the statistics are not frozen."""
    frozen = _disabled.pop(model, None)
    if frozen is not None:
        frozen.put_back()


def freeze_in_perturbed_passes(
    model: nn.Module, optimizer: SharpnessAwareOptimizer, rule: StatisticsRule = running_statistics
) -> RemovableHandle:
    """From now on, forward passes of ``model`` leave running statistics alone in perturbed passes.

    However the passes are driven, by hand or by a closure, the statistics are then updated once a step.

    Returns:
        A handle; its ``remove()`` ends this.
    """
    frozen: list[_Frozen] = []

    def before(module: nn.Module, args: Any) -> None:
        if optimizer.waiting is not None and optimizer.waiting.perturbed:
            frozen.append(_Frozen(model, rule))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if frozen:
            frozen.pop().put_back()

    first = model.register_forward_pre_hook(before)
    second = model.register_forward_hook(after, always_call=True)
    return _BothHandles(first, second)


class _BothHandles(RemovableHandle):
    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
