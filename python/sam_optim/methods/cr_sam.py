"""Curvature-regularised SAM."""

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


class CRSAM(SAM):
    """Curvature-regularised SAM (Wu et al. 2024, arXiv 2312.13555), with gradients on both sides of w.

    ::

        g+ at w + e, g- at w - e
        w <- base_optimizer(w, g+ + gamma (g+ + g- - 2 g) + beta (g+ - g-))

    This is what the authors' code does; the paper divides the terms by differences of losses. Three passes: drive it by
    ``each_pass()``, closures or ``TrainStep``.

    Args:
        gamma: weight of g+ + g- - 2 g, which stands for the Hessian's trace; at least 0.
        beta: weight of g+ - g-, which stands for the gradient's norm; at least 0. Groups may have their own gamma and
            beta.
        all others: as for :class:`SAM`.
    """

    takes_scaled_gradients = True
    is_capturable = True
    plain_steps_take_one_pass = True
    perturbs_micro_batches = True

    gamma = Number(at_least=0, per_group=True)
    beta = Number(at_least=0, per_group=True)

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        gamma: float = 0.1,
        beta: float = 0.01,
        *,
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
        g = yield Pass(kept=True)
        self.ascend(g, rule=self._rule, scale=self.radii())
        g_plus = yield Pass(perturbed=True, kept=True)
        self.ascend(g, rule=self._rule, scale=[[-rho] for [rho] in self.radii()])
        g_minus = yield Pass(perturbed=True, kept=True, last=True)
        weights = [[1.0 + gamma + beta, gamma - beta, -2.0 * gamma] for gamma, beta in self.per_group("gamma", "beta")]
        yield Update(g_plus, g_minus, g, scale=weights)
