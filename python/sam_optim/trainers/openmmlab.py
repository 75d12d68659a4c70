"""SAM in MMEngine's Runner, which trains MMPretrain, MMDetection, MMSegmentation and their kin.

Importing this module imports ``mmengine`` and enters the hook into its registry::

    custom_imports = dict(imports="sam_optim.openmmlab")
    custom_hooks = [dict(type="SharpnessAwareHook")]
    optim_wrapper = dict(
        type="OptimWrapper",
        optimizer=dict(type="SharpnessAware", method="SAM", rho=0.05, base_optimizer="SGD", lr=0.1, momentum=0.9),
    )
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, OPTIMIZERS
from mmengine.runner import BaseLoop

import sam_optim

from ..core.errors import InvalidSettingError
from ..core.optimizer import SharpnessAwareOptimizer
from .micro_batches import MicroBatch, MicroBatchPasses, sharpness_aware


@OPTIMIZERS.register_module(name="SharpnessAware")  # type: ignore[untyped-decorator]
def sharpness_aware_from_config(
    params: Any, method: str | type[SharpnessAwareOptimizer], base_optimizer: str | type, **settings: Any
) -> SharpnessAwareOptimizer:
    """A method of this package, as a configuration file names it.

    Args:
        params: parameters or groups; MMEngine hands them over.
        method: its class or the class's name, ``"SAM"``.
        base_optimizer: a class or its name in MMEngine's registry, ``"SGD"``.
        **settings: of the method and of the base optimizer.

    Raises:
        InvalidSettingError: for a name that is not known.
    """
    cls = getattr(sam_optim, method, None) if isinstance(method, str) else method
    if not (isinstance(cls, type) and issubclass(cls, SharpnessAwareOptimizer)):
        raise InvalidSettingError(f"Invalid method: {method!r}; sam_optim has no optimizer of that name")
    base = OPTIMIZERS.get(base_optimizer) if isinstance(base_optimizer, str) else base_optimizer
    if base is None:
        raise InvalidSettingError(f"Invalid base_optimizer: {base_optimizer!r}; MMEngine has no optimizer of that name")
    return cls(params, base, **settings)  # type: ignore[call-arg, arg-type, no-any-return]


@HOOKS.register_module()
class SharpnessAwareHook(Hook, MicroBatchPasses):  # type: ignore[misc]
    """Makes the passes of any method within MMEngine's training loops, by epochs or by iterations.

    The model's own ``train_step`` is run for each pass and micro-batch, DistributedDataParallel included, with the same
    random draws; the window of ``accumulative_counts`` micro-batches is run again for each pass. Clipping, loss scaling
    and the update are the optimizer wrapper's, with the gradient that the update takes. Losses in the log are those
    at the weights themselves. An exception, Ctrl-C included, leaves the weights of before the step under way. With any
    other optimizer the hook does nothing.

    Methods that use a validation batch or a memory: override :meth:`batches_for`, which returns
    ``[MicroBatch(data_batch), ...]`` of :mod:`sam_optim.trainers.micro_batches`. BatchNorm: see
    :func:`freeze_in_perturbed_passes`.

    Args:
        freeze_batch_norm: let running statistics learn from unperturbed passes alone.
    """

    def __init__(self, freeze_batch_norm: bool = True) -> None:
        self.freeze_batch_norm = freeze_batch_norm
        self._wrapper: Any = None

    def before_run(self, runner: Any) -> None:
        """Lets the training loop that is about to run do so with this hook's train_step."""
        loop, optimizer = runner._train_loop, sharpness_aware(runner.optim_wrapper)
        if optimizer is None or not isinstance(loop, BaseLoop):  # it is built only where there will be training
            return

        def run() -> Any:
            vars(loop).pop("run")
            with self._installed(runner, optimizer):
                return loop.run()

        loop.run = run

    @contextmanager
    def _installed(self, runner: Any, optimizer: SharpnessAwareOptimizer) -> Iterator[None]:
        model, self._wrapper = runner.model, runner.optim_wrapper
        self._window = self._window_before = ()
        freezing = sam_optim.freeze_in_perturbed_passes(model, optimizer) if self.freeze_batch_norm else None
        train_step = model.train_step
        model.train_step = lambda data, optim_wrapper: self._train_step(train_step, optimizer, data)
        try:
            with optimizer.restore_on_error():
                yield
        finally:
            del model.train_step  # its class has one
            if freezing is not None:
                freezing.remove()

    def _train_step(self, train_step: Callable[..., Any], optimizer: SharpnessAwareOptimizer, data: Any) -> Any:
        optimizer.stepper.refuse_scaler(getattr(self._wrapper, "loss_scaler", None))
        passing = _WithoutUpdate(self._wrapper)
        logged = self._take(
            optimizer,
            MicroBatch(data),
            lambda micro_batch: train_step(micro_batch.inputs, optim_wrapper=passing),
            self._wrapper.should_update,
        )
        if not self._window:
            self._wrapper.step(**passing.step_settings)
            self._wrapper.zero_grad(**passing.zero_settings)
        return logged

    @contextmanager
    def _rerunning(self, count: int) -> Iterator[None]:
        """The wrapper counts backward passes, to know what to divide losses by and when ranks have to meet."""
        end = self._wrapper._inner_count
        self._wrapper._inner_count = end - count
        try:
            yield
        finally:
            self._wrapper._inner_count = end


class _WithoutUpdate:
    """An optimizer wrapper whose ``update_params`` runs backward and leaves the update to the hook."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self.step_settings: dict[str, Any] = {}
        self.zero_settings: dict[str, Any] = {}

    def update_params(
        self, loss: torch.Tensor, step_kwargs: dict[str, Any] | None = None, zero_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.step_settings, self.zero_settings = step_kwargs or {}, zero_kwargs or {}
        self._wrapper.backward(self._wrapper.scale_loss(loss))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)
