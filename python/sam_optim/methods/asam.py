"""Adaptive SAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sam_kernels.rules import NORM_EPSILON

from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.settings import Adaptive, handed_on
from .sam import SAM


class ASAM(SAM):
    """Adaptive SAM (Kwon et al. 2021, arXiv 2102.11600): :class:`SAM` with its authors' settings as defaults.

    Args:
        params: named, ``model.named_parameters()``, unless ``adaptive=True``.
        rho: 0.5, as the authors use.
        adaptive: ``"weights"``, the authors' choice of parameters, or True for every parameter.
        all others: see :class:`SAM`.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.5,
        adaptive: Adaptive = "weights",
        *,
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
