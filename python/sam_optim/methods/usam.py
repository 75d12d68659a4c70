"""USAM: SAM without normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sam_kernels.rules import NORM_EPSILON

from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.settings import Adaptive, Fixed, Setting, handed_on
from .sam import SAM
from .unified_sam import UnifiedSAM


class USAM(UnifiedSAM):
    """SAM without normalisation (Andriushchenko & Flammarion 2022, arXiv 2206.06232): e = rho g.

    :class:`UnifiedSAM` with k = 0.

    Args:
        rho: the perturbation is that of :class:`SAM` if the gradient's norm is 1. Larger gradients need a smaller rho.
        all others: as for :class:`SAM`.

    GradScaler is refused: the perturbation would depend on the scale.
    """

    k: Setting[float] = Fixed(0.0)

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
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
        SAM.__init__(self, **handed_on(locals()))
