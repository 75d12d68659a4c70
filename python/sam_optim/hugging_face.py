"""SAM in Hugging Face's Trainer, which calls ``optimizer.step()`` once for each window of micro-batches.

Nothing of ``transformers`` is imported here: the mixin is put in front of whatever Trainer is in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sam_kernels.sharding import is_distributed

from .errors import InvalidSettingError, StepOrderError
from .optimizer import SharpnessAwareOptimizer
from .passes import PREVIOUS, TRAIN, Pass
from .randomness import RandomState


class MicroBatch(NamedTuple):
    """What the Trainer calls ``training_step`` with, and how.

    Attributes:
        inputs: of the model.
        more: arguments after the inputs (``num_items_in_batch``).
        random: the generators' state at its first pass; None if it has had none.
    """

    inputs: dict[str, Any]
    more: tuple[Any, ...] = ()
    random: RandomState | None = None


def sharpness_aware(optimizer: Any) -> SharpnessAwareOptimizer | None:
    """This package's optimizer within wrappers that keep what they wrap as ``optimizer``; None if there is none."""
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        # A wrapper may pretend to be of the class that it wraps: what has steps of its own is not one.
        if isinstance(optimizer, SharpnessAwareOptimizer) and "_container" in vars(optimizer):
            return optimizer
        seen.add(id(optimizer))
        optimizer = getattr(optimizer, "optimizer", None)
    return None


class SharpnessAwareTrainerMixin:
    """Makes the passes of any method within ``transformers.Trainer``::

        class SharpnessAwareTrainer(SharpnessAwareTrainerMixin, Trainer):
            pass

        optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=2e-5)
        trainer = SharpnessAwareTrainer(model, args, train_dataset=dataset, optimizers=(optimizer, None))

    or with ``optimizer_cls_and_kwargs=(SAM, {"base_optimizer": torch.optim.AdamW, "rho": 0.05, "lr": 2e-5})``, which
    takes the Trainer's parameter groups.

    The micro-batches of ``gradient_accumulation_steps`` are run again for each pass, with the same random draws. The
    gradient of the last pass is left to the Trainer, which clips it and calls ``optimizer.step()``. The loss in the
    Trainer's log is that at the weights themselves, the gradient's norm that of the last gradient. With any other
    optimizer the Trainer is what it was. BatchNorm: see :func:`freeze_in_perturbed_passes`.

    Raises:
        InvalidSettingError: in the first step, with DeepSpeed, Megatron-LM or FSDP of version 1, whose optimizers or
            parameters do not show a norm of the whole model.
    """

    # Those of the step under way, and of the step before.
    _window: Sequence[MicroBatch] = ()
    _window_before: Sequence[MicroBatch] = ()

    def training_step(self, model: Any, inputs: dict[str, Any], *more: Any) -> Tensor:
        """One micro-batch, as the Trainer calls it; with the last of a window all further passes.

        Raises:
            StepOrderError: where the method asks for batches that :meth:`batches_for` does not have.
        """
        optimizer = sharpness_aware(self.optimizer)  # type: ignore[attr-defined]
        if optimizer is None:
            return self._forward_and_backward(model, inputs, *more)
        with optimizer.restore_on_error():
            if not self._window:
                self._begin(optimizer, model)
            micro_batch = MicroBatch(inputs, more, RandomState(_devices_of(optimizer)))
            loss = self._forward_and_backward(model, inputs, *more)
            self._window = (*self._window, micro_batch)
            if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
                window, self._window = self._window, ()
                self._to_the_last_pass(optimizer, model, window)
                self._window_before = window
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. Whatever it raises, Ctrl-C included, leaves the weights of before the step under way."""
        self._window = self._window_before = ()
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            optimizer = sharpness_aware(self.optimizer)  # type: ignore[attr-defined]
            if optimizer is not None:
                optimizer.restore()
            raise

    def batches_for(self, data: str, window: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """The micro-batches of a pass; to be overridden for methods that use a validation batch or a memory.

        Args:
            data: which batch the method asks for, see :class:`Pass`.
            window: the training micro-batches of this step; empty for passes that come before them.
        """
        if data == TRAIN:
            return window
        if data == PREVIOUS and self._window_before:
            return self._window_before
        raise StepOrderError(
            f"{type(self).__name__} has no micro-batches for passes on the {data} batch: override batches_for()"
        )

    def _begin(self, optimizer: SharpnessAwareOptimizer, model: Any) -> None:
        """Begins a step and makes the passes that come before the one on the training batch at the weights."""
        self._refuse_what_hides_parameters(optimizer)
        waiting = optimizer.begin()
        while waiting is not None and waiting.data != TRAIN and not waiting.last:
            self._run(waiting, optimizer, model, ())
            waiting = optimizer.advance(zero_grad=True)

    def _to_the_last_pass(self, optimizer: SharpnessAwareOptimizer, model: Any, window: Sequence[MicroBatch]) -> None:
        """From the gradient of the window's first pass to that of the last, which stays in ``p.grad``."""
        waiting = optimizer.waiting
        while waiting is not None and not waiting.last:
            waiting = optimizer.advance(zero_grad=True)
            if waiting is not None:
                self._run(waiting, optimizer, model, window)
        if waiting is None:
            raise StepOrderError(
                f"{type(optimizer).__name__} has made its update by itself: its passes() must yield the last one as "
                "Pass(..., last=True), which a Trainer that calls step() needs to know"
            )

    def _run(self, p: Pass, optimizer: SharpnessAwareOptimizer, model: Any, window: Sequence[MicroBatch]) -> None:
        after = RandomState(_devices_of(optimizer))
        for micro_batch in self.batches_for(p.data, window):
            if p.perturbed and micro_batch.random is not None:
                micro_batch.random.restore()
            self._forward_and_backward(model, micro_batch.inputs, *micro_batch.more)
        if p.perturbed:
            after.restore()

    def _forward_and_backward(self, model: Any, inputs: dict[str, Any], *more: Any) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, *more)  # type: ignore[misc]
        return loss

    def _refuse_what_hides_parameters(self, optimizer: SharpnessAwareOptimizer) -> None:
        kind = str(getattr(self.accelerator.distributed_type, "value", ""))  # type: ignore[attr-defined]
        hidden = kind in ("DEEPSPEED", "MEGATRON_LM")
        if kind == "FSDP":
            params = [p for group in optimizer.param_groups for p in group["params"]]
            hidden = not all(is_distributed(p) for p in params)
        if hidden:
            raise InvalidSettingError(
                f"sharpness-aware methods cannot run under {kind} here: the optimizer does not see the whole model's "
                "parameters. Use DistributedDataParallel or FSDP of version 2."
            )


def _devices_of(optimizer: SharpnessAwareOptimizer) -> set[torch.device]:
    return {p.device for group in optimizer.param_groups for p in group["params"]}
