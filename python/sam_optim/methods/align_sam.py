"""Align-SAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sam_kernels.rules import NORM_EPSILON

from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.settings import Adaptive, Fixed, Setting, handed_on
from .agnostic_sam import AgnosticSAM
from .sam import SAM


class AlignSAM(AgnosticSAM):
    """Align-SAM, the later form of Agnostic-SAM (arXiv 2406.07107), with three gradients in place of four.

    ::

        g_t  = gradient on B_t at w             g_v = gradient on B_v at w
        e    = rho g_t / |g_t| - rho_val g_v / |g_v|
        w   <- base_optimizer(w, gradient on B_t at w + e)

    The paper writes rho for our rho_val, and lambda rho for our rho, with lambda = 2. The method is
    :class:`AgnosticSAM` with ``variant="align"``, and has the same batches and passes. The formula is our reading of
    the paper, see there.

    Args:
        rho: radius uphill on the training batch.
        rho_val: radius downhill on the validation batch; None, the default, is half of rho. At 0 the method is SAM.
        smoothing: beta of a moving average in place of g_v, as for :class:`AgnosticSAM`.
        all others: as for :class:`SAM`.
    """

    variant: Setting[str] = Fixed("align")
    normalizer: Setting[str] = Fixed("own")

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        rho_val: float | Tensor | None = None,
        *,
        smoothing: float = 0.0,
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
        SAM.__init__(self, **handed_on(locals()))
