"""BatchNorm's running statistics: updated by the pass at the weights themselves, left alone by perturbed passes.

While statistics are frozen, a module works on throw-away copies of its buffers; nothing is ever written to the real
ones. So normalisation itself is unchanged, any way of updating is covered (momentum, cumulative average, counters), and
the helpers can be nested and called twice.

Spectral normalisation keeps the vectors of a power iteration in the same way, but forward passes use them, too. So its
copies begin where the unperturbed pass on the same batch began, as its dropout does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm as SpectralNormParametrization
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils.hooks import RemovableHandle

from .optimizer import SharpnessAwareOptimizer
from .passes import TRAIN

# From a module to the names of its buffers that a forward pass in training mode updates.
StatisticsRule = Callable[[nn.Module], Iterable[str]]


def running_statistics(module: nn.Module) -> Iterable[str]:
    """The default rule: the names that torch's BatchNorm, InstanceNorm and SyncBatchNorm use, and spectral_norm's.

    User-made classes that use these names are covered; for others pass a rule of your own.
    """
    return ("running_mean", "running_var", "num_batches_tracked", *power_iteration(module))


def power_iteration(module: nn.Module) -> Iterable[str]:
    """The buffers of torch's spectral normalisation, as a parametrization and as a hook."""
    if isinstance(module, SpectralNormParametrization):
        return ("_u", "_v")
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
    return [f"{hook.name}_{vector}" for hook in hooks for vector in "uv"]


# Values of buffers, by the buffers' identities.
Start = Mapping[int, Tensor]


def start_of(model: nn.Module, rule: StatisticsRule) -> Start:
    """Copies of those statistics, as they are now, that a forward pass uses: none in most models."""
    found = {}
    for module in model.modules():
        for name in set(power_iteration(module)) & set(rule(module)):
            buffer = module._buffers.get(name)
            if buffer is not None:
                found[id(buffer)] = buffer.clone()
    return found


class _Frozen:
    """Statistics put aside; the modules hold copies until :meth:`put_back`.

    Args:
        model, rule, start: see :func:`frozen_batch_norm`.
        again: also those that somebody has put aside already. Then they must come back in the reverse order.
    """

    _all: ClassVar[WeakSet[_Frozen]] = WeakSet()

    def __init__(self, model: nn.Module, rule: StatisticsRule, start: Start | None = None, again: bool = True) -> None:
        self._originals: dict[tuple[int, str], tuple[dict[str, Tensor | None], Tensor]] = {}
        aside = set() if again else {key for other in self._all for key in other._originals}
        for module in model.modules():
            for name in rule(module):
                buffer, key = module._buffers.get(name), (id(module._buffers), name)
                if buffer is not None and key not in aside:
                    self._originals.setdefault(key, (module._buffers, buffer))
                    module._buffers[name] = (start or {}).get(id(buffer), buffer).clone()
        self._all.add(self)

    def put_back(self) -> None:
        for (_, name), (buffers, original) in self._originals.items():
            buffers[name] = original
        self._all.discard(self)


@contextmanager
def frozen_batch_norm(
    model: nn.Module, rule: StatisticsRule = running_statistics, start: Start | None = None
) -> Iterator[None]:
    """Within the block, forward passes leave the model's running statistics alone. May be nested.

    Args:
        model: all its modules are looked at.
        rule: names the buffers; see :func:`running_statistics`.
        start: what the copies of some buffers begin with, see :func:`start_of`; the others begin as they are.
    """
    frozen = _Frozen(model, rule, start)
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

    However the passes are driven, by hand or by a closure, the statistics are then updated once a step. They are put
    aside until the optimizer takes the gradient or abandons the step: a backward pass may run parts of the forward pass
    again, as ``torch.utils.checkpoint`` makes it do.

    Returns:
        A handle; its ``remove()`` ends this.
    """
    frozen: list[_Frozen] = []
    starts: dict[str, Start] = {}
    started: set[str] = set()  # data of which this pass has begun

    def end_of_pass() -> None:
        started.clear()
        while frozen:
            frozen.pop().put_back()

    def before(module: nn.Module, args: Any) -> None:
        waiting = optimizer.waiting
        data = TRAIN if waiting is None else waiting.data
        if waiting is not None and waiting.perturbed:
            if not frozen:
                # A block around the pass, as TrainStep's, puts back what it has put aside before the pass is over.
                frozen.append(_Frozen(model, rule, starts.get(data), again=False))
                optimizer.when_pass_ends(end_of_pass)
        elif module.training and data not in started:
            starts[data] = start_of(model, rule)
            if starts[data]:
                started.add(data)
                optimizer.when_pass_ends(end_of_pass)

    completed: list[bool] = []

    def after(module: nn.Module, args: Any, output: Any) -> None:
        completed.append(True)

    def always_after(module: nn.Module, args: Any, output: Any) -> None:
        if not completed:  # an exception
            end_of_pass()
        completed.clear()

    return _Handles(
        model.register_forward_pre_hook(before),
        model.register_forward_hook(after),
        model.register_forward_hook(always_after, always_call=True),
    )


class _Handles(RemovableHandle):
    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
