"""What a method does to weights and to state of its own: the words that ``passes()`` is written in."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import sam_kernels
from sam_kernels.errors import WeightsConvertedError
from sam_kernels.layouts import wide_dtype
from sam_kernels.rules import RuleLike
from sam_kernels.scales import NUMBER, Scale

from .base_update import BaseUpdate
from .begun_step import refuse_overwritten
from .checks import radius
from .errors import StepOrderError
from .kept import KeptState
from .passes import Gradients
from .planning import PlanCache
from .report import StepReport

if TYPE_CHECKING:
    from .stepper import Stepper


class Primitives:
    """The moves of a method but the last, which is the :class:`Update` that it yields.

    A base optimizer with ``maximize`` minimises -f, and so must the method around it. Gradients are those of f
    everywhere; the moves by which a method leaves or changes the weights itself take them with the other sign in groups
    that maximise. That is enough: all lists of a group turn together, so Gram matrices, and what rules make of them,
    are the same for f and -f, also where some groups maximise and others do not.

    Attributes:
        base_optimizer: the base.
        backend: name of the kernels' backend; None for the best there is.
        method_state_names: what the method keeps by :meth:`method_state`. ``torch.distributed.checkpoint`` has to know
            it before there is any, to find it in a checkpoint.
    """

    backend: str | None
    method_state_names: tuple[str, ...] = ()
    stepper: Stepper
    # None of these is ever replaced: some wrappers of optimizers swallow assignments to attributes.
    _base: Optimizer
    _plans: PlanCache
    _kept: KeptState
    _base_update: BaseUpdate

    @property
    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups, with this method's settings added."""

    @abstractmethod
    def _params(self) -> list[Tensor]:
        """All parameters, group by group, as the present plan holds them."""

    # ------------------------------------------------------------------ moves

    def radii(self, setting: str = "rho") -> list[list[float | Tensor]]:
        """Each group's radius, in the form of the ``scale`` of :meth:`ascend` with one gradient list.

        Args:
            setting: its name in the groups.

        Raises:
            InvalidSettingError: unless each is a finite number of at least 0.
        """
        return [[radius(group[setting], setting)] for group in self.param_groups]

    def gram(self, *lists: Gradients) -> Tensor:
        """The Gram matrix of gradient lists: float64, shape (k, k), with T = 1, summed over all ranks."""
        refuse_overwritten(lists)
        return sam_kernels.gram(lists, self._plans.without_geometry, backend=self.backend)

    def ascend(self, *lists: Gradients, rule: RuleLike, scale: Scale = 1.0, follows_maximize: bool = True) -> None:
        """Perturbs the weights along a combination of gradient lists, and keeps copies of the weights.

        It always starts from the unperturbed weights: a second call replaces the perturbation of the first. To go on
        from w + e1, keep the gradient that led there and give both: ``ascend(g1, g2, rule=Normalized(), ...)`` leads to
        w + rho g1 / |g1| + rho g2 / |g2|, with norms in the geometry of w.

        Args:
            *lists: one to three gradient lists; those of earlier passes must be kept, ``Pass(kept=True)``.
            rule: computes the coefficients from the lists' Gram matrix.
            scale: a number, or one for each group and list, ``[[rho, rho], ...]``.
            follows_maximize: flip the lists' sign in groups that maximise, as is right for gradients and averages of
                them. False for lists that have that sign already, as the base optimizer's momentum.
        """
        refuse_overwritten(lists)
        if follows_maximize:
            scale = self._uphill(scale, len(lists))
        plans = self._plans
        xs = [plans.perturbed_only(x) for x in lists]
        ascent = sam_kernels.ascent_(
            plans.plan, xs, rule=rule, scale=scale, snapshot=plans.snapshot, backend=self.backend
        )
        self.stepper.step.report = StepReport(ascent)

    def look_ahead(self, gradients: Gradients) -> None:
        """Moves the weights to where the base optimizer's update with these gradients would lead. Its state stays.

        Call it after :meth:`ascend` along the same gradients: it starts from the copies that this has made. If the
        gradients were not finite, the weights are restored instead.
        """
        plans = self._plans
        others = plans.unperturbed_only(gradients)
        if others is not None:
            # They have no copies yet; those that have are restored on the way.
            sam_kernels.perturb_(plans.plan, [others], [0.0], snapshot=plans.snapshot, backend=self.backend)
        self._base_update.look_ahead(plans.plan, plans.snapshot, gradients, self._overflow(), self.backend)

    def return_to_copies(self) -> None:
        """Restores the weights, bit for bit, where copies of them are held.

        If the model was converted or moved meanwhile, the copies are converted.
        """
        plans = self._plans
        if plans.holds_copies:
            try:
                sam_kernels.restore_(plans.plan, plans.snapshot, backend=self.backend)
            except WeightsConvertedError:
                plans.snapshot.put_back(plans.plan)

    def add_to_weights(self, *lists: Gradients, scale: Scale) -> None:
        """w <- w + sum of scaled gradient lists: without geometry, copies or the base optimizer."""
        refuse_overwritten(lists)
        scale = self._uphill(scale, len(lists))
        plans = self._plans
        sam_kernels.perturb_(plans.widened, lists, [1.0] * len(lists), scale=scale, backend=self.backend)
        if plans.has_masters:
            sam_kernels.restore_(plans.plan, plans.snapshot, backend=self.backend)

    # ------------------------------------------------------------------ passes side by side

    @property
    def runs_in_parallel(self) -> bool:
        """Whether passes yielded together may name weights of their own."""
        return self.stepper.step.runs_in_parallel

    def ascent_point(self, *lists: Gradients, rule: RuleLike, scale: Scale = 1.0) -> list[Tensor]:
        """The point where :meth:`ascend` would lead, in memory that is kept from step to step. The weights stay."""
        refuse_overwritten(lists)
        scale = self._uphill(scale, len(lists))
        plans = self._plans
        plan, weights = plans.point("ascent")
        xs = [plans.perturbed_only(x) for x in lists]
        ascent = sam_kernels.ascent_(plan, xs, rule=rule, scale=scale, snapshot=weights, backend=self.backend)
        self.stepper.step.report = StepReport(ascent)
        return plans.weights_at(plan)

    def look_ahead_point(self, gradients: Gradients) -> list[Tensor]:
        """The point where :meth:`look_ahead` would lead, in memory of its own. Call it after :meth:`ascent_point`.

        For fused base optimizers; others can only update the model's weights.
        """
        plans = self._plans
        plan, weights = plans.point("look-ahead")
        params = plans.plan.params
        self._base_update.look_ahead(plan, weights, gradients, self._overflow(), self.backend, params)
        return plans.weights_at(plan)

    # ------------------------------------------------------------------ state of the method's own

    def method_state(self, name: str) -> list[Tensor | None]:
        """State of the method: an entry for each parameter, in the order of the groups. Part of ``state_dict()``.

        An entry belongs to its parameter and moves with it when the groups change; new parameters have None. List the
        names of what a method keeps in ``method_state_names``.

        It is held apart from the base's state, where a foreign key would make some bases think that theirs is complete.
        """
        kept = self._kept
        kept.follow(self._params())
        return kept.entries(name)

    def has_method_state(self, name: str) -> bool:
        """Whether some parameter has an entry of this name."""
        kept = self._kept
        kept.follow(self._plans.plan.params)
        return kept.has(name)

    def set_method_state(self, name: str, gradients: Gradients) -> None:
        """Makes these gradients the state, without copying them; None where there is none.

        In a captured step they are copied to where its state lies.
        """
        new = [None if g is None else g.detach() for g in gradients]
        state, kept = self.method_state(name), self._kept
        kept.forget_others(name)  # of a step before this one
        if kept.stays_in_place and [g is None for g in new] == [g is None for g in state]:
            pairs = [(old, g) for old, g in zip(state, new, strict=True) if old is not None and g is not None]
            torch._foreach_copy_([old for old, _ in pairs], [g for _, g in pairs])
        else:
            state[:] = new

    def gradients_of_zeros(self) -> Gradients:
        """Gradients of zeros, None for parameters that no kernel can read."""
        params, unreadable = self._params(), self._plans.plan.unreadable
        return [None if i in unreadable else torch.zeros_like(p, requires_grad=False) for i, p in enumerate(params)]

    def moving_average(
        self, name: str, gradients: Gradients, kept: float, starts_at_gradient: bool = False
    ) -> list[Tensor | None]:
        """m <- kept m + (1 - kept) g in the method's state. Returns m where there is a g; without a g, m stays.

        Args:
            starts_at_gradient: m starts at the first gradient; otherwise at zero.
        """
        refuse_overwritten([gradients])
        average = self.method_state(name)
        changed = gradients
        if starts_at_gradient:
            new = [i for i, g in enumerate(gradients) if g is not None and average[i] is None]
            for i in new:
                dtype = self._state_dtype(gradients[i])  # type: ignore[arg-type]
                average[i] = gradients[i].detach().to(dtype, copy=True)  # type: ignore[union-attr]
            changed = [None if i in new else g for i, g in enumerate(gradients)] if new else gradients
        old: Gradients = [None if g is None else m for g, m in zip(changed, average, strict=True)]
        self.store_combination(average, [old, changed], [kept, 1.0 - kept])
        return [None if g is None else m for g, m in zip(gradients, average, strict=True)]

    def store_combination(self, state: list[Tensor | None], lists: Sequence[Gradients], coefficients: Any) -> None:
        """state <- the lists combined, where some list has an entry. Missing entries of the state are created."""
        refuse_overwritten(lists)
        index = [i for i, entries in enumerate(zip(*lists, strict=True)) if any(e is not None for e in entries)]
        params = self._params()
        for i in index:
            if state[i] is None:
                state[i] = torch.zeros_like(params[i], dtype=self._state_dtype(params[i]), requires_grad=False)
        if index:
            out = self._kept.plan_of([state[i] for i in index])  # type: ignore[misc]
            chosen = [[x[i] for i in index] for x in lists]
            sam_kernels.combine_(out, chosen, coefficients, backend=self.backend)

    # ------------------------------------------------------------------ the rest

    def refuse_grad_scaler(self, reason: str) -> None:
        """For methods that can tell only within a step; others declare ``takes_scaled_gradients`` in their class.

        Raises:
            StepOrderError: if GradScaler drives the step.
        """
        if hasattr(self, "grad_scale"):
            raise StepOrderError(
                f"{type(self).__name__} cannot be used with GradScaler: {reason}. Use bfloat16, which needs no scaling."
            )

    def _overflow(self) -> bool | Tensor:
        """Whether the last ascent's gradients were not finite."""
        ascent = self.stepper.step.report.ascent
        return False if ascent is None else ascent.overflow

    def _uphill(self, scale: Scale, lists: int) -> Scale:
        """The scale, with its sign flipped in groups that maximise. A tensor's value is not looked at."""
        base = self._base
        # Bases that keep `maximize` as an attribute do not look for it in their groups.
        own = getattr(base, "maximize", None)
        if isinstance(own, bool):
            flags = [own] * len(base.param_groups)
        else:
            flags = [group.get("maximize", False) for group in base.param_groups]
        if not any(flags):
            return scale
        rows = [[scale] * lists] * len(flags) if isinstance(scale, NUMBER) else scale
        # A row that is not a list is left alone; reading the scale refuses it.
        turned = [up and not isinstance(row, (int, float, Real)) for row, up in zip(rows, flags, strict=False)]
        return [[-x for x in row] if turn else row for row, turn in zip(rows, turned, strict=False)]

    def _state_dtype(self, like: Tensor) -> torch.dtype:
        return wide_dtype(like.dtype) if self._plans.has_masters else like.dtype
