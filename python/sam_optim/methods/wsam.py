"""Weighted SAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sam_kernels.rules import NORM_EPSILON

from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.passes import Pass, Passes, Update
from ..core.settings import Adaptive, Choice, Number, handed_on
from .sam import SAM


class WSAM(SAM):
    """Weighted SAM (Yue et al. 2023, arXiv 2305.15817), with a = gamma / (1 - gamma).

    ::

        decoupled:  w <- base_optimizer(w, g);  w <- w - lr a (g+ - g)      (algorithm 2)
        coupled:    w <- base_optimizer(w, (1 - a) g + a g+)

    Coupled, with a at most 1, it is :class:`GNP`, the penalty on the gradient's norm of Zhao et al. (2022, arXiv
    2202.03599), with the weight a.

    Args:
        gamma: from 0 to below 1; the authors use 0.9. Groups may have their own.
        decouple: keep the sharpness out of the base optimizer's moments.
        all others: as for :class:`SAM`.

    GradScaler is refused if decoupled: the base optimizer would not unscale the sharpness term.
    """

    is_capturable = True
    plain_steps_take_one_pass = True
    _scaling_obstacle = "its sharpness term is added after the base optimizer's update"

    gamma = Number(at_least=0, below=1, per_group=True)
    decouple = Choice(False, True)

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        gamma: float = 0.9,
        *,
        decouple: bool = True,
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
        return not self.decouple

    @property
    def perturbs_micro_batches(self) -> bool:  # type: ignore[override]
        return not self.decouple

    def passes(self) -> Passes:
        g = yield Pass(kept=True)
        self.ascend(g, rule=self._rule, scale=self.radii())
        decouple = self.decouple
        g_plus = yield Pass(perturbed=True, kept=decouple, last=True)
        weights = [gamma / (1.0 - gamma) for [gamma] in self.per_group("gamma")]
        if not decouple:
            yield Update(g, g_plus, scale=[[1.0 - weight, weight] for weight in weights])
            return
        # As it is now: a scheduler's change belongs to the next step.
        steps = [weight * _learning_rate(group) for weight, group in zip(weights, self.param_groups, strict=True)]
        yield Update(g)
        self.add_to_weights(g_plus, g, scale=[[-step, step] for step in steps])


def _learning_rate(group: dict[str, Any]) -> Any:
    """The learning rate; a copy if it is a tensor, since a scheduler may write into it."""
    lr = group["lr"]
    return lr.detach().clone() if isinstance(lr, Tensor) else lr
