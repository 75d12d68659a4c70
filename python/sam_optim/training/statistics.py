"""BatchNorm's running statistics: updated by the pass at the weights themselves, left alone by perturbed passes.

While statistics are frozen, a module's forward pass works on throw-away copies of its buffers, and nothing is ever
written to the real ones. So normalisation itself is unchanged, any way of updating is covered (momentum, cumulative
average, counters), and the helpers can be nested and called twice. The copies are put in place by hooks of the module
itself, for as long as its forward pass runs: whoever looks at the module before or after sees the real buffers.

Some forward passes use what they update: spectral normalisation the vectors of its power iteration, batch
renormalisation its averages, vector quantisation its codes. There copies begin where the unperturbed pass on the same
batch began, as its dropout does, so that both passes are of one loss.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils.parametrizations import _SpectralNorm as SpectralNormParametrization
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils.hooks import RemovableHandle

from ..core.errors import InvalidSettingError
from ..core.optimizer import SharpnessAwareOptimizer
from ..core.passes import TRAIN, Pass
from .unnamed_state import UnnamedState

# From a module to the names of its buffers that a forward pass in training mode updates.
StatisticsRule = Callable[[nn.Module], Iterable[str]]

# Those that the forward passes of torch's own layers write in training mode and do not read.
_ONLY_WRITTEN = ("running_mean", "running_var", "num_batches_tracked")

# Flags of whether a module learns; 0 stands in for them. Of torch's fake quantisation, whose observers run in it.
_SWITCHES = ("observer_enabled",)


def running_statistics(module: nn.Module) -> Iterable[str]:
    """The default rule: the names that torch's BatchNorm, InstanceNorm and SyncBatchNorm use, and spectral_norm's.

    Also the flag that switches the observers of fake quantisation on: they are off while statistics are frozen, so that
    perturbed passes are quantised by the ranges that the unperturbed one has left.

    User-made classes that use these names are covered; for others pass a rule of your own.
    """
    return (*_ONLY_WRITTEN, *_SWITCHES, *power_iteration(module))


def power_iteration(module: nn.Module) -> Iterable[str]:
    """The buffers of torch's spectral normalisation, as a parametrization and as a hook."""
    if isinstance(module, SpectralNormParametrization):
        return ("_u", "_v")
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
    return [f"{hook.name}_{vector}" for hook in hooks for vector in "uv"]


