"""Variance-suppressed SAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sam_kernels.rules import NORM_EPSILON

from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.passes import Pass, Passes, Update
from ..core.settings import Adaptive, Number, handed_on
from .sam import SAM


class VaSSO(SAM):
    """Variance-suppressed SAM (Li & Giannakis 2023, arXiv 2309.15639): perturbs along an average of gradients.

    ::

        d <- (1 - theta) d + theta g,  d = g in the first step        e = rho d / |d|

    d is state of the method, and part of ``state_dict()``. (In old checkpoints it started at zero; it is used as it
    is.)

    Args:
        theta: weight of the new gradient, above 0 and at most 1. At 1 the method is SAM.
        all others: as for :class:`SAM`.

    GradScaler is refused: the average would mix gradients of different scales.
    """

    takes_scaled_gradients = False
    is_capturable = True
    perturbs_micro_batches = False
    _scaling_obstacle = "it averages gradients over steps, whose scales differ"
    method_state_names = ("direction",)

    theta = Number(above=0, at_most=1)

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        theta: float = 0.9,
        *,
        adaptive: Adaptive = False,
        eta: float | None = None,
        perturb_eps: float = NORM_EPSILON,
        closure_runs: ClosureRuns = "second_pass",
        backend: str | None = None,
        master_weights: bool = False,
        process_group: Any = None,
        counts_in_norm: Callable[[Tensor], bool] | None = None,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(**handed_on(locals()))

    def passes(self) -> Passes:
        g = yield Pass()
        direction = self.moving_average("direction", g, 1.0 - self.theta, starts_at_gradient=True)
        self.ascend(direction, rule=self._rule, scale=self.radii())
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g_plus)
