"""The passes of a method inside a trainer, which hands over one micro-batch after the other and makes the update.

A window is what goes into one update: ``gradient_accumulation_steps`` or ``accumulative_counts`` micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

from ..core.errors import StepOrderError
from ..core.optimizer import SharpnessAwareOptimizer
from ..core.passes import PREVIOUS, TRAIN, Pass
from ..core.randomness import RandomState
from ..training.batches import containers_kept


class MicroBatch(NamedTuple):
    """What a trainer hands over to be run forward and backward.

    Attributes:
        inputs: of the model.
        more: what else the trainer's step is called with.
        random: the generators' state at its first pass; None if it has had none.
        named: the same as ``more``, for what was given by name.
    """

    inputs: Any
    more: tuple[Any, ...] = ()
    random: RandomState | None = None
    named: Mapping[str, Any] = MappingProxyType({})


Run = Callable[[MicroBatch], Any]


def sharpness_aware(optimizer: Any) -> SharpnessAwareOptimizer | None:
    """This package's optimizer within wrappers that keep what they wrap as ``optimizer``; None if there is none."""
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        # A wrapper may pretend to be of the class that it wraps: what has steps of its own is not one.
        if isinstance(optimizer, SharpnessAwareOptimizer) and "stepper" in vars(optimizer):
            return optimizer
        seen.add(id(optimizer))
        optimizer = getattr(optimizer, "optimizer", None)
    return None


class MicroBatchPasses:
    """Makes all passes of a step over a window, the first while it fills; leaves the update's gradient in ``p.grad``.

    The update is left to whoever calls: the optimizer's ``step()`` completes the step that is under way.
    """

    # Those of the step under way, and of the step before.
    _window: Sequence[MicroBatch] = ()
    _window_before: Sequence[MicroBatch] = ()

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

    def _take(
        self, optimizer: SharpnessAwareOptimizer, micro_batch: MicroBatch, run: Run, is_full: Callable[[], bool]
    ) -> Any:
        """Runs one micro-batch; with the last of a window all further passes.

        Args:
            run: makes forward and backward of a micro-batch, at whatever weights the model holds.
            is_full: asked when it has been run, whether it is the window's last.

        Returns:
            What the first run returned.

        Raises:
            StepOrderError: where the method asks for batches that :meth:`batches_for` does not have.
        """
        window, self._window = self._window, ()  # none, if anything is raised: the next micro-batch begins a step
        with optimizer.restore_on_error():
            if not window:
                self._begin(optimizer, run)
            micro_batch = micro_batch._replace(random=_random_state(optimizer))
            with containers_kept(micro_batch.inputs):
                result = run(micro_batch)
            window = (*window, micro_batch)
            if is_full():
                self._to_the_last_pass(optimizer, run, window)
                self._window_before = window
            else:
                self._window = window
        return result

    @contextmanager
    def _rerunning(self, count: int) -> Iterator[None]:
        """Around the runs of so many micro-batches that the trainer does not count."""
        yield

    def _begin(self, optimizer: SharpnessAwareOptimizer, run: Run) -> None:
        """Begins a step and makes the passes that come before the one on the training batch at the weights."""
        waiting = optimizer.begin()
        if waiting is None:
            raise StepOrderError(
                f"{type(optimizer).__name__} wants no gradient for this step, and the trainer will call step() all the "
                "same: drive it by each_pass() or TrainStep"
            )
        while waiting is not None and waiting.data != TRAIN and not waiting.last:
            self._run(waiting, optimizer, run, ())
            waiting = optimizer.stepper.advance(zero_grad=True, to_last=True)

    def _to_the_last_pass(self, optimizer: SharpnessAwareOptimizer, run: Run, window: Sequence[MicroBatch]) -> None:
        """From the gradient of the window's first pass to what the update is made of."""
        waiting = optimizer.waiting
        while waiting is not None and not waiting.last:
            waiting = optimizer.stepper.advance(zero_grad=True, to_last=True)
            if waiting is not None:
                self._run(waiting, optimizer, run, window)
        optimizer.combine_gradients()  # what the trainer clips and unscales

    def _run(self, p: Pass, optimizer: SharpnessAwareOptimizer, run: Run, window: Sequence[MicroBatch]) -> None:
        after = _random_state(optimizer)
        micro_batches = self.batches_for(p.data, window)
        try:
            with self._rerunning(len(micro_batches)):
                for micro_batch in micro_batches:
                    if p.perturbed and micro_batch.random is not None:
                        micro_batch.random.restore()
                    with containers_kept(micro_batch.inputs):
                        run(micro_batch)
        finally:
            if p.perturbed:
                after.restore()


def _random_state(optimizer: SharpnessAwareOptimizer) -> RandomState:
    return RandomState(optimizer.stepper.devices(), optimizer.generators)