def used_statistics(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of a module's statistics that a forward pass in training mode may read, too; in one's own classes all."""
    if str(getattr(type(module).forward, "__module__", "")).startswith("torch.nn."):
        return [name for name in names if name not in _ONLY_WRITTEN]
    return list(names)


def statistics_of(module: nn.Module, rule: StatisticsRule) -> dict[str, Tensor]:
    """The buffers of a module that a rule names."""
    buffers = module._buffers
    # Of a TorchScript module they are a mapping without get().
    found = {name: buffers[name] for name in rule(module) if name in buffers}
    return {name: buffer for name, buffer in found.items() if buffer is not None}


def _stand_in(name: str, value: Tensor) -> Tensor:
    """What a forward pass finds in the place of a buffer."""
    return torch.zeros_like(value) if name in _SWITCHES else value.clone()


def _refuse_torchscript(module: nn.Module, name: str) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise InvalidSettingError(
            f"{name} of a TorchScript module cannot be kept from perturbed passes, since it calls no hooks and takes "
            "no other buffers: use the module that it was made from, with torch.compile if you like"
        )


# ---------------------------------------------------------------------- for the passes of a driver of ours

# Values of buffers, by their module's identity and their name: a forward pass may put another tensor in the place.
Start = Mapping[tuple[int, str], Tensor]


def start_of(model: nn.Module, rule: StatisticsRule) -> Start:
    """Copies of those statistics, as they are now, that a forward pass uses: none in most models."""
    found = {}
    for module in model.modules():
        statistics = statistics_of(module, rule)
        if statistics:
            for name in used_statistics(module, statistics):
                found[id(module), name] = statistics[name].clone()
    return found


@contextmanager
def statistics_aside(model: nn.Module, rule: StatisticsRule, start: Start | None = None) -> Iterator[None]:
    """Within the block the model holds copies of its statistics. For one whole pass that nothing comes between.

    It needs no hooks, so that modules whose ``forward()`` is called directly are covered, too.

    Args:
        model: all its modules are looked at.
        rule: names the buffers; see :func:`running_statistics`.
        start: what the copies of some buffers begin with, see :func:`start_of`; the others begin as they are.
    """
    originals: dict[tuple[int, str], tuple[Any, Tensor]] = {}
    try:
        for module in model.modules():
            for name, buffer in statistics_of(module, rule).items():
                _refuse_torchscript(module, name)
                originals.setdefault((id(module._buffers), name), (module._buffers, buffer))
                module._buffers[name] = _stand_in(name, (start or {}).get((id(module), name), buffer))
        yield
    finally:
        for (_, name), (buffers, original) in originals.items():
            buffers[name] = original


# ---------------------------------------------------------------------- by hooks of the modules


class _Aside:
    """What stands aside while a module's forward passes, in several threads perhaps, work on copies."""

    def __init__(self, module: nn.Module, buffers: dict[str, Tensor]) -> None:
        self.module, self.buffers = module, buffers
        self.passes = 1

    def put_back(self) -> None:
        for name, buffer in self.buffers.items():
            self.module._buffers[name] = buffer


# Threads may run one module at the same time; and DataParallel's replicas have their module's hooks.
_one_at_a_time = threading.RLock()


class _Part:
    """What a freezing is for one module.

    Args:
        freezing: whose part it is.
        names: of the buffers.
        used: those of them that forward passes use as well.
    """

    def __init__(self, freezing: _Freezing, names: list[str], used: list[str]) -> None:
        self.freezing = freezing
        self._copies: dict[str, Tensor] = {}  # that go through a whole pass
        self._starts: dict[str, dict[str, Tensor]] = {}  # of the unperturbed pass, by the batch
        self._started: list[str] = []  # batches of which the pass under way has begun
        self.name(names, used)

    def name(self, names: list[str], used: list[str]) -> None:
        self._names, self.used = names, used

    def put_aside(self, module: nn.Module) -> None:
        for known in self.freezing.aside:
            if known.module is module:
                known.passes += 1
                return
        buffers = module._buffers
        aside: dict[str, Tensor] = {}
        for name in self._names:
            buffer = buffers.get(name)
            if buffer is not None:
                aside[name] = buffer
        # First, for whatever may interrupt what follows.
        self.freezing.aside.append(_Aside(module, aside))
        for name, buffer in aside.items():
            buffers[name] = self._copy_of(name, buffer)

    def _copy_of(self, name: str, buffer: Tensor) -> Tensor:
        kept = self._copies.get(name)
        if kept is None:
            kept = self._starts.get(self.freezing.data, {}).get(name)
        # The module may have been moved or converted since.
        if kept is None or kept.dtype != buffer.dtype or kept.device != buffer.device or kept.shape != buffer.shape:
            kept = buffer
        return _stand_in(name, kept.detach())

    def put_back(self, module: nn.Module) -> None:
        for aside in self.freezing.aside:
            if aside.module is module:
                aside.passes -= 1
                if aside.passes == 0:
                    for name in self.used:
                        copy = module._buffers.get(name)
                        if copy is not None:
                            self._copies[name] = copy
                    aside.put_back()
                    self.freezing.aside.remove(aside)
                return

    def note_start(self, module: nn.Module) -> None:
        """Of an unperturbed pass: where what it uses begins."""
        data = self.freezing.data
        if data not in self._started:
            self._started.append(data)
            start: dict[str, Tensor] = {}
            for name in self.used:
                buffer = module._buffers.get(name)
                if buffer is not None:
                    start[name] = buffer.detach().clone()
            self._starts[data] = start

    def end_pass(self) -> None:
        self._copies.clear()
        self._started.clear()


class _Hooks:
    """The two forward hooks of a module with statistics. A copy of the module gets hooks that do nothing.

    ``torch.compile`` traces them into the module's graph: what they read is guarded, what they exchange is back at the
    end.
    """

    def __init__(self) -> None:
        self.parts: list[_Part] = []

    def before(self, module: nn.Module, args: Any) -> None:
        if not module.training:
            return
        for part in self.parts[::-1]:
            if part.freezing.is_on:
                if torch.compiler.is_compiling():
                    part.put_aside(module)
                else:
                    with _one_at_a_time:
                        part.put_aside(module)
                return
        for part in self.parts:
            if part.used:
                part.note_start(module)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        for part in self.parts:
            if part.freezing.aside:
                if torch.compiler.is_compiling():
                    part.put_back(module)
                else:
                    with _one_at_a_time:
                        part.put_back(module)

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": []}

    def register(self, module: nn.Module) -> None:
        # Before the hook of spectral_norm, which updates its vectors; after that of a lazy module, which makes them.
        comes_first = bool(power_iteration(module))
        module.register_forward_pre_hook(self.before, prepend=comes_first)
        module.register_forward_hook(self.after, always_call=True)

    def remove(self, module: nn.Module) -> None:
        hooks: Any
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)

    @staticmethod
    def of(module: nn.Module) -> _Hooks | None:
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, _Hooks):
                return owner
        return None


