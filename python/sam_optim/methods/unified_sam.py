"""Unified SAM, and USAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sam_kernels.rules import NORM_EPSILON

from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.passes import Pass, Passes, Update
from ..core.settings import Adaptive, Number, Setting, handed_on
from .sam import SAM


class UnifiedSAM(SAM):
    """Between the plain and the normalised perturbation: e = rho (1 - k + k / abs(g)) g.

    k = 0 is USAM (Andriushchenko & Flammarion 2022, arXiv 2206.06232), k = 1 is SAM, and between them
    lies Unified SAM (2025, arXiv 2503.02225). With ``adaptive`` the norm is that in ASAM's geometry.

    Args:
        k: from 0 to 1.
        all others: as for :class:`SAM`; without normalisation, larger gradients need a smaller rho.

    GradScaler is refused with k below 1: the perturbation would depend on the scale.
    """

    is_capturable = True
    plain_steps_take_one_pass = True
    perturbs_micro_batches = True
    _scaling_obstacle = "its perturbation has the gradient's scale"

    k: Setting[float] = Number(at_least=0, at_most=1)

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        k: float = 0.5,
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

    @property
    def takes_scaled_gradients(self) -> bool:  # type: ignore[override]
        return self.k == 1.0

    def passes(self) -> Passes:
        g = yield Pass()
        self.ascend(g, rule=self._mixed, scale=self.radii())
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g_plus)

    def _mixed(self, gram: Tensor) -> Tensor:
        k = self.k
        return 1.0 - k + k / (gram.diagonal().sqrt() + self._rule.epsilon)
