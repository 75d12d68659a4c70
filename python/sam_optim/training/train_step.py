"""The driver of whole steps: it runs the gradient passes that a method asks for. Knows no formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sam_kernels.host import forget_old_weights, same_objects
from sam_kernels.sharding import is_distributed

from ..core.base_update import added
from ..core.errors import InvalidSettingError, StepOrderError
from ..core.optimizer import SharpnessAwareOptimizer
from ..core.passes import MEMORY, PREVIOUS, TRAIN, VALIDATION, Gradients, Pass, Update
from ..core.randomness import Draws, RandomState
from .arguments import check_functions, check_modules, check_settings, check_validation, loss_of
from .batches import Factor, Split, Weight, containers_kept, split_batch, split_off, weighed_parts
from .capture import CapturedDraws, CapturedSteps, Recorder
from .means import Term, refuse_other_means, terms_of
from .statistics import Start, StatisticsRule, running_statistics, start_of, statistics_aside, statistics_of
from .streams import Isolated, Lanes, OneLane, StreamLanes
from .unnamed_state import UnnamedState

Perturbation = Literal["batch", "micro_batch"]
LossFunction = Callable[[nn.Module, Any], Any]

# On other devices than the CPU, steps in which it is looked at what the loss is a mean over: it makes the host wait.
_CHECKED_STEPS = 3


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
        loss_fn: called as ``loss_fn(model, batch)``; returns the loss, a mean over the batch's samples (or over what
            ``weight`` says), or a tuple or list whose first entry it is. What it takes out of the batch's dicts and
            lists, or replaces there, is there again for the next pass.
        micro_batches: run each pass in so many parts of the batch and accumulate their gradients. BatchNorm normalises
            each part by itself and learns from each, as it does wherever gradients are accumulated.
        perturbation: with micro-batches, ``"batch"`` perturbs once along the gradient of the whole batch, so that the
            step is that of the whole batch (BatchNorm excepted). ``"micro_batch"`` perturbs for each part along its own
            gradient and averages the gradients there (m-SAM, Foret et al. 2021, section 4.1); it takes memory for one
            more gradient.
        max_grad_norm: clips the gradient that the base optimizer takes to this norm.
        scaler: a ``torch.amp.GradScaler``; the step then also updates it.
        autocast: data type to run forward passes in, by ``torch.autocast``: ``torch.bfloat16`` or ``torch.float16``.
        validation: for methods with a validation batch, where ``step(batch)`` takes it from: an iterable, begun again
            when it is exhausted (an iterator cannot be, and ends with an error), or the share of each training batch
            that is split off its end for it. A ``split`` of your own makes parts of one size, so the share is 0.5 then.
        memory_loss: for methods with a batch from memory, its loss, if that is another than ``loss_fn``.
        split: from a batch and a number to that many parts; by default :func:`split_batch`, which says what it cuts.
        weight: of a micro-batch, from a part to a number: how much the mean over it counts in the mean over the batch.
            By default its samples, or, where some of its targets (integers) are -100, which cross entropy
            ignores, the number of the others. For a loss that is another mean, over tokens, say so:
            ``lambda part: (part["labels"] != -100).sum()``, with the labels shifted as the loss shifts them. A loss of
            which autograd's graph shows that it is a mean over something else is refused.
        other_modules: modules besides ``model`` that ``loss_fn`` uses and that have running statistics, as a
            discriminator or a teacher in training mode; these are treated as the model's.
        statistics: names BatchNorm's running statistics, see :func:`running_statistics`, and whatever else forward
            passes update: queues, codebooks, observers. A perturbed pass uses and leaves them as the first pass on its
            batch has found them; what it writes besides is warned of.
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
        split: Split | None = None,
        weight: Weight | None = None,
        other_modules: Sequence[nn.Module] = (),
        statistics: StatisticsRule = running_statistics,
        passes: Literal["auto", "sequential", "streams"] = "sequential",
        capture: bool = False,
    ) -> None:
        if not isinstance(optimizer, SharpnessAwareOptimizer):
            raise TypeError(f"TrainStep drives the optimizers of sam_optim, not {type(optimizer).__name__}")
        check_functions(loss_fn=loss_fn, memory_loss=memory_loss, split=split, weight=weight, statistics=statistics)
        check_modules(model, other_modules)
        check_settings(micro_batches, max_grad_norm, scaler, autocast)
        check_validation(validation, split)
        if perturbation not in ("batch", "micro_batch"):
            raise InvalidSettingError(f"Invalid perturbation: {perturbation!r}; it is 'batch' or 'micro_batch'")
        if perturbation == "micro_batch" and not optimizer.perturbs_micro_batches:
            raise InvalidSettingError(
                f"{type(optimizer).__name__} has no perturbation of its own for each micro-batch, or its class does "
                "not say perturbs_micro_batches = True beside passes()"
            )
        obstacle = optimizer.stepper.obstacle_to_grad_scaler()
        if obstacle is not None and scaler is not None and scaler.is_enabled():
            raise InvalidSettingError(obstacle)
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.micro_batches, self.perturbation = int(micro_batches), perturbation
        self.max_grad_norm, self.scaler, self.autocast = max_grad_norm, scaler, autocast
        self.validation = validation
        self._losses = {MEMORY: memory_loss or loss_fn}
        self._split, self._weight = split, weight
        self._has_watched = False  # a perturbed pass, for what it writes
        self._looked_at = 0  # steps in which it was looked at what the loss is a mean over
        self._modules = nn.ModuleList([model, *other_modules]) if other_modules else model
        self._statistics = statistics
        self._gathering: list[Any] = [m for m in model.modules() if hasattr(m, "set_reshard_after_backward")]
        self._choose_passes(passes)
        self._captured = self._make_captured() if capture else None
        self._validation_batches: Iterator[Any] | None = None
        self._previous: tuple[Any, RandomState | None] | None = None
        self._loaded_draws: RandomState | None = None
        self._known: dict[str, RandomState] = {}  # draws of batches of which the step under way repeats them
        self._first_draws: RandomState | None = None
        self._clipped_params: tuple[list[Tensor], list[Tensor]] = [], []

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
        draws = self._loaded_draws
        if self._previous is not None and (previous_batch is None or previous_batch is self._previous[0]):
            previous_batch, draws = self._previous
        self._known = {} if draws is None else {PREVIOUS: draws}
        self._first_draws = None
        batches = {TRAIN: batch, VALIDATION: validation_batch, PREVIOUS: previous_batch, MEMORY: memory_batch}
        result = self._make_eager_step(batches) if self._captured is None else self._captured.step(batches)
        if self.optimizer.uses_previous_batch:
            self._previous = (batch, self._first_draws)
        self._loaded_draws = None
        return result

    def state_dict(self) -> dict[str, Any]:
        """What this object keeps from step to step, for a run that is to go on bit for bit; tensors and numbers alone.

        That is the state of the random generators that the last training batch was first used with, for methods that
        use it again in the next step (SAMPa). To go on, load model, optimizer, the generators' states and this, and
        give the batch itself once: ``step(batch, previous_batch=batch_before)``. Not in it: the batch, where an
        iterable of validation batches stood, and draws of captured steps.
        """
        draws = self._loaded_draws if self._previous is None else self._previous[1]
        return {"previous_draws": None if draws is None else draws.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the state of a :meth:`state_dict`; what this object has seen so far is forgotten.

        Raises:
            ValueError: if it is not one, or of another number of ``optimizer.generators``.
        """
        if "previous_draws" not in state_dict:
            raise ValueError(f"this is no state of a TrainStep: it holds {sorted(state_dict)}, not 'previous_draws'")
        saved = state_dict["previous_draws"]
        generators = self.optimizer.generators
        self._loaded_draws = None if saved is None else RandomState.from_state_dict(saved, generators)
        self._previous = None

    def _make_eager_step(self, batches: dict[str, Any]) -> Any:
        draws = Draws(self._devices(), self._known, self.optimizer.generators)
        result = self._make_step(batches, draws)
        self._first_draws = draws.first_of(TRAIN)
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
            self._isolated = Isolated(self.model, self._params(), self._modules)
            self._lanes = self._make_lanes()
            self.passes = "streams"
        except InvalidSettingError:
            if wanted == "streams":
                raise

    def _make_lanes(self) -> Lanes:
        obstacle = self.optimizer.obstacle_to_parallel_passes()
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
        groups = base.param_groups
        # Step counts on the host would stand still in a graph.
        if any("capturable" in group and not (group["capturable"] or group.get("fused")) for group in groups):
            raise InvalidSettingError(
                f"capture=True needs {type(base).__name__}'s step counts on the GPU: give it capturable=True"
            )
        recorder = self._make_recorder()
        device = next(iter(self._devices()))

        def make_step(batches: dict[str, Any], draws: CapturedDraws | None) -> Any:
            return self._make_eager_step(batches) if draws is None else self._make_step(batches, draws)

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

    def _devices(self) -> set[torch.device]:
        return {p.device for p in self._params()}

    def forget_gathered_weights(self) -> None:
        """FSDP2's modules that keep whole weights after a backward pass would not see that the parts have changed."""
        for module in self._gathering:
            module.reshard()

    @property
    def has_statistics(self) -> bool:
        """Whether the model or the other modules have running statistics."""
        return next(self._places_of_statistics(), None) is not None

    def _places_of_statistics(self) -> Iterator[tuple[Any, str, Tensor]]:
        for module in self._modules.modules():
            for name, buffer in statistics_of(module, self._statistics).items():
                yield module._buffers, name, buffer

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _params_as_clipped(self) -> list[Tensor]:
        """In the model's order, in which everybody clips them: sums of another order differ in their last bit."""
        params = self._params()
        if not same_objects(params, self._clipped_params[0]):
            place = {id(p): number for number, p in enumerate(self.model.parameters())}
            self._clipped_params = params, sorted(params, key=lambda p: place.get(id(p), len(place)))
        return [p for p in self._clipped_params[1] if p.grad is not None]

    def _with_validation(self, batch: Any, validation_batch: Any) -> tuple[Any, Any]:
        if validation_batch is not None or self.validation is None:
            return batch, validation_batch
        if isinstance(self.validation, Real):
            if self._split is None or self._split is split_batch:
                return split_off(batch, float(self.validation))
            train, validation = self._split(batch, 2)
            return train, validation
        if self._validation_batches is None:
            self._validation_batches = iter(self.validation)
        drawn = next(self._validation_batches, _NOTHING)
        if drawn is _NOTHING:
            if self._validation_batches is self.validation:
                raise ValueError(
                    f"validation is exhausted: a {type(self.validation).__name__} cannot be begun again. Give "
                    "TrainStep the loader itself, not iter(loader), or an iterator without an end."
                )
            self._validation_batches = iter(self.validation)
            drawn = next(self._validation_batches, _NOTHING)
            if drawn is _NOTHING:
                raise ValueError("validation has no batches")
        return batch, drawn

    @property
    def is_recording(self) -> bool:
        """Whether a step is being recorded, and not made."""
        return self._captured is not None and self._captured.is_recording

    @property
    def looks_at_means(self) -> bool:
        """Whether it is to be looked at in this step what the loss is a mean over: not where the user has said so."""
        if self.micro_batches == 1 or self._weight is not None or self.is_recording:
            return False
        return self._looked_at < _CHECKED_STEPS or all(device.type == "cpu" for device in self._devices())

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Weights are restored by the optimizer; running statistics and scaled gradients here."""
        # What is only recorded changes nothing.
        saved = [] if self.is_recording else [(*place, place[-1].clone()) for place in self._places_of_statistics()]
        try:
            yield
        except BaseException:
            self.optimizer.restore()
            with torch.no_grad():
                for buffers, name, buffer, value in saved:
                    buffers[name] = buffer.copy_(value)
            self.optimizer.zero_grad()
            raise
        finally:
            self.forget_gathered_weights()


_NOTHING = object()


class _Step:
    """One step under way."""

    def __init__(self, owner: TrainStep, batches: dict[str, Any], draws: Draws | CapturedDraws) -> None:
        self.owner, self.optimizer, self.stepper = owner, owner.optimizer, owner.optimizer.stepper
        self._batches, self._draws = batches, draws
        self._starts: dict[str, Start] = {}  # of the pass on each batch that statistics learn from
        self._outputs: list[tuple[Factor, Any]] = []  # of the training batch's first pass: weights and results
        self._has_output = False
        self._means: list[list[Term]] = []  # what the loss of each part was a mean over
        self._sum: Gradients | None = None
        self._is_finite = True

    # ------------------------------------------------------------------ ways to make the step

    def whole_batch(self) -> None:
        count = self.owner.micro_batches
        parts = {name: self._parts(batch, count) for name, batch in self._batches.items() if batch is not None}
        with self.stepper.updates_to(self._finish):
            if self.owner._lanes is None:
                for p in self.optimizer.each_pass():
                    with self.optimizer.restore_on_error():
                        self._run(p, self._of(parts, p))
            else:
                for group in self.stepper.each_group():
                    group.gradients = self._run_group(group.passes, parts, self.owner._lanes)

    def each_micro_batch_by_itself(self) -> None:
        """m-SAM: each part with its own perturbation; their final gradients are averaged."""
        count = self.owner.micro_batches
        parts = {name: self._parts(batch, count) for name, batch in self._batches.items() if batch is not None}
        train = parts[TRAIN]
        for number, (factor, part) in enumerate(train):
            own: dict[str, list[tuple[Factor, Any]]]
            own = {name: [(1.0, entries[number % len(entries)][1])] for name, entries in parts.items()}
            own[TRAIN] = [(1.0, part)]
            self._draws.begin_part()
            self._has_output = False
            with self.stepper.updates_to(self._add_to_sum(factor)):
                for p in self.optimizer.each_pass():
                    with self.optimizer.restore_on_error():
                        self._run(p, self._of(own, p), factor)
        self._look_at_means([factor for factor, _ in train])
        if self._is_finite:
            assert self._sum is not None
            self._finish(Update(self._sum))

    def result(self) -> Any:
        """Of the unperturbed pass on the training batch; None if there was none."""
        if not self._outputs:
            return None
        if self.owner.micro_batches == 1:
            return self._outputs[0][1]
        losses = sum(factor * _counted(loss_of(output), factor) for factor, output in self._outputs)
        if all(isinstance(output, Tensor) for _, output in self._outputs):
            return losses
        return losses, [list(output[1:]) for _, output in self._outputs]

    # ------------------------------------------------------------------ passes

    def _run_group(
        self, passes: Sequence[Pass], parts: dict[str, list[tuple[Factor, Any]]], lanes: Lanes
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
            return lambda: (isolated.gradients(lambda: self._run(p, own, start=start), p.weights), list(self._outputs))

        updating = sum(p.updates_statistics for p in passes)
        start = start_of(self.owner._modules, self.owner._statistics) if updating == 1 else None
        if start or (updating > 1 and self.owner.has_statistics):
            lanes = OneLane()  # one would read or write the buffers that another one writes
        return [gradients for gradients, _ in lanes.run([call_of(p) for p in passes])]

    def _run(
        self, p: Pass, parts: list[tuple[Factor, Any]], factor_of_step: Factor = 1.0, start: Start | None = None
    ) -> None:
        owner = self.owner
        keeps_result = p.data == TRAIN and not p.perturbed and not self._has_output
        owner.forget_gathered_weights()
        with self._draws.of(p.data, p.perturbed), ExitStack() as stack:
            if p.updates_statistics:
                self._starts[p.data] = start_of(owner._modules, owner._statistics) if start is None else start
            else:
                start = self._starts.get(p.data)
                stack.enter_context(statistics_aside(owner._modules, owner._statistics, start))
                if not owner._has_watched:
                    owner._has_watched, unnamed = True, UnnamedState(owner._modules, owner._statistics)
                    stack.callback(unnamed.tell_what_was_written)
            for number, (factor, part) in enumerate(parts):
                with self._without_reduction(number + 1 < len(parts)):
                    loss_fn = owner._losses.get(p.data, owner.loss_fn)
                    output = self._forward_backward(loss_fn, part, factor, keeps_result)
                if keeps_result:
                    self._outputs.append((factor * factor_of_step, _detached(output)))
        if keeps_result:
            self._has_output = True
            if len(parts) > 1:
                self._look_at_means([factor for factor, _ in parts])

    def _forward_backward(self, loss_fn: LossFunction, batch: Any, factor: Factor, is_first: bool) -> Any:
        owner = self.owner
        # The caller's own autocast may hold 16-bit copies of weights, which a recorded graph would read for ever.
        forget_old_weights()
        with torch.enable_grad():
            with containers_kept(batch):
                if owner.autocast is None:
                    output = loss_fn(owner.model, batch)
                else:
                    device = next(iter(owner._devices())).type
                    with torch.autocast(device, dtype=owner.autocast):
                        output = loss_fn(owner.model, batch)
            loss = loss_of(output)
            if is_first and owner.looks_at_means:
                self._means.append(terms_of(loss))
            loss = _counted(loss, factor) * factor
            if owner.scaler is not None:
                loss = owner.scaler.scale(loss)
            loss.backward()
        return output

    def _look_at_means(self, factors: Sequence[Factor]) -> None:
        """Refuses what is not a mean over what micro-batches weigh, before anything is updated."""
        if self.owner.looks_at_means:
            self.owner._looked_at += 1
            refuse_other_means(self._means, [float(factor) for factor in factors])

    def _without_reduction(self, wanted: bool) -> AbstractContextManager[None]:
        """DistributedDataParallel and FSDP2 reduce gradients over ranks with the last micro-batch alone."""
        model: Any = self.owner.model
        if not wanted:
            return nullcontext()
        if hasattr(model, "set_requires_gradient_sync"):
            return _without_sync(model)
        return model.no_sync() if hasattr(model, "no_sync") else nullcontext()

    def _of(self, parts: dict[str, list[tuple[Factor, Any]]], p: Pass) -> list[tuple[Factor, Any]]:
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

    def _parts(self, batch: Any, count: int) -> list[tuple[Factor, Any]]:
        """Micro-batches with what they count."""
        if count == 1:
            return [(1.0, batch)]
        owner = self.owner
        parts = weighed_parts(batch, count, owner._split, owner._weight, waits=not owner.is_recording)
        if hasattr(owner.model, "no_sync") or owner._gathering:
            return parts  # ranks have to meet in each of them
        # A mean over nothing is NaN, and so is its gradient.
        return [(factor, part) for factor, part in parts if isinstance(factor, Tensor) or factor > 0.0]

    # ------------------------------------------------------------------ descents

    def _finish(self, update: Update) -> None:
        """Makes the update, with clipping and GradScaler."""
        owner, optimizer = self.owner, self.optimizer
        if owner.max_grad_norm is not None:
            clipped = self._clipped(update)
            if clipped is None:
                optimizer.return_to_copies()
                return
            update = Update(clipped)
        if owner.scaler is None or not owner.scaler.is_enabled():
            self.stepper.update(update)
            return
        # GradScaler looks for infinities in p.grad; the sum has one wherever a list has one.
        lists = update.lists
        checked = lists[0] if len(lists) == 1 else self.stepper.combination(Update(*lists))
        assert checked is not None
        self._put_into_grad(checked)
        scaler = owner.scaler
        self.stepper.update_through(lambda: scaler.step(optimizer), update)
        scaler.update()

    def _clipped(self, update: Update) -> Gradients | None:
        owner, optimizer = self.owner, self.optimizer
        gradients = self.stepper.writable_gradient(update)
        if gradients is None:
            return None
        self._put_into_grad(gradients)
        if owner.scaler is not None and owner.scaler.is_enabled():
            owner.scaler.unscale_(optimizer)
        params = owner._params_as_clipped()
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

    def _add_to_sum(self, factor: Factor) -> Callable[[Update], None]:
        """Adds a micro-batch's factor of the final gradient, and goes back to the weights themselves."""

        def handler(update: Update) -> None:
            optimizer = self.optimizer
            gradients = self.stepper.combination(update)
            optimizer.return_to_copies()
            if gradients is None:
                self._is_finite = False
            elif isinstance(factor, Tensor):
                own = [None if g is None else g * factor for g in gradients]
                self._sum = added(self._sum, own, 1.0, optimizer.backend)
            else:
                self._sum = added(self._sum, gradients, factor, optimizer.backend)

        return handler


@contextmanager
def _without_sync(model: Any) -> Iterator[None]:
    """FSDP2's modules keep their gradients to themselves within the block."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def _counted(loss: Tensor, factor: Factor) -> Tensor:
    """The loss of a part; 0 if it counts nothing, where a mean over nothing would be NaN."""
    if isinstance(factor, Tensor):
        return torch.where(factor > 0.0, loss, 0.0)
    return loss if factor > 0.0 else torch.where(torch.zeros_like(loss, dtype=torch.bool), loss, 0.0)


def _detached(output: Any) -> Any:
    leaves, structure = tree_flatten(output)
    return tree_unflatten([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)