class _Freezing:
    """Statistics of a model that are left alone while ``is_on``, until :meth:`end`.

    Args:
        model: all its modules are looked at.
        rule: names the buffers.
        is_on: from the beginning.

    Raises:
        InvalidSettingError: for TorchScript modules with statistics.
    """

    def __init__(self, model: nn.Module, rule: StatisticsRule, is_on: bool) -> None:
        self.is_on = is_on
        self.data = TRAIN
        self.aside: list[_Aside] = []
        self._model, self._rule = weakref.ref(model), rule
        self._parts: dict[weakref.ref[nn.Module], tuple[_Hooks, _Part]] = {}
        self._keeping: list[_Part] = []
        self._shared: list[_Hooks] = []
        self._is_watched = False
        self._unnamed: UnnamedState | None = None  # while the first perturbed pass runs
        self.look_for_modules()

    def look_for_modules(self) -> None:
        """Hooks on all modules with statistics that have none of this freezing yet."""
        model = self._model()
        if model is None:
            return
        self._seen = _registrations.count
        found = [(module, list(statistics_of(module, self._rule))) for module in model.modules()]
        found = [(module, names) for module, names in found if names]
        for module, names in found:
            _refuse_torchscript(module, ", ".join(names))
        has_new_hooks = False
        for module, names in found:
            used = used_statistics(module, names)
            known = self._parts.get(weakref.ref(module))
            if known is not None:
                known[1].name(names, used)
                continue
            hooks = _Hooks.of(module)
            if hooks is None:
                hooks = _Hooks()
                hooks.register(module)
                has_new_hooks = True
            part = _Part(self, names, used)
            hooks.parts.append(part)
            self._parts[weakref.ref(module)] = hooks, part
        self._keeping = [part for _, part in self._parts.values() if part.used]
        self._shared = [hooks for hooks, part in self._parts.values() if part.used]
        if has_new_hooks and _something_is_compiled():
            torch.compiler.reset()  # compiled code does not look for hooks that it was made without

    def put_back(self) -> None:
        """What an interrupted forward pass has left."""
        while self.aside:
            self.aside.pop().put_back()

    def follow(self, waiting: Pass | None) -> None:
        """From now on, forward passes are for this pass of an optimizer; for the first of a step, if None."""
        self.put_back()
        for part in self._keeping:
            part.end_pass()
        # Of other optimizers, whose next pass does not begin where a pass of this one has begun.
        for hooks in self._shared:
            for other in hooks.parts:
                if not other.freezing.is_on:
                    other.end_pass()
        self.data = TRAIN if waiting is None else waiting.data
        self.is_on = waiting is not None and waiting.perturbed
        if self._unnamed is not None:
            unnamed, self._unnamed = self._unnamed, None
            unnamed.tell_what_was_written()
        if self.is_on:
            if self._seen != _registrations.count:
                self.look_for_modules()
            model = self._model()
            if not self._is_watched and model is not None:
                self._is_watched, self._unnamed = True, UnnamedState(model, self._rule)

    def end(self) -> None:
        self.is_on = False
        self.put_back()
        # Hooks that were compiled stay, and do nothing: code that was made without them would not look for them again.
        removes_hooks = not _something_is_compiled()
        for reference, (hooks, part) in self._parts.items():
            if part in hooks.parts:
                hooks.parts.remove(part)
            module = reference()
            if removes_hooks and module is not None and not hooks.parts:
                hooks.remove(module)
        self._parts.clear()
        self._keeping.clear()
        self._shared.clear()


