"""AE-SAM: SAM where the gradient is large."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from torch import Tensor

from sam_kernels.rules import NORM_EPSILON

from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.passes import Gradients, Pass, Passes, Update
from ..core.settings import Adaptive, Number, handed_on
from .intermittent import IntermittentSAM


class AESAM(IntermittentSAM):
    """SAM where the gradient is large (Jiang et al. 2023, arXiv 2304.14647, AE-SAM).

    ::

        mean     <- decay mean + (1 - decay) |g|^2
        variance <- decay variance + (1 - decay) (|g|^2 - mean)^2
        SAM if |g|^2 >= mean + c sqrt(variance), else the base optimizer with g

    Mean and variance are in the first group, as ``aesam_mean`` and ``aesam_variance``, and part of ``state_dict()``.
    How they start is our reading: the mean at the first squared norm, the variance at zero, so that the first step is a
    SAM step. The decision waits for the GPU.

    Args:
        c: the threshold's distance from the mean. The authors let it fall from 1 to -1 over training: set
            ``optimizer.c``.
        decay: decay of the averages, from 0 to below 1.
        all others: as for :class:`SAM`.

    GradScaler is refused: squared norms of different scales cannot be compared. Trainers that call ``step()``
    themselves are refused, and so are ``first_step()`` and ``second_step()``: only after a pass is it known whether it
    is the last.
    """

    takes_scaled_gradients = False
    is_capturable = False
    perturbs_micro_batches = False
    _scaling_obstacle = "it compares norms of gradients over steps, whose scales differ"
    _kept_in_groups = MappingProxyType({"aesam_mean": None, "aesam_variance": 0.0})

    c = Number()
    decay = Number(at_least=0, below=1)

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        c: float = 0.0,
        decay: float = 0.9,
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
        g = yield Pass()
        if self._is_large(g):
            self.ascend(g, rule=self._rule, scale=self.radii())
            g = yield Pass(perturbed=True, last=True)
        yield Update(g)

    def _is_large(self, g: Gradients) -> bool:
        squared = float(self.gram(g)[0, 0])
        if not math.isfinite(squared):
            return False
        mean, variance = self.param_groups[0]["aesam_mean"], self.param_groups[0]["aesam_variance"]
        if mean is None:
            mean = squared
        else:
            decay = self.decay
            mean = decay * mean + (1.0 - decay) * squared
            variance = decay * variance + (1.0 - decay) * (squared - mean) ** 2
        for own in self.param_groups:
            own["aesam_mean"], own["aesam_variance"] = mean, variance
        return bool(squared >= mean + self.c * variance**0.5)
