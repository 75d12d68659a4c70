"""SAM in Hugging Face's Trainer, which calls ``optimizer.step()`` once for each window of micro-batches.

Nothing of ``transformers`` is imported here: the mixin is put in front of whatever Trainer is in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sam_kernels.sharding import is_distributed

from ..core.errors import InvalidSettingError
from ..core.optimizer import SharpnessAwareOptimizer
from .micro_batches import MicroBatch, MicroBatchPasses, sharpness_aware


class SharpnessAwareTrainerMixin(MicroBatchPasses):
    """Makes the passes of any method within ``transformers.Trainer``::

        class SharpnessAwareTrainer(SharpnessAwareTrainerMixin, Trainer):
            pass

        optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=2e-5)
        trainer = SharpnessAwareTrainer(model, args, train_dataset=dataset, optimizers=(optimizer, None))

    or with ``optimizer_cls_and_kwargs=(SAM, {"base_optimizer": torch.optim.AdamW, "rho": 0.05, "lr": 2e-5})``, which
    takes the Trainer's parameter groups.

    The micro-batches of ``gradient_accumulation_steps`` are run again for each pass, with the same random draws. The
    gradient that the update is made of is left to the Trainer, which clips it and calls ``optimizer.step()``. The loss
    in the Trainer's log is that at the weights themselves, the gradient's norm that of the update's. With any other
    optimizer the Trainer is what it was. BatchNorm: see :func:`freeze_in_perturbed_passes`.

    Raises:
        InvalidSettingError: in the first step, with DeepSpeed, Megatron-LM or FSDP of version 1, whose optimizers or
            parameters do not show a norm of the whole model.
    """

    def training_step(self, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Tensor:
        """One micro-batch, as the Trainer calls it; with the last of a window all further passes.

        Raises:
            StepOrderError: where the method asks for batches that :meth:`batches_for` does not have, or cannot take the
                scaled gradients of ``fp16``.
        """
        optimizer = sharpness_aware(self.optimizer)  # type: ignore[attr-defined]
        make_step = super().training_step  # type: ignore[misc]
        if optimizer is not None and not self._window:
            self._refuse_what_hides_parameters(optimizer)
            optimizer.stepper.refuse_scaler(self.accelerator.scaler)  # type: ignore[attr-defined]
        loss: Tensor = (
            make_step(model, inputs, *more, **named)
            if optimizer is None
            else self._take(
                optimizer,
                MicroBatch(inputs, more, named=named),
                lambda micro_batch: make_step(model, micro_batch.inputs, *micro_batch.more, **micro_batch.named),
                lambda: self.accelerator.sync_gradients,  # type: ignore[attr-defined]
            )
        )
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

    @contextmanager
    def _rerunning(self, count: int) -> Iterator[None]:
        """Losses are divided by the number of these micro-batches, and ranks meet, also where a window only begins."""
        wanted = getattr(self, "current_gradient_accumulation_steps", None)
        if wanted is not None:
            self.current_gradient_accumulation_steps = count
        try:
            with self._reducing_gradients():
                yield
        finally:
            if wanted is not None:
                self.current_gradient_accumulation_steps = wanted

    @contextmanager
    def _reducing_gradients(self) -> Iterator[None]:
        """The Trainer lets ranks meet in a window's last micro-batch alone; some passes come before its first."""
        state = self.accelerator.gradient_state  # type: ignore[attr-defined]
        if state.sync_gradients or state.plugin_kwargs.get("sync_each_batch", False):
            yield
            return
        modules = list(self.model_wrapped.modules())  # type: ignore[attr-defined]
        replicas = [(m, m.require_backward_grad_sync) for m in modules if isinstance(m, DistributedDataParallel)]
        shards = [m for m in modules if hasattr(m, "set_requires_gradient_sync")][:1]
        for replica, _ in replicas:
            replica.require_backward_grad_sync = True
        for shard in shards:
            shard.set_requires_gradient_sync(True)
        try:
            yield
        finally:
            for replica, was_wanted in replicas:
                replica.require_backward_grad_sync = was_wanted
            for shard in shards:
                shard.set_requires_gradient_sync(False)

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
