"""Friendly SAM."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sam_kernels.rules import NORM_EPSILON

from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.passes import Pass, Passes, Update
from ..core.settings import Adaptive, Number, handed_on
from .sam import SAM


class FriendlySAM(SAM):
    """Friendly SAM (Li et al. 2024, arXiv 2403.12350): perturbs along g minus an average of gradients.

    ::

        d = g - sigma m,  g in the first step     e = rho d / |d|
        m <- lmbda m + (1 - lmbda) g,  m = g in the first step

    The average m is state of the method, and part of ``state_dict()``.

    Args:
        sigma: weight of the average that is subtracted.
        lmbda: how much of the average is kept from step to step, from 0 to 1.
        all others: as for :class:`SAM`.

    GradScaler is refused: the average would mix gradients of different scales.
    """

    takes_scaled_gradients = False
    is_capturable = True
    perturbs_micro_batches = False
    _scaling_obstacle = "it averages gradients over steps, whose scales differ"
    method_state_names = ("average",)
    _names_elsewhere = MappingProxyType({"momentum": "average"})  # pytorch-optimizer's

    sigma = Number(at_least=0)
    lmbda = Number(at_least=0, at_most=1)

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        sigma: float = 1.0,
        lmbda: float = 0.9,
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
        if not self.has_method_state("average"):
            self.ascend(g, rule=self._rule, scale=self.radii())
        else:
            # Parameters that had no gradient so far have no average to subtract.
            average = [None if x is None else m for x, m in zip(g, self.method_state("average"), strict=True)]
            self.ascend(g, average, rule=self._difference, scale=[[rho, rho] for [rho] in self.radii()])
        self.moving_average("average", g, self.lmbda, starts_at_gradient=True)
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g_plus)

    def _difference(self, gram: Tensor) -> Tensor:
        """(1, -sigma) / abs(g - sigma m)."""
        sigma = self.sigma
        squared = gram[0, 0] - 2.0 * sigma * gram[0, 1] + sigma**2 * gram[1, 1]
        unit = 1.0 / (squared.clamp(min=0.0).sqrt() + self._rule.epsilon)
        return torch.stack([unit, -sigma * unit])
