"""What a method does to weights and to state of its own, in terms of the kernels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

import sam_kernels
from sam_kernels import LaunchReport
from sam_kernels.errors import WeightsConvertedError
from sam_kernels.layouts import wide_dtype
from sam_kernels.rules import Fixed, RuleLike
from sam_kernels.scales import NUMBER, Scale
from sam_kernels.sharding import is_distributed
from sam_kernels.snapshot import TAKEN

from .base_update import BaseUpdate, Outcome, added, combined_gradient
from .errors import StepOrderError
from .kept import KeptState
from .passes import Gradients, refuse_overwritten
from .planning import PlanCache

_FIXED = Fixed()


class StepReport(NamedTuple):
    """What the last step did. Nothing in it is computed, and no GPU is waited for, unless read.

    Norms are those that the kernels took: |T g| in the geometry of the perturbation, which is |g| but for ASAM, over
    the parameters that are perturbed. Until the update they are of gradients as scaled as ``p.grad`` was, afterwards of
    unscaled ones where GradScaler has said its scale (it does not after ``unscale_``).

    Attributes:
        ascent: scalars of the perturbation: norms, coefficients, and ``finite``, False if the gradient was not finite
            and the weights were therefore left unperturbed.
        descent: scalars of the update; None before it. Of an update that takes the last gradient as it is, as SAM's,
            nobody looks at the numbers, as in torch's own optimizers: ``finite`` and ``norms`` are None then, and a
            gradient that is not finite makes weights that are not. To know, look before the update
            (``clip_grad_norm_(..., error_if_nonfinite=True)``), or use GradScaler.
    """

    ascent: LaunchReport | None = None
    descent: LaunchReport | None = None
    outcome: Outcome | None = None

    @property
    def updated(self) -> bool:
        """Whether the base optimizer's update was made, be its gradient finite or not.

        False after an overflow that GradScaler found, or where the gradients of the descent were needed in a Gram
        matrix and were not finite.
        """
        return self.outcome is not None and self.outcome.updated

    def __repr__(self) -> str:
        return f"StepReport(ascent={self.ascent}, descent={self.descent}, updated={self.updated})"

    def unread(self) -> StepReport:
        """The same, with nothing known yet of what lies on a GPU."""
        ascent = None if self.ascent is None else self.ascent.unread()
        descent = None if self.descent is None else self.descent.unread()
        outcome = None if self.outcome is None else self.outcome._replace(report=self.outcome.report.unread())
        return StepReport(ascent, descent, outcome)


class Moves:
    """The moves of a method but the last, which is a step of the optimizer.

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

    base_optimizer: Optimizer
    backend: str | None
    method_state_names: tuple[str, ...] = ()
    _container: dict[str, Any]  # because some wrappers of optimizers swallow the writing of attributes

    @abstractmethod
    def _params(self) -> list[Tensor]:
        """All parameters, group by group, as the kernels' plan of this moment holds them."""

    def gram(self, *lists: Gradients) -> Tensor:
        """The Gram matrix of gradient lists, float64, shape (k, k), with T = 1 and of all ranks' parts together."""
        refuse_overwritten(lists)
        plans: PlanCache = self._container["plans"]
        return sam_kernels.gram(lists, plans.without_geometry, backend=self.backend)

    def ascend(self, *lists: Gradients, rule: RuleLike, scale: Scale = 1.0, follows_maximize: bool = True) -> None:
        """Perturbs the weights along a combination of gradient lists, keeping their copies.

        From the weights themselves, also where they are perturbed: a second call takes the place of the first. To go on
        from w + e1, keep the gradient that led there and give both: ``ascend(g1, g2, rule=Normalized(), ...)`` leads to
        w + rho g1 / |g1| + rho g2 / |g2|, with norms in the geometry of w.

        Args:
            *lists: one to three gradient lists; those of earlier passes have to be kept, ``Pass(kept=True)``.
            rule: makes the coefficients of the lists' Gram matrix.
            scale: a number, or one for each group and list, ``[[rho, rho], ...]``.
            follows_maximize: take the lists with the other sign in groups that maximise, as is right for gradients and
                averages of them. False for lists that have the sign of what is minimised already, as the base
                optimizer's momentum.
        """
        refuse_overwritten(lists)
        if follows_maximize:
            scale = self._uphill(scale, len(lists))
        plans: PlanCache = self._container["plans"]
        xs = [plans.perturbed_only(x) for x in lists]
        ascent = sam_kernels.ascent_(
            plans.plan, xs, rule=rule, scale=scale, snapshot=plans.snapshot, backend=self.backend
        )
        self._container["report"] = StepReport(ascent)

    def _uphill(self, scale: Scale, lists: int) -> Scale:
        """The scale, with the other sign in groups that maximise. A tensor's value is not looked at."""
        base = self.base_optimizer
        # Bases that keep it as an attribute do not look for it in their groups.
        own = getattr(base, "maximize", None)
        flags = [own if isinstance(own, bool) else group.get("maximize", False) for group in base.param_groups]
        if not any(flags):
            return scale
        rows = [[scale] * lists] * len(flags) if isinstance(scale, NUMBER) else scale
        # A row that is none is complained of where scales are read.
        turned = [up and not isinstance(row, (int, float, Real)) for row, up in zip(rows, flags, strict=False)]
        return [[-x for x in row] if turn else row for row, turn in zip(rows, turned, strict=False)]

    def combined(self, lists: Sequence[Gradients], rule: RuleLike = _FIXED, scale: Scale = 1.0) -> Gradients | None:
        """The gradient that a descent with these lists would take, in new tensors, None where no list has an entry.

        None altogether if the rule needs a Gram matrix and that is not finite: the descent would update nothing.
        """
        refuse_overwritten(lists)
        return combined_gradient(self._container["plans"].plan, lists, rule, scale, self.backend)

    def added(self, total: Gradients | None, gradients: Gradients, share: float) -> Gradients:
        """total + share * gradients, in place where there is a total."""
        return added(total, gradients, share, self.backend)

    def return_to_copies(self) -> None:
        """Puts the weights themselves back, bit for bit, where copies of them are held.

        A model that was converted or moved meanwhile gets them converted.
        """
        plans: PlanCache = self._container["plans"]
        if plans.holds_copies:
            try:
                sam_kernels.restore_(plans.plan, plans.snapshot, backend=self.backend)
            except WeightsConvertedError:
                plans.snapshot.put_back(plans.plan)

    def look_ahead(self, gradients: Gradients) -> None:
        """To where the base optimizer's next update with these gradients would lead, its state untouched.

        Comes after :meth:`ascend` along the same gradients, and starts from the copies that it has taken. If they were
        not finite, the weights are restored instead.
        """
        plans: PlanCache = self._container["plans"]
        update: BaseUpdate = self._container["update"]
        last: StepReport = self._container["report"]
        others = plans.unperturbed_only(gradients)
        if others is not None:
            # They have no copies yet; those that have are restored on the way.
            sam_kernels.perturb_(plans.plan, [others], [0.0], snapshot=plans.snapshot, backend=self.backend)
        overflow = False if last.ascent is None else last.ascent.overflow
        update.look_ahead(plans.plan, plans.snapshot, gradients, overflow, self.backend)

    def unperturbed_weights(self) -> dict[int, Tensor]:
        """In the middle of a step: copies of the weights that it will restore, by the identities of their parameters.

        Raises:
            StepOrderError: where a perturbed parameter is a DTensor, of whose weights this rank has a part.
        """
        plans: PlanCache = self._container["plans"]
        if not plans.holds_copies:
            return {}
        found = {}
        for index, flag in enumerate(plans.snapshot.taken):
            if flag & TAKEN:
                param = plans.plan.params[index]
                if is_distributed(param):
                    raise StepOrderError(
                        "the weights of a sharded model were asked for in the middle of a step, while they are "
                        "perturbed; complete it with second_step() or abandon it with restore() first"
                    )
                found[id(param)] = plans.snapshot.tensors[index].detach().to(param.dtype, copy=True)
        return found

    @property
    def runs_side_by_side(self) -> bool:
        """Whether passes yielded together may name weights of their own."""
        return bool(self._container["side by side"])

    def ascended(self, *lists: Gradients, rule: RuleLike, scale: Scale = 1.0) -> list[Tensor]:
        """Where :meth:`ascend` would lead, in memory of its own, kept from step to step; the weights stay."""
        refuse_overwritten(lists)
        scale = self._uphill(scale, len(lists))
        plans: PlanCache = self._container["plans"]
        plan, weights = plans.point("ascended")
        xs = [plans.perturbed_only(x) for x in lists]
        ascent = sam_kernels.ascent_(plan, xs, rule=rule, scale=scale, snapshot=weights, backend=self.backend)
        self._container["report"] = StepReport(ascent)
        return plans.weights_at(plan)

    def looked_ahead(self, gradients: Gradients) -> list[Tensor]:
        """Where :meth:`look_ahead` would lead, in memory of its own, as :meth:`ascended` says, and after it.

        For fused base optimizers; others can update the model's weights alone.
        """
        plans: PlanCache = self._container["plans"]
        update: BaseUpdate = self._container["update"]
        last: StepReport = self._container["report"]
        overflow = False if last.ascent is None else last.ascent.overflow
        plan, weights = plans.point("ahead")
        update.look_ahead(plan, weights, gradients, overflow, self.backend, plans.plan.params)
        return plans.weights_at(plan)

    def keep_state_in_place(self) -> None:
        """From now on the method's own state stays where it is in memory, as a captured step needs it."""
        self._container["in place"] = True

    @property
    def keeps_state_in_place(self) -> bool:
        """Whether new values of the method's own state have to be written over the old ones."""
        return bool(self._container["in place"])

    def refuse_grad_scaler(self, reason: str) -> None:
        """For methods that can tell only within a step; others say ``takes_scaled_gradients`` in their class.

        Raises:
            StepOrderError: if GradScaler drives the step.
        """
        if hasattr(self, "grad_scale"):
            raise StepOrderError(
                f"{type(self).__name__} cannot be used with GradScaler: {reason}. Use bfloat16, which needs no scaling."
            )

    def add_to_weights(self, *lists: Gradients, scale: Scale) -> None:
        """w <- w + sum of scaled gradient lists, plainly: no geometry, no copies, nothing of the base optimizer's."""
        refuse_overwritten(lists)
        scale = self._uphill(scale, len(lists))
        plans: PlanCache = self._container["plans"]
        sam_kernels.perturb_(plans.widened, lists, [1.0] * len(lists), scale=scale, backend=self.backend)
        if plans.has_masters:
            sam_kernels.restore_(plans.plan, plans.snapshot, backend=self.backend)

    def combine_into(self, state: list[Tensor | None], lists: Sequence[Gradients], coefficients: Any) -> None:
        """state <- the lists combined, where some list has an entry; entries of the state come into being as needed."""
        refuse_overwritten(lists)
        index = [i for i, entries in enumerate(zip(*lists, strict=True)) if any(e is not None for e in entries)]
        params = self._params()
        for i in index:
            if state[i] is None:
                state[i] = torch.zeros_like(params[i], dtype=self._state_dtype(params[i]), requires_grad=False)
        if index:
            kept: KeptState = self._container["method state"]
            out = kept.plan_of([state[i] for i in index])  # type: ignore[misc]
            chosen = [[x[i] for i in index] for x in lists]
            sam_kernels.combine_(out, chosen, coefficients, backend=self.backend)

    def moving_average(
        self, name: str, gradients: Gradients, kept: float, starts_at_gradient: bool = False
    ) -> list[Tensor | None]:
        """m <- kept m + (1 - kept) g in the method's own state, and m where there is a g; without one m stays.

        Args:
            starts_at_gradient: m is the first gradient; otherwise it starts at zero.
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
        self.combine_into(average, [old, changed], [kept, 1.0 - kept])
        return [None if g is None else m for g, m in zip(gradients, average, strict=True)]

    def method_state(self, name: str) -> list[Tensor | None]:
        """State of the method's own: an entry for each parameter, in the order of the groups. Part of ``state_dict()``.

        An entry belongs to its parameter, wherever that stands: it moves with it when the groups change, and new
        parameters have None. Name what a method keeps in ``method_state_names``.

        It lives apart from the base's state, where a foreign key would make some bases believe theirs is complete.
        """
        kept: KeptState = self._container["method state"]
        kept.follow(self._params())
        return kept.entries(name)

    def _state_dtype(self, like: Tensor) -> torch.dtype:
        plans: PlanCache = self._container["plans"]
        return wide_dtype(like.dtype) if plans.has_masters else like.dtype

    def has_method_state(self, name: str) -> bool:
        """Whether some parameter has an entry of this name."""
        kept: KeptState = self._container["method state"]
        plans: PlanCache = self._container["plans"]
        kept.follow(plans.plan.params)
        return kept.has(name)
