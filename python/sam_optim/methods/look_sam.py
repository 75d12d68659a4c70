"""LookSAM."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sam_kernels import apply_rule
from sam_kernels.rules import NORM_EPSILON

from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.passes import Gradients, Pass, Passes, Update
from ..core.settings import Adaptive, Number, Whole, handed_on
from .sam import SAM


class LookSAM(SAM):
    """LookSAM (Liu et al. 2022, arXiv 2203.02714, algorithm 1): SAM every k steps, whose direction the others reuse.

    ::

        every k-th step:  SAM;  u = the part of g+ orthogonal to g
        between:          w <- base_optimizer(w, g + alpha |g| / |u| u)

    Norms are taken over all parameters together. The steps between take one pass with ``TrainStep``, ``each_pass()``
    and closures. With ``first_step()`` and ``second_step()`` they are right too, but save nothing. u is state of the
    method, and the count of steps is ``looksam_step`` in each group; both are part of ``state_dict()``.

    Args:
        k: one step in k is a SAM step; at least 1.
        alpha: weight of the reused direction. The authors use 0.7; independent runs found that large. Groups may have
            their own.
        all others: as for :class:`SAM`.
    """

    takes_scaled_gradients = True
    is_capturable = False
    perturbs_micro_batches = False

    k = Whole(at_least=1)
    alpha = Number(per_group=True)
    _kept_in_groups = MappingProxyType({"looksam_step": 0})

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        k: int = 5,
        alpha: float = 0.7,
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

    @property
    def method_state_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("direction",) if self.k > 1 else ()

    def passes(self) -> Passes:
        step, k = self.param_groups[0]["looksam_step"], self.k
        if step % k == 0 or not self.has_method_state("direction"):
            g = yield Pass(kept=True)
            self.ascend(g, rule=self._rule, scale=self.radii())
            g_plus = yield Pass(perturbed=True, kept=True, last=True)
            yield Update(g_plus)
            if k > 1:
                self._keep_direction(g_plus, g)
        else:
            g = yield Pass(last=True)
            # As with any torch optimizer, a parameter without a gradient is not updated.
            direction = [None if x is None else u for x, u in zip(g, self.method_state("direction"), strict=True)]
            yield Update(g, direction, rule=_norm_ratio, scale=[[1.0, alpha] for [alpha] in self.per_group("alpha")])
        for group in self.param_groups:
            group["looksam_step"] = step + 1

    def _keep_direction(self, g_plus: Gradients, g: Gradients) -> None:
        direction = self.method_state("direction")
        plan = self._plans.without_geometry  # which knows of ranks that hold other parameters
        report = apply_rule(_orthogonal, [g_plus, g], plan, backend=self.backend)
        self.store_combination(direction, [g_plus, g], report.coefficients)

    def _is_plain_step(self) -> bool:
        return super()._is_plain_step() and not self.has_method_state("direction")


def _norm_ratio(gram: Tensor) -> Tensor:
    """The coefficients 1 and abs(g) / abs(u) of the lists (g, u)."""
    ratio = torch.where(gram[1, 1] > 0.0, (gram[0, 0] / gram[1, 1]).sqrt(), 0.0)
    return torch.stack([torch.ones_like(ratio), ratio])


def _orthogonal(gram: Tensor) -> Tensor:
    """The coefficients that make the part of a orthogonal to b from the lists (a, b)."""
    along = torch.where(gram[1, 1] > 0.0, gram[0, 1] / gram[1, 1], 0.0)
    return torch.stack([torch.ones_like(along), -along])
