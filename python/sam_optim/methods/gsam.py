"""Surrogate-gap guided SAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sam_kernels.rules import NORM_EPSILON, Deflected

from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.passes import Pass, Passes, Update
from ..core.settings import Adaptive, Number, handed_on
from .sam import SAM


class GSAM(SAM):
    """Surrogate-gap guided SAM (Zhuang et al. 2022, arXiv 2203.08065, algorithm 1).

    ::

        h = the part of g orthogonal to g+        w <- base_optimizer(w, g+ - alpha h)

    The authors let rho follow the learning rate: see :class:`RhoFollowsLR`.

    Args:
        alpha: weight of the orthogonal part; at least 0.
        all others: as for :class:`SAM`.
    """

    takes_scaled_gradients = True
    is_capturable = True
    plain_steps_take_one_pass = True
    perturbs_micro_batches = True

    alpha = Number(at_least=0)

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        alpha: float = 0.4,
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
        yield Update(g_plus, g, rule=Deflected(alpha=self.alpha))
