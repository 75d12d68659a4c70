"""GNP, the penalty on the gradient's norm."""

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


class GNP(SAM):
    """Penalises the gradient's norm (Zhao et al. 2022, arXiv 2202.03599): minimises L + alpha rho abs(gradient).

    ::

        g+ at w + e, e = rho g / |g|        w <- base_optimizer(w, (1 - alpha) g + alpha g+)

    The paper writes r for rho, and alpha = lambda / r, with lambda the penalty's weight. With alpha 1 it is SAM, with 0
    the base optimizer. :class:`WSAM` with ``decouple=False`` and gamma = alpha / (1 + alpha) is the same.

    Args:
        rho: 0.1, as in most of the authors' recipes (github.com/zhaoyang-0204/gnp).
        alpha: weight of the second gradient; at least 0, and 0.8 in the authors' recipes. Groups may have their own.
        all others: as for :class:`SAM`.
    """

    takes_scaled_gradients = True
    is_capturable = True
    plain_steps_take_one_pass = True
    perturbs_micro_batches = True

    alpha = Number(at_least=0, per_group=True)

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.1,
        alpha: float = 0.8,
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
        g = yield Pass(kept=True)
        self.ascend(g, rule=self._rule, scale=self.radii())
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g, g_plus, scale=[[1.0 - alpha, alpha] for [alpha] in self.per_group("alpha")])
