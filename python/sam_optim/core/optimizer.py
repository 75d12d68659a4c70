"""The optimizer that all methods share: what its user calls, and what a method's class says and overrides.

A method is a generator of gradient passes (:meth:`SharpnessAwareOptimizer.passes`); everything here serves to run it.
"""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypeVar, get_args, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sam_kernels.host import same_objects
from sam_kernels.registry import backend_named

from . import closures, groups
from .base_update import BaseUpdate
from .checkpoints import Checkpoints
from .checks import check_choice
from .closures import Closure, ClosureRuns
from .compiling import prepare, untraced
from .construction import (
    WRAP_AROUND,
    BaseOptimizer,
    defaults_of,
    make_base,
    reads_from_groups,
    takes_single_samples,
)
from .errors import InvalidSettingError, StepOrderError
from .kept import KeptState
from .passes import MEMORY, PREVIOUS, TRAIN, VALIDATION, Pass, Passes
from .planning import PlanCache
from .primitives import Primitives
from .report import StepReport
from .settings import EVERYWHERE, SettingsInGroups
from .step_hooks import has_own_step, is_profiled, runs_its_own_hooks
from .stepper import Stepper
from .watching import UnperturbedEntries

Loss = TypeVar("Loss")

_UNDECLARED = (
    "its class does not say takes_scaled_gradients = True beside passes(), as a method may where gradients of another "
    "scale make the same perturbation, an update of that scale, and nothing else"
)
_PROMISES: dict[str, Any] = {
    "takes_scaled_gradients": False,
    "is_capturable": False,
    "perturbs_micro_batches": False,
    "plain_steps_take_one_pass": False,
    "_scaling_obstacle": _UNDECLARED,
}


