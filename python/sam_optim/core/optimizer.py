"""The optimizer that all methods share: what a user calls, and what the class of a method declares and overrides.

A method is a generator of gradient passes (:meth:`SharpnessAwareOptimizer.passes`). Everything here serves to run it.
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
        backend: name of the kernels' backend; by default the best one available.
        master_weights: keep float32 masters of weights in bfloat16 and float16, and the base optimizer's state in
            float32. Weights of such low precision lose most of a perturbation and of a small update; with masters the
            model holds the rounded w or w + e. The masters take the place of the copies that a perturbation
            otherwise needs. For base optimizers that are fused; part of ``state_dict()``.
        process_group: of the ranks that hold other parameters of the same model, as plain tensors: the stages of a
            pipeline, experts, parts that are not DTensors. Norms and products are then taken over all their
            parameters together, and all ranks must make the same steps. DTensors and replicas need no group.
        counts_in_norm: whether this rank counts a parameter in those sums; by default all are counted. If several
            ranks of the group hold a parameter, one of them must count it.
        **base_kwargs: arguments of the base optimizer's class.

    Attributes:
        base_optimizer: the base optimizer, whose ``param_groups`` and ``state`` this optimizer shares.
        last_step: a :class:`StepReport`.
        generators: the program's own random generators from which passes draw, see :class:`RandomState`; set it if you
            have any. Closures, ``TrainStep`` and the glue for trainers then let the passes of a step draw the same
            numbers from them, as from the global generators. They are not copied or saved with the optimizer.

    Raises:
        InvalidSettingError: for a setting out of range, and for a group's key that would have no effect.
        ValueError, BackendUnavailableError: for a backend that does not exist or cannot be used.
        TypeError: for an object that cannot be a base, keywords with an instance, or an unknown keyword.
    """

    # GradScaler.step then hands the gradient's scale to step() and leaves unscaling and skipping to it.
    _step_supports_amp_scaling = True

    # Whether the method asks for passes on the batch of the step before.
    uses_previous_batch = False

    # Whether passes() yields passes together, which a driver may run side by side.
    yields_passes_together = False

    # What passes() promises. A promise holds for the passes() of the class that declares it, or of a class above it:
    # see __init_subclass__.

    # GradScaler may be used: gradients c times as large, in all passes of a step, give the same perturbation and an
    # update c times as large, and nothing that is kept from step to step depends on c.
    takes_scaled_gradients: bool = False

    # Every step makes the same launches, so that one can be recorded and replayed for all.
    is_capturable: bool = False

    # Each micro-batch may be perturbed along its own gradient, with one step of the method for each.
    perturbs_micro_batches: bool = False

    # A step with radius 0 in all groups does nothing but the base's update with the gradient at w. Drivers that ask how
    # many passes there are then make only this one. Methods that keep averages cannot promise it.
    plain_steps_take_one_pass: bool = False

    # Why GradScaler may not be used.
    _scaling_obstacle = _UNDECLARED

    # Names of kept state in other packages, mapped to ours.
    _names_elsewhere: Mapping[str, str] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Takes back promises that were made for another ``passes()`` than the one of this class."""
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
        """Makes the parts: a stepper, plans for the kernels, the base's update, what is kept, checkpoints.

        None of them is replaced later; all that changes is inside them. Wrappers share an optimizer's ``__dict__``,
        and some swallow assignments to attributes.
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
        """One step of the method: yields :class:`Pass` objects, is sent their gradients, and last yields its update."""

    def geometry_of(self, group: dict[str, Any]) -> Sequence[float | None]:
        """The geometry of each parameter of a group: None for T = 1, or eta for T(w) = |w| + eta."""
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
        """Whether :meth:`step` can be left out without anybody noticing."""
        is_own = type(self).step is SharpnessAwareOptimizer.step and not has_own_step(self)
        return is_own and not is_profiled() and not hasattr(self, "grad_scale")

    def _is_plain_step(self) -> bool:
        """Whether this step equals the base's own, and is therefore left to the base, to have the same bits."""
        return False

    # ------------------------------------------------------------------ steps

    def first_step(self, zero_grad: bool = False) -> None:
        """Perturbs the weights along the gradient in ``p.grad``.

        With GradScaler the gradient may stay scaled: the perturbation does not depend on the scale. Some methods have
        steps of one pass. There this gradient is not used: ``second_step()`` updates with its own. The result is right,
        but costs the pass that other drivers save.

        Raises:
            StepOrderError: if a step is already begun (the weights are then restored), or there is no gradient.
        """
        stepper = self.stepper
        stepper.refuse_second_begin("first_step()")
        # Only second_step() makes updates, or GradScaler's step() in its place, which knows the gradient's scale.
        stepper.advance(zero_grad, to_last=True)

    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and updates them with the gradient in ``p.grad``. Runs hooks as ``step()`` does.

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
            The pass whose gradient the method wants first; None if it wants none, in which case the step is over.

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
        or is left by break, the weights are restored and the gradients cleared. To clip, do so after the backward of
        the pass that is ``last``. Loops of two optimizers may be nested or follow each other. ``zip()`` would leave the
        second before its update; a warning says so.

        Args:
            step: makes the update, and is called after the last pass; by default this optimizer's ``step()``. Give
                ``accelerated_optimizer.step`` for a wrapper whose own step() must be called, and
                ``lambda: scaler.step(optimizer)`` for GradScaler. If it changes ``p.grad``, the update uses what is
                there then; with methods that combine gradients, only after :meth:`combine_gradients`.

        Raises:
            StepOrderError: if a step is already begun (the weights are then restored), or ``step`` is that of a wrapper
                which must be called in every pass.
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
            closure: runs forward and backward, and returns the loss; it need not clear gradients. ``closure_runs`` says
                which passes it runs. Without a closure, a step begun with ``first_step`` is completed; this is how
                GradScaler calls it. With lr 0 in all groups and zero gradients, the call makes state for a checkpoint,
                as torch's tools expect.
            validation_closure: the same for the validation batch, for methods that use one.
            previous_closure: the same for the batch of the step before, for methods that use it; by default the
                closure that was given for that step.
            memory_closure: the same for the batch from memory, for methods that use one; None while there is none.
            closure_runs: overrides the constructor's.

        Returns:
            What the closure returned for its only pass, or for the first of several (the loss at the unperturbed
            weights). None without a closure, and if no pass was left for it, as in steps of one pass with
            ``"second_pass"``.

        Raises:
            StepOrderError: without a closure, if no step is begun or passes are missing; for a closure that cannot run
                again; for a closure under GradScaler; under GradScaler with a method that cannot be used with it; if a
                validation closure is missing. Whatever is raised, also by a closure, the weights are as they were
                before the step, and the gradients are cleared.
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
        """Puts the gradient that the update will use into ``p.grad``. Call it after the last backward pass of a step.

        It is needed to clip by hand, and before GradScaler's ``unscale_``, with methods whose update combines gradients
        of several passes: clipping only the last one would change their proportions. ``second_step()`` or ``step()``
        then uses what ``p.grad`` holds. For an update that uses the last gradient as it is, nothing is done.

        Raises:
            StepOrderError: before the last pass, or if there is no gradient (the weights are then restored).
        """
        self.stepper.combine_gradients()

    def restore(self) -> None:
        """Abandons a step under way: the weights are restored, bit for bit, and gradients are cleared.

        These gradients belong to the abandoned pass, and would be added to those of the next. Between steps this does
        nothing.
        """
        self.stepper.restore()

    @contextmanager
    def restore_on_error(self) -> Iterator[None]:
        """For passes driven by hand: calls :meth:`restore` and clears the gradients if the body raises."""
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
        """Whether a step is under way. If so, the weights may be perturbed."""
        return self.stepper.step.run is not None

    @property
    def waiting(self) -> Pass | None:
        """The pass whose gradient the step under way waits for; None between steps."""
        return self.stepper.waiting

    @property
    def last_step(self) -> StepReport:
        """A report of the last step, or of the one under way."""
        return self.stepper.step.report

    def watch(self, model: nn.Module) -> RemovableHandle:
        """From now on ``model.state_dict()`` holds the unperturbed weights, also in the middle of a step.

        This is for checkpoints that are written after an error. If a pass driven by hand raises, this optimizer does
        not know, and the model stays at its perturbed weights until :meth:`restore` is called. In the middle of a step
        the entries are copies; for a sharded model ``state_dict()`` is then refused. Whatever else reads the model,
        such as ``torch.save(model)``, gets the weights that it holds.

        Returns:
            A handle; its ``remove()`` ends this.
        """
        handle: RemovableHandle = model.register_state_dict_post_hook(UnperturbedEntries(self))
        return handle

    def catch_up(self, *, unseen: bool = False) -> None:
        """Brings master weights up to date with what somebody else has written into the weights since the last step.

        Every step begins with it. Where a weight still is its master rounded, the master is kept.

        Args:
            unseen: compare all weights, also those that seem unchanged. Writes through ``p.data`` cannot be noticed
                otherwise.
        """
        self._plans.catch_up(unseen)

    # ------------------------------------------------------------------ groups and state

    @property
    def base_optimizer(self) -> Optimizer:
        """The base optimizer, which makes the updates. It cannot be exchanged, but its attributes can be changed.

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
        """The base optimizer's state; a parameter's entries include what the method keeps for it.

        The names of the latter begin with ``sam_optim_``. Masters can be read here; ``load_state_dict()`` sets them.
        """
        return self._checkpoints.state

    @state.setter
    def state(self, state: Any) -> None:
        self._checkpoints.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer. What it lacks is taken from the ``defaults`` of both.

        Groups that were added to the base optimizer itself, or to ``param_groups``, get these when the next step
        begins.

        Raises:
            StepOrderError: in the middle of a step.
            InvalidSettingError: for a setting out of range. If a group is refused, by the base too, nothing changes.
        """
        self.stepper.refuse_mid_step("add_param_group() was called")
        groups.add(self, param_group)

    def state_dict(self) -> dict[str, Any]:
        """The state of base and method, which the plain base optimizer can load too. A perturbation is no part of it.

        What the method keeps for a parameter, and its master, stand among the base's entries for it, under names that
        begin with ``sam_optim_``. For parameters of which the base has no state they are in ``"method_state"``.

        Raises:
            StepOrderError: in the middle of a step, once it has changed anything.
        """
        return self._checkpoints.save()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer or of the plain base optimizer. If it raises, nothing has changed.

        Settings of the method that it lacks stay as they are. Copies of weights, which other SAM classes leave in their
        state, are not loaded.

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
        """Calls ``train()`` of a base optimizer that has two modes, as schedule-free ones do. Other bases lack it.

        Raises:
            StepOrderError: if it would change anything in the middle of a step.
        """
        return self._switch("train")

    @property
    def eval(self) -> Callable[[], None]:
        """As :attr:`train`, for ``eval()``: the model then holds the weights to evaluate and to save."""
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
