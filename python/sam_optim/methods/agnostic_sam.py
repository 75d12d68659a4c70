"""Agnostic-SAM and Align-SAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from sam_kernels.rules import NORM_EPSILON, RuleLike

from ..core.checks import is_zero, radius
from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.errors import InvalidSettingError
from ..core.passes import VALIDATION, Pass, Passes, Update
from ..core.settings import Adaptive, Choice, Maybe, Number, Radius, Setting, handed_on
from .sam import SAM


class AgnosticSAM(SAM):
    """Agnostic-SAM (arXiv 2406.07107) and Align-SAM, the later form of the same work.

    Two batches: B_t is the training batch, B_v a second, usually smaller, draw from the training set or a hold-out set.
    ::

        g_t  = gradient on B_t at w             g_v = gradient on B_v at w
        g_v' = gradient on B_v at w + rho_val g_v / |g_v|
        e    = rho_train g_t / |g_t| - rho_val g_v' / |g_v'|      uphill on B_t, downhill on B_v
        w   <- base_optimizer(w, gradient on B_t at w + e)

    ``variant="align"`` uses g_v in place of g_v' and saves one gradient. The validation batch enters only through
    the perturbation. No code of the authors is public; the formulas are as we read the paper.

    Args:
        all others: as for :class:`SAM`; ASAM's geometry is that at w.
        rho: radius uphill on the training batch, rho_train in the formula; by default 0.05.
        rho_val: radius downhill on the validation batch, and of the perturbation at which g_v' is taken. None, the
            default, is half of rho, also while that follows a schedule. At 0 the method is SAM.
        rho_train: another name for rho.
        variant: ``"agnostic"`` (four gradients a step) or ``"align"`` (three).
        normalizer: what divides g_v'. ``"own"`` is |g_v'|; ``"first"`` is |g_v|, the literal reading of the form in
            which both perturbations share one factor.
        smoothing: beta of a moving average m <- beta m + (1 - beta) g_v' that replaces g_v'; 0 for none. A beta of 0.9
            has been reported; what exactly is smoothed is our reading. With smoothing GradScaler is refused: the
            average would mix gradients of different scales.

    Passes: training and validation at w (independent of each other), for ``"agnostic"`` validation at its perturbation,
    and training at w + e. Drive them by ``each_pass()``, or by ``step(closure, validation_closure)``::

        for p in optimizer.each_pass():
            x, y = train_batch if p.data == "train" else validation_batch
            loss_fn(model(x), y).backward()
    """

    yields_passes_together = True
    is_capturable = True
    perturbs_micro_batches = True
    _scaling_obstacle = "with smoothing it averages gradients over steps, whose scales differ"

    rho_val = Maybe(Radius())
    variant: Setting[str] = Choice("agnostic", "align")
    normalizer: Setting[str] = Choice("own", "first")
    smoothing = Number(at_least=0, below=1)

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor | None = None,
        rho_val: float | Tensor | None = None,
        *,
        rho_train: float | Tensor | None = None,
        variant: Literal["agnostic", "align"] = "agnostic",
        normalizer: Literal["own", "first"] = "own",
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
        if rho is not None and rho_train is not None:
            raise InvalidSettingError("rho and rho_train are two names of one radius: give one of them")
        rho = rho_train if rho is None else rho
        rho = 0.05 if rho is None else rho
        super().__init__(**handed_on(locals(), leave_out="rho_train"))

    @property
    def method_state_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("validation_gradient",) if self.smoothing > 0.0 else ()

    @property
    def takes_scaled_gradients(self) -> bool:  # type: ignore[override]
        return self.smoothing == 0.0

    def passes(self) -> Passes:
        g_train, g_val = yield [Pass(kept=True), Pass(VALIDATION, kept=True)]
        rule: RuleLike = self._rule
        if self.variant == "agnostic":
            self.ascend(g_val, rule=self._rule, scale=[[rho_val] for _, rho_val in self._both_radii()])
            if self.normalizer == "first":
                rule = _FirstNormalized(self.last_step.ascent.norms[0], self._rule.epsilon)  # type: ignore[union-attr, index]
            g_val = yield Pass(VALIDATION, perturbed=True, kept=True)
        smoothing = self.smoothing
        if smoothing > 0.0:
            g_val = self.moving_average("validation_gradient", g_val, smoothing)
        self.ascend(g_train, g_val, rule=rule, scale=[[rho, -rho_val] for rho, rho_val in self._both_radii()])
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g_plus)

    def _both_radii(self) -> list[tuple[float | Tensor, float | Tensor]]:
        """rho_train and rho_val of each group."""
        radii = []
        for group in self.param_groups:
            rho, rho_val = radius(group["rho"]), group["rho_val"]
            radii.append((rho, rho / 2 if rho_val is None else radius(rho_val, "rho_val")))
        return radii

    def _is_plain_step(self) -> bool:
        return all(is_zero(rho) and is_zero(rho_val) for rho, rho_val in self._both_radii())


class _FirstNormalized:
    """c = (1 / |g_t|, 1 / |g_v|) with |g_v| given: the norm at w, not that of the list."""

    def __init__(self, norm: Tensor, epsilon: float) -> None:
        self.norm, self.epsilon = norm, epsilon

    def __call__(self, gram: Tensor) -> Tensor:
        return 1.0 / (torch.stack([gram[0, 0].sqrt(), self.norm.to(gram.device)]) + self.epsilon)
