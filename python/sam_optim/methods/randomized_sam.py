"""SAM in steps chosen at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sam_kernels.rules import NORM_EPSILON

from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.settings import Adaptive, Number, Whole, handed_on
from .intermittent import ScheduledSAM


class RandomizedSAM(ScheduledSAM):
    """SAM in steps chosen at random (Zhao et al. 2022, arXiv 2203.09962, RST with its weight at 1).

    The choice depends only on seed and step: all ranks choose alike, and a resumed run goes on as it would have.

    Args:
        probability: that a step is a SAM step, from 0 to 1; a tensor or a number. A schedule may change
            ``optimizer.probability``.
        seed: seed of the choice.
        all others: as for :class:`SAM`.
    """

    probability = Number(at_least=0, at_most=1)
    seed = Whole()

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        probability: float = 0.5,
        seed: int = 0,
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

    def is_sharpness_aware(self, step: int) -> bool:
        # Similar seeds give generators whose first numbers are similar.
        mixed = (self.seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**63
        coin = torch.Generator("cpu").manual_seed(mixed)
        return torch.rand((), generator=coin, dtype=torch.float32, device="cpu").item() < self.probability