class SharpnessAwareOptimizer(SettingsInGroups, Primitives, Optimizer):
    """Base class of the methods.

    Args:
        params: parameters, (name, parameter) pairs or group dicts, as for any torch optimizer.
        base_optimizer: a class or factory, called as ``base_optimizer(params, **base_kwargs)``, or an instance, whose
            groups are then used as they are. The bases in :data:`sam_kernels.bases.BASES` are fused into the last
            pass over the weights; any other runs by its own ``step()`` after the weights have been restored.
        method_defaults: default of each setting that this method keeps in the groups, besides those that its class
            declares.
        closure_runs: what ``step(closure)`` calls its closure for. ``"second_pass"``, as in other SAM classes: the
            first gradient is already in ``p.grad``. ``"every_pass"``, as in L-BFGS: the closure is called once for
            each pass, each time with the same random state.
        backend: name of the kernels' backend; by default the best there is.
        master_weights: keep float32 masters of weights in bfloat16 and float16, and the base optimizer's state in
            float32. Weights so coarse lose most of a perturbation and of a small update; with masters the model holds
            the roundings of w and of w + e. The masters take the place of the copies that a perturbation needs
            otherwise. For ``SGD``, ``Adam`` and ``AdamW``; part of ``state_dict()``.
        process_group: of the ranks that hold other parameters of the same model, as plain tensors: the stages of a
            pipeline, experts, parts that are not DTensors. Norms and products are then of all their parameters
            together, and all of them have to make the same steps. DTensors and replicas need nothing.
        counts_in_norm: for a parameter, whether this rank counts it in those sums; by default all are counted. Of a
            parameter that several ranks of the group hold, one has to.
        **base_kwargs: of the base optimizer's class.

    Attributes:
        base_optimizer: the base; ``param_groups`` and ``state`` are its own.
        last_step: a :class:`StepReport`.
        generators: random generators of the program's own from which passes draw, see :class:`RandomState`; to be set.
            What runs a step's passes (closures, ``TrainStep``, the glue for trainers) lets them draw alike, as it does
            with the global ones. They are not copied or saved with the optimizer.

    Raises:
        InvalidSettingError: for a setting out of range, and for a group's key that would do nothing.
        ValueError, BackendUnavailableError: for a backend that there is not.
        TypeError: for a base that cannot serve, keywords with an instance, or a keyword that nobody knows.
    """

    # GradScaler.step then hands the gradient's scale to step() and leaves unscaling and skipping to it.
    _step_supports_amp_scaling = True

    # Whether passes on the batch of the step before are asked for.
    uses_previous_batch = False

    # Whether passes() yields passes together, which a driver may run side by side.
    yields_passes_together = False

    # What passes() promises. Each holds for the passes() that it is declared with, or after; see __init_subclass__.

    # GradScaler may be used: gradients c times as large, in all passes of a step, make the perturbation that they would
    # make without c and an update c times as large, and nothing that is kept from step to step depends on c.
    takes_scaled_gradients: bool = False

    # Every step makes the same moves, so that one can be recorded and replayed for all.
    is_capturable: bool = False

    # Micro-batches may be perturbed each along its own gradient, one step of the method for each.
    perturbs_micro_batches: bool = False

    # A step with radius 0 in all groups does nothing but the base's update with the gradient at w, so that this one
    # gradient is enough for drivers that ask how many passes there are. Whoever keeps averages cannot promise it.
    plain_steps_take_one_pass: bool = False

    # Why GradScaler may not be used.
    _scaling_obstacle = _UNDECLARED

    # What the method keeps under names of other packages: from theirs to ours.
    _names_elsewhere: Mapping[str, str] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Promises of a class hold for its own ``passes()``, not for one that a class derived from it puts in place."""
        super().__init_subclass__(**kwargs)
        owners = cls.__mro__
        passes = next(number for number, owner in enumerate(owners) if "passes" in vars(owner))
        for name, value in _PROMISES.items():
            declared = next(number for number, owner in enumerate(owners) if name in vars(owner))
            if declared > passes:
                setattr(cls, name, value)

    generators: Sequence[Any] = ()

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        method_defaults: Mapping[str, Any] = MappingProxyType({}),
        *,
        closure_runs: ClosureRuns = "second_pass",
        backend: str | None = None,
        master_weights: bool = False,
        process_group: Any = None,
        counts_in_norm: Callable[[Tensor], bool] | None = None,
        **base_kwargs: Any,
    ) -> None:
        check_choice("closure_runs", closure_runs, get_args(ClosureRuns))
        check_choice("master_weights", master_weights, [False, True])
        if backend is not None:
            backend_named(backend)
        if counts_in_norm is not None and not callable(counts_in_norm):
            raise InvalidSettingError(f"Invalid counts_in_norm: {counts_in_norm!r}; it is a function of a parameter")
        if counts_in_norm is not None and process_group is None:
            raise InvalidSettingError("counts_in_norm says nothing without a process_group")
        more = dict(method_defaults)
        settings = self._taken(base_kwargs, more)
        base = make_base(params, base_optimizer, base_kwargs, type(self))
        more.update(self._kept_in_groups)
        shared = sorted(set(defaults_of(base)) & {*more, *(EVERYWHERE & settings.keys())})
        if shared:
            raise InvalidSettingError(
                f"{type(base).__name__} cannot be the base optimizer: it keeps {', '.join(shared)} in its groups, "
                f"where {type(self).__name__} has a setting of that name"
            )
        prepare()
        of_base = [name for name in settings if name not in EVERYWHERE and reads_from_groups(base, name)]
        method_defaults = self._method_defaults = {**self._named(settings, of_base), **more}
        self._given_defaults = dict(getattr(base, "defaults", {}))
        self._base = base
        for group in base.param_groups:
            groups.complete(self, group, method_defaults, is_first=True)
        self._refuse_differences()

        self.closure_runs = closure_runs
        self.backend = backend
        self.master_weights = master_weights
        self.process_group = process_group
        self.counts_in_norm = counts_in_norm
        self._make_parts()
        self._base_update.check_masters()
        self._base_update.widen_state()
        # torch's constructor sets up hooks and profiling. It also empties groups and state, which are the base's own,
        # and adds a group, which makes some bases share their parameters out anew.
        self._base = SimpleNamespace(defaults={}, add_param_group=lambda group: None)  # type: ignore[assignment]
        super().__init__([{"params": []}], {**self._given_defaults, **method_defaults})
        self._base = base
        self._checkpoints.watch_base()

    def _make_parts(self) -> None:
        """What the optimizer has: a stepper, plans for the kernels, the base's update, what is kept, checkpoints.

        None of them is replaced later, and what changes is in them: wrappers share an optimizer's ``__dict__``, and
        some swallow the writing of attributes.
        """
        self.stepper = Stepper(self)
        self._plans = PlanCache(self.master_weights, self.process_group, self.counts_in_norm)
        self._base_update = BaseUpdate(self._base, self.master_weights)
        self._kept = KeptState()
        self._checkpoints = Checkpoints(self)
        self._mode: list[str] = []  # that the base was switched to last

    # ------------------------------------------------------------------ the method

    @abstractmethod
    def passes(self) -> Passes:
        """One step of the method: yields :class:`Pass` objects and is sent their gradients, and yields its update."""

    def geometry_of(self, group: dict[str, Any]) -> Sequence[float | None]:
        """For each parameter of a group None for T = 1, or eta for T(w) = |w| + eta."""
        return [None] * len(group["params"])

    def is_perturbed_group(self, group: dict[str, Any]) -> bool:
        """Whether a group takes part in the perturbation and in its norm."""
        return bool(group.get("perturb", True))

    def obstacle_to_parallel_passes(self) -> str | None:
        """Why no passes of this method can run side by side; None if some can."""
        if self.yields_passes_together:
            return None
        return f"{type(self).__name__} has no passes that can run side by side: each needs the gradient before it"

    def _needs_no_step_call(self) -> bool:
        """Whether nobody would notice that :meth:`step` is not called."""
        is_own = type(self).step is SharpnessAwareOptimizer.step and not has_own_step(self)
        return is_own and not is_profiled() and not hasattr(self, "grad_scale")

    def _is_plain_step(self) -> bool:
        """Whether this step is the base's own, bit for bit, and must therefore be made by the base itself."""
        return False

    # ------------------------------------------------------------------ steps

    def first_step(self, zero_grad: bool = False) -> None:
        """Perturbs the weights along the gradient in ``p.grad``.

        With GradScaler the gradient may stay scaled: the perturbation does not depend on the scale. In a step of one
        pass, of methods that have such steps, the gradient is not used: ``second_step()`` updates with its own, which
        is right and costs the pass that other drivers save.

        Raises:
            StepOrderError: if a step is already begun (the weights are then restored), or there is no gradient.
        """
        stepper = self.stepper
        stepper.refuse_second_begin("first_step()")
        # Only second_step() makes updates, or GradScaler's step() in its place, which knows the gradient's scale.
        stepper.advance(zero_grad, to_last=True)

    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and updates them with the gradient in ``p.grad``; runs hooks as ``step()`` does.

        Raises:
            StepOrderError: if no step is begun.
        """
        if not self.is_step_begun:
            raise StepOrderError("second_step() was called without first_step()")
        if self.advance() is not None:
            self._refuse_more_passes("second_step()")
        if zero_grad:
            self.zero_grad()

    def advance(self, zero_grad: bool = False) -> Pass | None:
        """Hands ``p.grad`` to the method as the gradient it waits for; begins a step if none is begun.

        Args:
            zero_grad: clear the gradients afterwards.

        Returns:
            The pass whose gradient the method wants next, or None if the step is complete.

        Raises:
            StepOrderError: if there is no gradient (the weights are then restored).
        """
        stepper, state = self.stepper, self.stepper.step
        if state.caller is not None or stepper.optimizer is self:
            return stepper.advance(zero_grad)
        # A wrapper that is of this class too, as Lightning's: the update goes through its step().
        state.caller = self.step
        try:
            return stepper.advance(zero_grad)
        finally:
            state.caller = None

    def begin(self) -> Pass | None:
        """Begins a step, for drivers that hand each gradient over by :meth:`advance`. Clears the gradients.

        Returns:
            The pass whose gradient the method wants first; None if it wants none for this step, which is over then.

        Raises:
            StepOrderError: if a step is already begun (the weights are then restored).
        """
        return self.stepper.begin()

    def each_pass(self, step: Callable[[], object] | None = None) -> Iterator[Pass]:
        """Makes a step of any method in a loop whose body runs forward and backward for the pass it is given::

            for p in optimizer.each_pass():
                x, y = train_batch if p.data == "train" else validation_batch
                loss_fn(model(x), y).backward()

        Gradients are cleared before the first pass and after each, so accumulate within the body. If the body raises,
        or is left by break, the weights are restored and the gradients cleared. To clip, do it after the backward of
        the pass that is ``last``. Passes of two optimizers go one within the other or one after the other: ``zip()``
        leaves the second before its update, and a warning says so.

        Args:
            step: what makes the update, called when the last pass is through; by default this optimizer's ``step()``.
                For wrappers whose own step() must be called, ``accelerated_optimizer.step``, and for GradScaler,
                ``lambda: scaler.step(optimizer)``. Where it changes ``p.grad`` before, the update takes what is there
                then; with methods that combine gradients, after :meth:`combine_gradients` alone.

        Raises:
            StepOrderError: if a step is already begun (the weights are then restored), or ``step`` is of a wrapper that
                has to be called in every pass.
        """
        stepper, state = self.stepper, self.stepper.step
        wrapper = getattr(step, "__self__", None)
        # accelerate's wrapper knows its scaler.
        stepper.refuse_scaler(getattr(wrapper, "scaler", None))
        if takes_single_samples(wrapper):
            raise StepOrderError(
                f"{type(wrapper).__name__} cannot make the update of each_pass(): it clips gradients of single "
                f"samples, and has to do so in every pass. {WRAP_AROUND}"
            )
        waiting = stepper.begin("each_pass()")
        run = state.run
        try:
            while waiting is not None:
                yield waiting
                state.caller = step
                try:
                    waiting = self.advance(zero_grad=True)
                finally:
                    state.caller = None
        finally:
            # A body that was left early leaves this step under way; another step is none of this loop's business.
            if run is not None and state.run is run:
                makes_no_update = waiting is not None and waiting.last and stepper.has_gradients()
                self.restore()
                if makes_no_update:
                    warnings.warn(
                        "each_pass() was left after the backward of its last pass, so this step makes no update. (Of "
                        "zip(one.each_pass(), two.each_pass()) that happens to the second in every step.) Where it is "
                        "meant, call restore() before leaving.",
                        stacklevel=2,
                    )

    @overload
    def step(
        self,
        closure: None = None,
        validation_closure: Closure | None = None,
        previous_closure: Closure | None = None,
        *,
        memory_closure: Closure | None = None,
        closure_runs: ClosureRuns | None = None,
    ) -> None: ...

    @overload
    def step(
        self,
        closure: Callable[[], Loss],
        validation_closure: Closure | None = None,
        previous_closure: Closure | None = None,
        *,
        memory_closure: Closure | None = None,
        closure_runs: ClosureRuns | None = None,
    ) -> Loss: ...

    @runs_its_own_hooks
    def step(
        self,
        closure: Closure | None = None,
        validation_closure: Closure | None = None,
        previous_closure: Closure | None = None,
        *,
        memory_closure: Closure | None = None,
        closure_runs: ClosureRuns | None = None,
    ) -> Any:
        """Makes or completes a step.

        Args:
            closure: clears nothing, runs forward and backward, and returns the loss. Which passes it runs is said by
                ``closure_runs``. None completes a step begun with ``first_step``; this is how GradScaler calls it.
                With lr 0 in all groups and gradients of zeros it makes state for a checkpoint, as torch's tools ask.
            validation_closure: the same for the validation batch, for methods that use one.
            previous_closure: the same for the batch of the step before, for methods that use it; by default the
                closure that was given for that step.
            memory_closure: the same for the batch from memory, for methods that use one; None while there is none.
            closure_runs: overrides the constructor's.

        Returns:
            What the closure returned: for its only pass, or for the first of several (the loss at the weights
            themselves). None without a closure, and where no pass was left for it, as in steps of one pass by
            ``"second_pass"``.

        Raises:
            StepOrderError: without closure if no step is begun or passes are missing; with a closure that cannot run
                again, or under GradScaler, which some methods cannot take at all; without a validation closure where
                the method needs one. Whatever is raised, also by a closure, the weights are then as they were before
                the step, and gradients of its passes are cleared.
        """
        stepper, state = self.stepper, self.stepper.step
        grad_enabled = torch.is_grad_enabled()
        try:
            state.is_in_step_call = True
            if hasattr(self, "grad_scale"):
                stepper.refuse_scaled_step()
            if state.left is not None:
                return stepper.make_left_update(state.left)
            if closure is None:
                return self._finish()
            closures.refuse_scaler(self)
            closures.refuse_what_trainers_do_between(stepper, closure)
            own = {
                TRAIN: closure,
                VALIDATION: validation_closure,
                PREVIOUS: previous_closure or state.previous_closure,
                MEMORY: memory_closure,
            }
            runs = self.closure_runs if closure_runs is None else closure_runs
            check_choice("closure_runs", runs, get_args(ClosureRuns))
            loss = closures.run_closures(stepper, own, runs)
            state.previous_closure = closure if self.uses_previous_batch else None
            return loss
        except BaseException:
            torch.set_grad_enabled(grad_enabled)
            # GradScaler removes its attributes only if step() returns; a later step must not find them.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            self.restore()
            raise
        finally:
            state.is_in_step_call = False

    def _finish(self) -> None:
        if not self.is_step_begun:
            if self._checkpoints.is_state_asked_for():
                self._checkpoints.make_state()
                return
            raise StepOrderError(
                "step() without a closure completes a step, and none is begun. Call first_step() after the first "
                "backward and step() or second_step() after the second, or pass a closure. (GradScaler takes no "
                "closure, so Lightning with precision='16-mixed' needs manual optimization.)"
            )
        if self.advance() is not None:
            self._refuse_more_passes("step()")

    def _refuse_more_passes(self, action: str) -> None:
        run = self.stepper.step.run
        assert run is not None
        self.restore()
        raise StepOrderError(
            f"{action} was called after pass {run.number}, but the method needs more; drive it with each_pass()"
        )

    def combine_gradients(self) -> None:
        """After the backward of a step's last pass: puts the gradient that the update will take into ``p.grad``.

        For clipping by hand, and before GradScaler's ``unscale_``, with methods whose update combines gradients of
        several passes: to clip the last one alone would change their weights against each other. The step's end,
        ``second_step()`` or ``step()``, then takes what ``p.grad`` holds. Where the update takes the last gradient as
        it is, nothing has to be done, and nothing is.

        Raises:
            StepOrderError: before the last pass, or if there is no gradient (the weights are then restored).
        """
        self.stepper.combine_gradients()

    def restore(self) -> None:
        """Abandons a step under way: the weights are as they were before it, bit for bit, and gradients are cleared.

        They belong to a pass that is given up, and would be added to the next one's. Between steps nothing is done.
        """
        self.stepper.restore()

    @contextmanager
    def restore_on_error(self) -> Iterator[None]:
        """For passes driven by hand: if the body raises, calls :meth:`restore` and clears the gradients."""
        try:
            yield
        except BaseException:
            self.restore()
            self.zero_grad()
            raise

    @untraced
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        super().zero_grad(set_to_none)
        self.stepper.gradients_are_cleared()

    # ------------------------------------------------------------------ where training stands

    @property
    def is_step_begun(self) -> bool:
        """Whether a step is under way; the weights may be perturbed then."""
        return self.stepper.step.run is not None

    @property
    def waiting(self) -> Pass | None:
        """The pass whose gradient the step under way waits for; None between steps."""
        return self.stepper.waiting

    @property
    def last_step(self) -> StepReport:
        """What the last step, or the one under way, did."""
        return self.stepper.step.report

    def watch(self, model: nn.Module) -> RemovableHandle:
        """From now on ``model.state_dict()`` holds the weights themselves, also in the middle of a step.

        For checkpoints that are written when something went wrong: of an exception in a pass driven by hand this
        optimizer knows nothing, and the model is left at its perturbed weights until :meth:`restore` is called. In the
        middle of a step the entries are copies, and of a sharded model refused. Whatever else reads the model, such as
        ``torch.save(model)``, finds what it holds.

        Returns:
            A handle; its ``remove()`` ends this.
        """
        handle: RemovableHandle = model.register_state_dict_post_hook(UnperturbedEntries(self))
        return handle

    def catch_up(self, *, unseen: bool = False) -> None:
        """Lets master weights follow what somebody else has written into the weights since the last step.

        Every step begins with it. Elements that still are their masters' roundings keep them.

        Args:
            unseen: look at all weights, also at those that seem unchanged. What is written through ``p.data`` cannot
                be seen.
        """
        self._plans.catch_up(unseen)

    # ------------------------------------------------------------------ groups and state

    @property
    def base_optimizer(self) -> Optimizer:
        """Makes the updates. It stays what it was made or given as; whatever it has can be changed.

        Raises:
            InvalidSettingError: if another one is assigned.
        """
        return self._base

    @base_optimizer.setter
    def base_optimizer(self, base: Any) -> None:
        if base is not self._base:
            name, own = type(self).__name__, type(self._base).__name__
            raise InvalidSettingError(
                f"base_optimizer of {name} cannot be replaced, by {type(base).__name__} neither: everything here is "
                f"made for {own}. Make another optimizer, {name}(params, {type(base).__name__}, ...), and go on with "
                "that"
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's groups, with this method's settings added."""
        return self._base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._base.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state, and among a parameter's entries what the method keeps for it.

        Names of the latter begin with ``sam_optim_``. Masters can be read there, and are set by ``load_state_dict()``.
        """
        return self._checkpoints.state

    @state.setter
    def state(self, state: Any) -> None:
        self._checkpoints.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer, with the ``defaults`` of both where it does not say otherwise.

        Groups that were added to the base optimizer itself, or to ``param_groups``, get them when the next step begins.

        Raises:
            StepOrderError: in the middle of a step.
            InvalidSettingError: for a setting out of range. What is refused, by the base too, changes nothing.
        """
        self.stepper.refuse_mid_step("add_param_group() was called")
        groups.add(self, param_group)

    def state_dict(self) -> dict[str, Any]:
        """Base and method state, loadable by the plain base optimizer too. The perturbation is never part of it.

        What the method keeps for a parameter, and its master, stand among the base's entries for it, under names that
        begin with ``sam_optim_``; for parameters without state of the base they are in ``"method_state"``.

        Raises:
            StepOrderError: in the middle of a step, once it has changed anything.
        """
        return self._checkpoints.save()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer or of the plain base optimizer; all of it, or nothing if it raises.

        Settings of the method that it lacks stay as they are. Copies of weights, as other SAM classes leave them in
        their state, are left out.

        Raises:
            StepOrderError: in the middle of a step.
            ValueError: for another number of groups or parameters, or other shapes.
        """
        self._checkpoints.load(state_dict)

    def _params(self) -> list[Tensor]:
        base_groups = self._base.param_groups
        are_known = same_objects(
            base_groups if type(base_groups) is list else list(base_groups), self._plans.known_groups
        )
        if not are_known:
            groups.complete_all(self)
        params = self._plans.update(base_groups, self.geometry_of, self.is_perturbed_group).params
        if not are_known:
            self._checkpoints.adopt_kept(params)
        return params

    def __getstate__(self) -> dict[str, Any]:
        self.stepper.refuse_mid_step("the optimizer was copied or pickled")
        # As by torch, hooks stay behind: they are bound to what they were made for.
        own = {k: v for k, v in self.__dict__.items() if k not in _NOT_PICKLED and not _are_hooks(k)}
        return {**own, **self._checkpoints.pickled()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_keys" not in state:
            raise ValueError(
                f"this {type(self).__name__} was copied or pickled by an older version of sam_optim, which kept its "
                "settings elsewhere: save its state_dict() there, and load that into an optimizer made here"
            )
        state = dict(state)
        kept: dict[str, Any] = {name: state.pop(name) for name in ("method state", "masters") if name in state}
        super().__setstate__(state)
        self._make_parts()
        self._checkpoints.watch_base()
        self._checkpoints.unpickled(kept)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.process_group is not None:
            raise TypeError(
                "an optimizer with a process_group cannot be pickled, since a process group belongs to its process: "
                "save its state_dict(), and load that into an optimizer made with the group of the other process"
            )
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.counts_in_norm is not None:
            raise TypeError(
                "an optimizer with counts_in_norm cannot be copied, since that speaks of its own parameters: make "
                "another optimizer for the copied model, and load this one's state_dict()"
            )
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    # ------------------------------------------------------------------ what a base may have besides

    @property
    def train(self) -> Callable[[], None]:
        """``train()`` of a base optimizer that has two modes, as schedule-free ones do; missing where it has none.

        Raises:
            StepOrderError: if called in the middle of a step, unless it changes nothing.
        """
        return self._switch("train")

    @property
    def eval(self) -> Callable[[], None]:
        """As :attr:`train`; the model then holds the weights that are to be evaluated and saved."""
        return self._switch("eval")

    def _switch(self, mode: str) -> Callable[[], None]:
        switch = getattr(self._base, mode, None)
        if not callable(switch):
            base = type(self._base).__name__
            raise AttributeError(f"{type(self).__name__} has no {mode}(): its base optimizer {base} has none")

        def change() -> None:
            # Hugging Face's Trainer calls train() before each micro-batch, of every pass.
            if not self.stepper.is_as_if_not_begun():
                if mode == "train" and self._mode == ["train"] and self.is_step_begun:
                    return
                self.stepper.refuse_mid_step(f"{mode}() was called")
            switch()
            self._mode[:] = [mode]

        return change

    def _patch_step_function(self) -> None:
        # torch would wrap a step() of a subclass, which calls the one here, and the hooks would run twice.
        cls: Any = type(self)
        if not getattr(cls.step, "hooked", False):
            cls.step.hooked = True
        super()._patch_step_function()


# What is made anew, or bound to what it was made for.
_PARTS = ("stepper", "_plans", "_base_update", "_kept", "_checkpoints", "_mode")
_NOT_PICKLED = frozenset((*_PARTS, "step", "grad_scale", "found_inf", "generators"))


def _are_hooks(attribute: str) -> bool:
    return attribute.startswith("_optimizer_") and attribute.endswith("_hooks")