class _Registrations:
    """Counts the modules that became parts of others, once somebody wants to know."""

    def __init__(self) -> None:
        self.count = 0
        self._is_counting = False

    def begin(self) -> None:
        if not self._is_counting:
            self._is_counting = True
            register_module_module_registration_hook(self._add)

    def _add(self, module: nn.Module, name: str, part: nn.Module) -> None:
        self.count += 1


_registrations = _Registrations()


def _something_is_compiled() -> bool:
    """Whether there may be compiled code of some module."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return False
    codes = getattr(getattr(dynamo, "convert_frame", None), "input_codes", None)
    return bool(getattr(codes, "seen", True))


@contextmanager
def frozen_batch_norm(model: nn.Module, rule: StatisticsRule = running_statistics) -> Iterator[None]:
    """Within the block, forward passes leave the model's running statistics alone. May be nested.

    Let a backward pass that runs forward passes again, as ``torch.utils.checkpoint`` makes it do, be within the block.

    Args:
        model: all its modules are looked at.
        rule: names the buffers; see :func:`running_statistics`.

    Raises:
        InvalidSettingError: for TorchScript modules with statistics.
    """
    freezing = _Freezing(model, rule, is_on=True)
    try:
        yield
    finally:
        freezing.end()


_disabled: WeakKeyDictionary[nn.Module, _Freezing] = WeakKeyDictionary()


def disable_running_stats(model: nn.Module, rule: StatisticsRule = running_statistics) -> None:
    """Freezes the running statistics until :func:`enable_running_stats`. A second call in a row does nothing.

    Nothing but forward passes in training mode is affected: the model can be saved, loaded, moved and evaluated in
    between, and a copy of it is not frozen.

    Raises:
        InvalidSettingError: for TorchScript modules with statistics.
    """
    if model not in _disabled:
        _disabled[model] = _Freezing(model, rule, is_on=True)


def enable_running_stats(model: nn.Module) -> None:
    """Undoes :func:`disable_running_stats`. Does nothing if the statistics are not frozen."""
    freezing = _disabled.pop(model, None)
    if freezing is not None:
        freezing.end()


def freeze_in_perturbed_passes(
    model: nn.Module, optimizer: SharpnessAwareOptimizer, rule: StatisticsRule = running_statistics
) -> RemovableHandle:
    """From now on, forward passes of ``model`` and of its modules leave running statistics alone in perturbed passes.

    However the passes are driven, by hand or by a closure, and whatever is called, the model or a part of it, the
    statistics are then updated once a step. A perturbed pass lasts until the optimizer takes its gradient or abandons
    the step: a backward pass may run parts of the forward pass again, as ``torch.utils.checkpoint`` makes it do.

    It works by forward hooks of the modules that have statistics; a module whose ``forward()`` is called directly does
    not run them. The model can be copied, pickled and saved. Copies are not frozen: call this for them and for the
    optimizer that trains them. Modules that join the model later are seen if they join as attributes or by
    ``add_module()``.

    Returns:
        A handle; its ``remove()`` ends this, and is needed before ``torch.jit.script``, which refuses hooks.

    Raises:
        InvalidSettingError: for TorchScript modules with statistics.
    """
    _registrations.begin()
    freezing = _Freezing(model, rule, is_on=False)
    freezing.follow(optimizer.waiting)
    optimizer.stepper.follow_passes(freezing.follow)
    return _Handle(optimizer, freezing)


class _Handle(RemovableHandle):
    def __init__(self, optimizer: SharpnessAwareOptimizer, freezing: _Freezing) -> None:
        self._optimizer, self._freezing = weakref.ref(optimizer), freezing

    def remove(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.stepper.unfollow_passes(self._freezing.follow)
        self._freezing.end()
