"""SAMPa."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from sam_kernels.rules import NORM_EPSILON

from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.passes import PREVIOUS, Pass, Passes, Update
from ..core.settings import Adaptive, Choice, Number, handed_on
from .sam import SAM

_Y_GRADIENT = "y_gradient"


class SAMPa(SAM):
    """SAM with two gradients that do not wait for each other (Xie et al. 2024, arXiv 2410.10683).

    ::

        x~_t    = x_t + rho <gradient on B_t at y_t>
        y_{t+1} = where the base optimizer would go from x_t with the same gradient; its state stays
        x_{t+1} = base_optimizer(x_t, (1 - lam) gradient on B_t at x~_t + lam gradient on B_{t+1} at y_{t+1})

    The first step only starts the method: with ``warm_start="gradient"`` it takes one gradient on its batch and updates
    nothing. Each later step makes one update, with one pass on the batch of the step before and one on its own. Between
    steps the model holds x. The gradient at y is part of ``state_dict()``.

    Args:
        all others: as for :class:`SAM`; rho is 0.1 here.
        lam: weight of the gradient at y in the update, from 0 to 1. The authors use 0.2. With 1 the method is the past
            extra-gradient method, with 0 and rho 0 the base optimizer. Groups may have their own.
        warm_start: ``"gradient"``, or ``"zero"`` for a first y-gradient of zero, as in the authors' code. Then the
            first step takes no gradient at all.

    GradScaler is refused: a scaled gradient would be taken for a step.

    Drive it with closures, each of which is used again in the next step, or with passes::

        for p in optimizer.each_pass():
            x, y = previous_batch if p.data == "previous" else batch
            loss_fn(model(x), y).backward()
        previous_batch = batch
    """

    uses_previous_batch = True
    takes_scaled_gradients = False
    is_capturable = True
    perturbs_micro_batches = False
    _scaling_obstacle = (
        "its look-ahead takes the gradient of the step before, scaled as it was then, for the base optimizer's step"
    )
    yields_passes_together = True
    method_state_names = (_Y_GRADIENT,)

    lam = Number(at_least=0, at_most=1, per_group=True)
    warm_start = Choice("gradient", "zero")

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.1,
        lam: float = 0.2,
        *,
        warm_start: Literal["gradient", "zero"] = "gradient",
        adaptive: Adaptive = False,
        eta: float | None = None,
        perturb_eps: float = NORM_EPSILON,
        closure_runs: ClosureRuns = "every_pass",
        backend: str | None = None,
        master_weights: bool = False,
        process_group: Any = None,
        counts_in_norm: Callable[[Tensor], bool] | None = None,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(**handed_on(locals()))

    def passes(self) -> Passes:
        if not self.has_method_state(_Y_GRADIENT):
            first = (yield Pass(kept=True, last=True)) if self.warm_start == "gradient" else self.gradients_of_zeros()
            self.set_method_state(_Y_GRADIENT, first)
            return
        g_y = self.method_state(_Y_GRADIENT)
        if self.runs_in_parallel:
            tilde = self.ascent_point(g_y, rule=self._rule, scale=self.radii())
            ahead = self.look_ahead_point(g_y)
            g_tilde, g_y_next = yield [
                Pass(PREVIOUS, perturbed=True, kept=True, weights=tilde),
                Pass(kept=True, last=True, weights=ahead),
            ]
        else:
            self.ascend(g_y, rule=self._rule, scale=self.radii())
            g_tilde = yield Pass(PREVIOUS, perturbed=True, kept=True)
            self.look_ahead(g_y)
            g_y_next = yield Pass(kept=True, last=True)
        yield Update(g_tilde, g_y_next, scale=[[1.0 - lam, lam] for [lam] in self.per_group("lam")])
        self.set_method_state(_Y_GRADIENT, g_y_next)

    def obstacle_to_parallel_passes(self) -> str | None:
        if self._base_update.settings() is None:
            base = type(self.base_optimizer).__name__
            return f"SAMPa's passes cannot run side by side with {base}, which can look ahead in the model itself alone"
        return super().obstacle_to_parallel_passes()

    def _is_plain_step(self) -> bool:
        return all(lam == 0.0 for [lam] in self.per_group("lam")) and super()._is_plain_step()
