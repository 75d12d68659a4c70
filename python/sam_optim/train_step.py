"""The driver of whole steps: it runs the gradient passes that a method asks for. Knows no formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sam_kernels.rules import Fixed, RuleLike
from sam_kernels.scales import Scale
from sam_kernels.sharding import is_distributed

from .batch_norm import Start, StatisticsRule, frozen_batch_norm, running_statistics, start_of
from .capture import CapturedDraws, CapturedSteps, Recorder
from .errors import InvalidSettingError, StepOrderError
from .optimizer import SharpnessAwareOptimizer
from .passes import MEMORY, PREVIOUS, TRAIN, VALIDATION, Gradients, Pass
from .randomness import Draws, RandomState
from .side_by_side import Isolated, Lanes, OneLane, StreamLanes

Perturbation = Literal["batch", "micro_batch"]
LossFunction = Callable[[nn.Module, Any], Any]


class TrainStep:
    """Makes one training step a call: ``loss = step(batch)``.

    ::

        step = TrainStep(model, optimizer, lambda model, batch: cross_entropy(model(batch[0]), batch[1]))
        for batch in loader:
            loss = step(batch)

    The passes of any method are run one after the other, or side by side where they do not depend on each other and
    ``passes`` asks for it. Dropout draws the same masks in all passes of one batch, and gradients are cleared before
    and after. Running statistics of BatchNorm are updated once, by the unperturbed pass on the training batch, and by
    that on the batch from memory for methods that have one. If anything is raised, weights and running statistics are
    as before the step.

    Args:
        model: in training mode, as the caller has put it.
        optimizer: of the model's parameters.
        loss_fn: called as ``loss_fn(model, batch)``; returns the loss, a mean over the batch's samples, or a tuple or
            list whose first entry it is.
        micro_batches: run each pass in so many parts of the batch and accumulate their gradients.
        perturbation: with micro-batches, ``"batch"`` perturbs once along the gradient of the whole batch, so that the
            step is that of the whole batch. ``"micro_batch"`` perturbs for each part along its own gradient and
            averages the gradients there (m-SAM, Foret et al. 2021, section 4.1); it takes memory for one more gradient.
        max_grad_norm: clips the gradient that the base optimizer takes to this norm.
        scaler: a ``torch.amp.GradScaler``; the step then also updates it.
        autocast: data type to run forward passes in, by ``torch.autocast``.
        validation: for methods with a validation batch, where ``step(batch)`` takes it from: an iterable, begun again
            when it is exhausted, or the share of each training batch that is split off its end for it.
        memory_loss: for methods with a batch from memory, its loss, if that is another than ``loss_fn``.
        split: from a batch and a number to that many parts; by default tensors are split along their first dimension.
        statistics: names BatchNorm's running statistics, see :func:`running_statistics`.
        passes: ``"sequential"``: one after the other. ``"streams"``: passes that do not depend on each other (SAMPa's
            two, Agnostic-SAM's first two) at the same time, on CUDA streams, each with leaf tensors and running
            statistics of its own; they take the memory of as many passes. Hooks on parameters do not run in them.
            ``"auto"``: streams where device, model and method allow it.
        capture: record the step as a CUDA graph, after three steps made as usual, and replay it from then on. Each
            shape of batches has a graph of its own, and so has each value of a setting that is a number: let lr and
            rho be tensors on the GPU where they change. Adam needs ``capturable=True``; ``loss_fn`` must not wait for
            the GPU; hooks run while a graph is recorded and not when it is replayed.

    Attributes:
        passes: ``"sequential"`` or ``"streams"``: how passes are run.

    Raises:
        InvalidSettingError: for settings out of range, or a method, model or device that cannot be driven as asked.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SharpnessAwareOptimizer,
        loss_fn: LossFunction,
        *,
        micro_batches: int = 1,
        perturbation: Perturbation = "batch",
        max_grad_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        autocast: torch.dtype | None = None,
        validation: Any = None,
        memory_loss: LossFunction | None = None,
        split: Callable[[Any, int], Sequence[Any]] | None = None,
        statistics: StatisticsRule = running_statistics,
        passes: Literal["auto", "sequential", "streams"] = "sequential",
        capture: bool = False,
    ) -> None:
        if not isinstance(optimizer, SharpnessAwareOptimizer):
            raise TypeError(f"TrainStep drives the optimizers of sam_optim, not {type(optimizer).__name__}")
        if micro_batches < 1:
            raise InvalidSettingError(f"Invalid micro_batches: {micro_batches}; it must be at least 1")
        if perturbation not in ("batch", "micro_batch"):
            raise InvalidSettingError(f"Invalid perturbation: {perturbation!r}; it is 'batch' or 'micro_batch'")
        if perturbation == "micro_batch" and not optimizer.perturbs_micro_batches:
            raise InvalidSettingError(
                f"{type(optimizer).__name__} has no perturbation of its own for each micro-batch, or its class does "
                "not say perturbs_micro_batches = True beside passes()"
            )
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise InvalidSettingError(f"Invalid max_grad_norm: {max_grad_norm}; it must be above 0")
        if isinstance(validation, (int, float)) and not 0.0 < validation < 1.0:
            raise InvalidSettingError(f"Invalid validation: {validation}; a share lies between 0 and 1")
        obstacle = optimizer.obstacle_to_grad_scaler()
        if obstacle is not None and scaler is not None and scaler.is_enabled():
            raise InvalidSettingError(obstacle)
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.micro_batches, self.perturbation = micro_batches, perturbation
        self.max_grad_norm, self.scaler, self.autocast = max_grad_norm, scaler, autocast
        self.validation = validation
        self._losses = {MEMORY: memory_loss or loss_fn}
        self._split = split or split_batch
        self._statistics = statistics
        self._gathering: list[Any] = [m for m in model.modules() if hasattr(m, "set_reshard_after_backward")]
        self._choose_passes(passes)
        self._captured = self._make_captured() if capture else None
        self._validation_batches: Iterator[Any] | None = None
        self._previous: tuple[Any, RandomState | None] | None = None

    def __call__(
        self, batch: Any, validation_batch: Any = None, *, previous_batch: Any = None, memory_batch: Any = None
    ) -> Any:
        """Makes a step.

        Args:
            batch: the training batch.
            validation_batch: for methods that use one.
            previous_batch: the training batch of the step before, for methods that use it; by default the one that
                this object has seen. Give it for the first step after a checkpoint has been loaded.
            memory_batch: for methods that use one, a batch from memory; None while the memory is empty.

        Returns:
            What ``loss_fn`` returned for the training batch in its first unperturbed pass, tensors detached. Of several
            micro-batches: the mean loss; with more than a loss, the mean loss and a list of the other entries. None if
            the method ran no such pass, as SAMPa in a first step with ``warm_start="zero"``.

        Raises:
            StepOrderError: if the method needs a batch that is not there, or a step is already begun.
        """
        if self.optimizer.is_step_begun:
            self.optimizer.restore()
            raise StepOrderError("a step was begun elsewhere and not completed; the weights have been restored")
        batch, validation_batch = self._with_validation(batch, validation_batch)
        if previous_batch is None and self._previous is not None:
            previous_batch, random = self._previous
        else:
            random = None
        batches = {TRAIN: batch, VALIDATION: validation_batch, PREVIOUS: previous_batch, MEMORY: memory_batch}
        if self._captured is not None:
            result = self._captured.step(batches)
            random = None
        else:
            draws = self._draws({} if random is None else {PREVIOUS: random})
            result = self._make_step(batches, draws)
            random = draws.first_of(TRAIN)
        if self.optimizer.uses_previous_batch:
            self._previous = (batch, random)
        return result

    def _make_step(self, batches: dict[str, Any], draws: Draws | CapturedDraws) -> Any:
        run = _Step(self, batches, draws)
        self.optimizer.zero_grad()
        with self._undone_on_error():
            if self.perturbation == "micro_batch" and self.micro_batches > 1:
                run.each_micro_batch_by_itself()
            else:
                run.whole_batch()
        self.optimizer.zero_grad()
        return run.result()

    def _choose_passes(self, wanted: str) -> None:
        if wanted not in ("auto", "sequential", "streams"):
            raise InvalidSettingError(f"Invalid passes: {wanted!r}; it is 'auto', 'sequential' or 'streams'")
        self.passes: Literal["sequential", "streams"] = "sequential"
        self._lanes: Lanes | None = None
        self._isolated: Isolated | None = None
        if wanted == "sequential":
            return
        try:
            self._isolated = Isolated(self.model, self._params())
            self._lanes = self._make_lanes()
            self.passes = "streams"
        except InvalidSettingError:
            if wanted == "streams":
                raise

    def _make_lanes(self) -> Lanes:
        obstacle = self.optimizer.obstacle_to_side_by_side()
        if obstacle is not None:
            raise InvalidSettingError(obstacle)
        if self.optimizer.process_group is not None:
            raise InvalidSettingError("passes cannot run side by side with a process_group; use passes='sequential'")
        if self.perturbation == "micro_batch" and self.micro_batches > 1:
            raise InvalidSettingError("micro-batches with a perturbation of their own run one after the other")
        return StreamLanes(self._one_cuda_device("passes='streams'"))

    def _make_captured(self) -> CapturedSteps:
        if hasattr(self.model, "no_sync") or any(is_distributed(p) for p in self._params()):
            raise InvalidSettingError(f"capture=True cannot be used with {type(self.model).__name__}")
        if self.optimizer.process_group is not None:
            raise InvalidSettingError("capture=True cannot be used with a process_group")
        if self.scaler is not None and self.scaler.is_enabled():
            raise InvalidSettingError("capture=True cannot be used with GradScaler; bfloat16 needs no scaling")
        if not self.optimizer.is_capturable:
            method = type(self.optimizer).__name__
            raise InvalidSettingError(
                f"capture=True cannot be used with {method}, whose steps differ from each other, or whose class does "
                "not say is_capturable = True beside passes()"
            )
        base = self.optimizer.base_optimizer
        needs_capturable = isinstance(base, (torch.optim.Adam, torch.optim.AdamW))
        if needs_capturable and not all(group["capturable"] or group["fused"] for group in base.param_groups):
            raise InvalidSettingError(
                f"capture=True needs {type(base).__name__}'s step counts on the GPU: give it capturable=True"
            )
        recorder = self._make_recorder()
        device = next(iter(self._devices()))

        def make_step(batches: dict[str, Any], draws: CapturedDraws | None) -> Any:
            return self._make_step(batches, self._draws() if draws is None else draws)

        return CapturedSteps(self.optimizer, device, make_step, recorder)

    def _make_recorder(self) -> Recorder:
        return Recorder(self._one_cuda_device("capture=True"))

    def _one_cuda_device(self, wanted_for: str) -> torch.device:
        devices = self._devices()
        device = next(iter(devices), torch.device("cpu"))
        if len(devices) != 1 or device.type != "cuda":
            names = ", ".join(sorted(map(str, devices)))
            raise InvalidSettingError(f"{wanted_for} needs all parameters on one CUDA device; they are on {names}")
        return device

    def _draws(self, known: dict[str, RandomState] | None = None) -> Draws:
        return Draws(self._devices(), known, self.optimizer.generators)

    def _devices(self) -> set[torch.device]:
        return {p.device for p in self._params()}

    def forget_gathered_weights(self) -> None:
        """FSDP2's modules that keep whole weights after a backward pass would not see that the parts have changed."""
        for module in self._gathering:
            module.reshard()

    @property
    def has_statistics(self) -> bool:
        """Whether the model has running statistics."""
        return next(self._buffers_of_statistics(), None) is not None

    def _buffers_of_statistics(self) -> Iterator[Tensor]:
        for module in self.model.modules():
            for name in self._statistics(module):
                buffer = module._buffers.get(name)
                if buffer is not None:
                    yield buffer

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _with_validation(self, batch: Any, validation_batch: Any) -> tuple[Any, Any]:
        if validation_batch is not None or self.validation is None:
            return batch, validation_batch
        if isinstance(self.validation, (int, float)):
            return _split_off(batch, float(self.validation))
        if self._validation_batches is None:
            self._validation_batches = iter(self.validation)
        drawn = next(self._validation_batches, _NOTHING)
        if drawn is _NOTHING:
            self._validation_batches = iter(self.validation)
            drawn = next(self._validation_batches, _NOTHING)
            if drawn is _NOTHING:
                raise ValueError("validation has no batches")
        return batch, drawn

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Weights are restored by the optimizer; running statistics and scaled gradients here."""
        # What is only recorded changes nothing.
        is_recording = self._captured is not None and self._captured.is_recording
        saved = [] if is_recording else [(buffer, buffer.clone()) for buffer in self._buffers_of_statistics()]
        try:
            yield
        except BaseException:
            self.optimizer.restore()
            with torch.no_grad():
                for buffer, value in saved:
                    buffer.copy_(value)
            self.optimizer.zero_grad()
            raise
        finally:
            self.forget_gathered_weights()


_NOTHING = object()


class _Step:
    """One step under way."""

    def __init__(self, owner: TrainStep, batches: dict[str, Any], draws: Draws | CapturedDraws) -> None:
        self.owner, self.optimizer = owner, owner.optimizer
        self._batches, self._draws = batches, draws
        self._starts: dict[str, Start] = {}  # of the pass on each batch that statistics learn from
        self._outputs: list[tuple[float, Any]] = []  # of the training batch's first pass: weights and results
        self._has_output = False
        self._sum: Gradients | None = None
        self._is_finite = True

    # ------------------------------------------------------------------ ways to make the step

    def whole_batch(self) -> None:
        count = self.owner.micro_batches
        parts = {name: self._parts(batch, count) for name, batch in self._batches.items() if batch is not None}
        with self.optimizer.descents_to(self._finish):
            if self.owner._lanes is None:
                for p in self.optimizer.each_pass():
                    with self.optimizer.restore_on_error():
                        self._run(p, self._of(parts, p))
            else:
                for group in self.optimizer.each_group():
                    group.gradients = self._run_group(group.passes, parts, self.owner._lanes)

    def each_micro_batch_by_itself(self) -> None:
        """m-SAM: each part with its own perturbation; their final gradients are averaged."""
        count = self.owner.micro_batches
        parts = {name: self._parts(batch, count) for name, batch in self._batches.items() if batch is not None}
        train = parts[TRAIN]
        for number, (share, part) in enumerate(train):
            own = {name: [(1.0, entries[number % len(entries)][1])] for name, entries in parts.items()}
            own[TRAIN] = [(1.0, part)]
            self._draws.begin_part()
            self._has_output = False
            with self.optimizer.descents_to(self._add_to_sum(share)):
                for p in self.optimizer.each_pass():
                    with self.optimizer.restore_on_error():
                        self._run(p, self._of(own, p), share)
        if self._is_finite:
            assert self._sum is not None
            self._finish([self._sum], _FIXED, 1.0)

    def result(self) -> Any:
        """Of the unperturbed pass on the training batch; None if there was none."""
        if not self._outputs:
            return None
        if len(self._outputs) == 1:
            return self._outputs[0][1]
        losses = sum(share * _loss_of(output) for share, output in self._outputs)
        if all(isinstance(output, Tensor) for _, output in self._outputs):
            return losses
        return losses, [list(output[1:]) for _, output in self._outputs]

    # ------------------------------------------------------------------ passes

    def _run_group(
        self, passes: Sequence[Pass], parts: dict[str, list[tuple[float, Any]]], lanes: Lanes
    ) -> list[Gradients]:
        """The gradients of passes that do not depend on each other."""
        isolated = self.owner._isolated
        assert isolated is not None
        if len(passes) == 1 and passes[0].weights is None:
            self._run(passes[0], self._of(parts, passes[0]))
            gradients = [p.grad for p in self.owner._params()]
            self.optimizer.zero_grad()
            return [gradients]

        def call_of(p: Pass) -> Callable[[], tuple[Gradients, Any]]:
            own = self._of(parts, p)
            return lambda: (isolated.gradients(lambda: self._run(p, own), p.weights), list(self._outputs))

        if sum(p.updates_statistics for p in passes) > 1 and self.owner.has_statistics:
            lanes = OneLane()  # they would write into the same buffers at once
        return [gradients for gradients, _ in lanes.run([call_of(p) for p in passes])]

    def _run(self, p: Pass, parts: list[tuple[float, Any]], share_of_step: float = 1.0) -> None:
        owner = self.owner
        keeps_result = p.data == TRAIN and not p.perturbed and not self._has_output
        owner.forget_gathered_weights()
        with self._draws.of(p.data, p.perturbed), ExitStack() as stack:
            if p.updates_statistics:
                self._starts[p.data] = start_of(owner.model, owner._statistics)
            else:
                start = self._starts.get(p.data)
                stack.enter_context(frozen_batch_norm(owner.model, owner._statistics, start))
            for number, (share, part) in enumerate(parts):
                with self._without_reduction(number + 1 < len(parts)):
                    output = self._forward_backward(owner._losses.get(p.data, owner.loss_fn), part, share)
                if keeps_result:
                    self._outputs.append((share * share_of_step, _detached(output)))
        if keeps_result:
            self._has_output = True

    def _forward_backward(self, loss_fn: LossFunction, batch: Any, share: float) -> Any:
        owner = self.owner
        # The caller's own autocast may hold 16-bit copies of weights, which a recorded graph would read for ever.
        torch.clear_autocast_cache()
        with torch.enable_grad():
            if owner.autocast is None:
                output = loss_fn(owner.model, batch)
            else:
                device = next(iter(owner._devices())).type
                with torch.autocast(device, dtype=owner.autocast):
                    output = loss_fn(owner.model, batch)
            loss = _loss_of(output) * share
            if owner.scaler is not None:
                loss = owner.scaler.scale(loss)
            loss.backward()
        return output

    def _without_reduction(self, wanted: bool) -> AbstractContextManager[None]:
        """DistributedDataParallel and FSDP2 reduce gradients over ranks with the last micro-batch alone."""
        model: Any = self.owner.model
        if not wanted:
            return nullcontext()
        if hasattr(model, "set_requires_gradient_sync"):
            return _without_sync(model)
        return model.no_sync() if hasattr(model, "no_sync") else nullcontext()

    def _of(self, parts: dict[str, list[tuple[float, Any]]], p: Pass) -> list[tuple[float, Any]]:
        name = p.data
        found = parts.get(name)
        if found is not None:
            return found
        if p.may_be_empty:
            return []
        method = type(self.optimizer).__name__
        if name == PREVIOUS:
            raise StepOrderError(
                f"{method} needs the training batch of the step before, which this TrainStep has not seen; give it as "
                "previous_batch"
            )
        raise StepOrderError(f"{method} needs a {name} batch: step(batch, {name}_batch), or TrainStep({name}=...)")

    def _parts(self, batch: Any, count: int) -> list[tuple[float, Any]]:
        """Micro-batches with their shares of the batch's samples."""
        if count == 1:
            return [(1.0, batch)]
        parts = list(self.owner._split(batch, count))
        sizes = [_samples_of(part) for part in parts]
        return [(size / sum(sizes), part) for size, part in zip(sizes, parts, strict=True)]

    # ------------------------------------------------------------------ descents

    def _finish(self, lists: Sequence[Gradients], rule: RuleLike, scale: Scale) -> None:
        """The real descent, with clipping and GradScaler."""
        owner, optimizer = self.owner, self.optimizer
        if owner.max_grad_norm is not None:
            clipped = self._clipped(lists, rule, scale)
            if clipped is None:
                optimizer.return_to_copies()
                return
            lists, rule, scale = [clipped], _FIXED, 1.0
        if owner.scaler is None or not owner.scaler.is_enabled():
            optimizer.descend(*lists, rule=rule, scale=scale)
            return
        # GradScaler looks for infinities in p.grad; the sum has one wherever a list has one.
        checked = lists[0] if len(lists) == 1 else optimizer.combined(lists)
        assert checked is not None
        self._put_into_grad(checked)
        scaler = owner.scaler
        optimizer.descend_through(lambda: scaler.step(optimizer), *lists, rule=rule, scale=scale)
        scaler.update()

    def _clipped(self, lists: Sequence[Gradients], rule: RuleLike, scale: Scale) -> Gradients | None:
        owner, optimizer = self.owner, self.optimizer
        gradients = optimizer.writable_gradient(lists, rule, scale)
        if gradients is None:
            return None
        self._put_into_grad(gradients)
        if owner.scaler is not None and owner.scaler.is_enabled():
            owner.scaler.unscale_(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        assert owner.max_grad_norm is not None
        if optimizer.process_group is None:
            nn.utils.clip_grad_norm_(params, owner.max_grad_norm)
        else:
            norm = optimizer.gram(gradients)[0, 0].sqrt()
            nn.utils.clip_grads_with_norm_(params, owner.max_grad_norm, norm)
        return gradients

    def _put_into_grad(self, gradients: Gradients) -> None:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient

    def _add_to_sum(self, share: float) -> Callable[[Sequence[Gradients], RuleLike, Scale], None]:
        """Adds a micro-batch's share of the final gradient, and goes back to the weights themselves."""

        def handler(lists: Sequence[Gradients], rule: RuleLike, scale: Scale) -> None:
            optimizer = self.optimizer
            gradients = optimizer.combined(lists, rule, scale)
            optimizer.return_to_copies()
            if gradients is None:
                self._is_finite = False
            else:
                self._sum = optimizer.added(self._sum, gradients, share)

        return handler


_FIXED = Fixed()


@contextmanager
def _without_sync(model: Any) -> Iterator[None]:
    """FSDP2's modules keep their gradients to themselves within the block."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def _loss_of(output: Any) -> Tensor:
    loss = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return the loss first, a tensor of one element, got {type(loss).__name__}")
    return loss


def _detached(output: Any) -> Any:
    leaves, structure = tree_flatten(output)
    return tree_unflatten([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def _samples_of(batch: Any) -> int:
    for leaf in tree_flatten(batch)[0]:
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    raise ValueError("the batch holds no tensor with a first dimension; give TrainStep a split of your own")


def split_batch(batch: Any, count: int) -> list[Any]:
    """Cuts a batch into ``count`` parts of nearly equal size along the first dimension of each of its tensors.

    Args:
        batch: tensors in any nesting of tuples, lists and dicts. Tensors without dimensions, tensors whose first
            dimension is not the batch's, and other entries go into every part.
        count: at most the number of samples.

    Raises:
        ValueError: if there are fewer samples than parts.
    """
    samples = _samples_of(batch)
    if samples < count:
        raise ValueError(f"a batch of {samples} samples cannot be split into {count} micro-batches")
    bounds = [samples * number // count for number in range(count + 1)]
    return [_sliced(batch, samples, start, end) for start, end in pairwise(bounds)]


def _split_off(batch: Any, share: float) -> tuple[Any, Any]:
    """A batch without its last samples, and these; at least one sample in either."""
    samples = _samples_of(batch)
    if samples < 2:
        raise ValueError("a batch of one sample cannot be split into a training and a validation batch")
    cut = min(max(round(samples * (1.0 - share)), 1), samples - 1)
    return _sliced(batch, samples, 0, cut), _sliced(batch, samples, cut, samples)


def _sliced(batch: Any, samples: int, start: int, end: int) -> Any:
    leaves, structure = tree_flatten(batch)
    cut = [
        leaf[start:end] if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == samples else leaf
        for leaf in leaves
    ]
    return tree_unflatten(cut, structure)
