"""Methods that change SAM's direction, or what is made of its gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sam_kernels.ops import apply_rule
from sam_kernels.rules import NORM_EPSILON, Deflected, NormMatched

from .construction import BaseOptimizer
from .optimizer import ClosureRuns
from .passes import Gradients, Pass, Passes, Update
from .sam import SAM
from .settings import Adaptive, check_choice, check_number, handed_on, whole_number


class GSAM(SAM):
    """Surrogate-gap guided SAM (Zhuang et al. 2022, arXiv 2203.08065, algorithm 1).

    ::

        h = the part of g orthogonal to g+        w <- base_optimizer(w, g+ - alpha h)

    The authors let rho follow the learning rate: see :class:`RhoFollowsLR`.

    Args:
        alpha: weight of the orthogonal part; at least 0.
        all others: as for :class:`SAM`.
    """

    takes_scaled_gradients = True
    is_capturable = True
    plain_steps_take_one_pass = True
    perturbs_micro_batches = True

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        alpha: float = 0.4,
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
        check_number("alpha", alpha, 0)
        self.alpha = alpha
        super().__init__(params, base_optimizer, rho, **handed_on(locals()))

    def passes(self) -> Passes:
        g = yield Pass(kept=True)
        self.ascend(g, rule=self._rule, scale=self._radii())
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g_plus, g, rule=Deflected(alpha=self.alpha))


class StableSAM(SAM):
    """Stable SAM (Tan et al. 2024, arXiv 2401.07250): w <- base_optimizer(w, g+ abs(g) / abs(g+)).

    The update has the length that the gradient at the weights has.

    Args:
        all others: as for :class:`SAM`.
    """

    takes_scaled_gradients = True
    is_capturable = True
    plain_steps_take_one_pass = True
    perturbs_micro_batches = True

    def passes(self) -> Passes:
        g = yield Pass(kept=True)
        self.ascend(g, rule=self._rule, scale=self._radii())
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g_plus, g, rule=NormMatched())


class WSAM(SAM):
    """Weighted SAM (Yue et al. 2023, arXiv 2305.15817), with a = gamma / (1 - gamma).

    ::

        decoupled:  w <- base_optimizer(w, g);  w <- w - lr a (g+ - g)      (algorithm 2)
        coupled:    w <- base_optimizer(w, (1 - a) g + a g+)

    Coupled, with a at most 1, it is the penalty on the gradient's norm of Zhao et al. (2022, arXiv 2202.03599) with the
    weight a.

    Args:
        gamma: from 0 to below 1; 0.9 is the authors'.
        decouple: keep the sharpness out of the base optimizer's moments.
        all others: as for :class:`SAM`.

    GradScaler is refused if decoupled: the sharpness is not the base optimizer's to unscale.
    """

    is_capturable = True
    plain_steps_take_one_pass = True
    _scaling_obstacle = "its sharpness term is added after the base optimizer's update"

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
        check_number("gamma", gamma, 0, 1, open_end=True)
        check_choice("decouple", decouple, [False, True])
        self.gamma, self.decouple = gamma, decouple
        super().__init__(params, base_optimizer, rho, **handed_on(locals()))

    @property
    def takes_scaled_gradients(self) -> bool:  # type: ignore[override]
        return not self.decouple

    @property
    def perturbs_micro_batches(self) -> bool:  # type: ignore[override]
        return not self.decouple

    def passes(self) -> Passes:
        g = yield Pass(kept=True)
        self.ascend(g, rule=self._rule, scale=self._radii())
        g_plus = yield Pass(perturbed=True, kept=self.decouple, last=True)
        weight = self.gamma / (1.0 - self.gamma)
        if not self.decouple:
            yield Update(g, g_plus, scale=[[1.0 - weight, weight]] * len(self.param_groups))
            return
        # As it is now: a scheduler's change belongs to the next step.
        steps = [weight * _learning_rate(group) for group in self.param_groups]
        yield Update(g)
        self.add_to_weights(g_plus, g, scale=[[-step, step] for step in steps])


class FriendlySAM(SAM):
    """Friendly SAM (Li et al. 2024, arXiv 2403.12350): perturbs along the part of g that is this batch's own.

    ::

        d = g - sigma m,  g in the first step     e = rho d / |d|
        m <- lmbda m + (1 - lmbda) g,  m = g in the first step

    The average m is state of the method, and part of ``state_dict()``.

    Args:
        sigma: share of the average that is taken away.
        lmbda: how much of the average is kept, from 0 to 1.
        all others: as for :class:`SAM`.

    GradScaler is refused: the average would mix gradients of different scales.
    """

    takes_scaled_gradients = False
    is_capturable = True
    perturbs_micro_batches = False
    _scaling_obstacle = "it averages gradients over steps, whose scales differ"
    method_state_names = ("average",)
    _names_elsewhere = MappingProxyType({"momentum": "average"})  # pytorch-optimizer's

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
        check_number("sigma", sigma, 0)
        check_number("lmbda", lmbda, 0, 1)
        self.sigma, self.lmbda = sigma, lmbda
        super().__init__(params, base_optimizer, rho, **handed_on(locals()))

    def passes(self) -> Passes:
        g = yield Pass()
        if not self.has_method_state("average"):
            self.ascend(g, rule=self._rule, scale=self._radii())
        else:
            # Parameters that had no gradient so far have no average to take away.
            average = [None if x is None else m for x, m in zip(g, self.method_state("average"), strict=True)]
            self.ascend(g, average, rule=self._difference, scale=[[rho, rho] for [rho] in self._radii()])
        self.moving_average("average", g, self.lmbda, starts_at_gradient=True)
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g_plus)

    def _difference(self, gram: Tensor) -> Tensor:
        """(1, -sigma) / abs(g - sigma m)."""
        squared = gram[0, 0] - 2.0 * self.sigma * gram[0, 1] + self.sigma**2 * gram[1, 1]
        unit = 1.0 / (squared.clamp(min=0.0).sqrt() + self._rule.epsilon)
        return torch.stack([unit, -self.sigma * unit])


class CRSAM(SAM):
    """Curvature-regularised SAM (Wu et al. 2024, arXiv 2312.13555), with gradients on both sides of w.

    ::

        g+ at w + e, g- at w - e
        w <- base_optimizer(w, g+ + gamma (g+ + g- - 2 g) + beta (g+ - g-))

    This is what the authors' code does; the paper divides the terms by differences of losses. Three passes: drive it by
    ``each_pass()``, closures or ``TrainStep``.

    Args:
        gamma: weight of the change of the gradient's change, which stands for the Hessian's trace; at least 0.
        beta: weight of the gradient's change, which stands for its norm; at least 0.
        all others: as for :class:`SAM`.
    """

    takes_scaled_gradients = True
    is_capturable = True
    plain_steps_take_one_pass = True
    perturbs_micro_batches = True

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        gamma: float = 0.1,
        beta: float = 0.01,
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
        check_number("gamma", gamma, 0)
        check_number("beta", beta, 0)
        self.gamma, self.beta = gamma, beta
        super().__init__(params, base_optimizer, rho, **handed_on(locals()))

    def passes(self) -> Passes:
        g = yield Pass(kept=True)
        self.ascend(g, rule=self._rule, scale=self._radii())
        g_plus = yield Pass(perturbed=True, kept=True)
        self.ascend(g, rule=self._rule, scale=[[-rho] for [rho] in self._radii()])
        g_minus = yield Pass(perturbed=True, kept=True, last=True)
        weights = [1.0 + self.gamma + self.beta, self.gamma - self.beta, -2.0 * self.gamma]
        yield Update(g_plus, g_minus, g, scale=[weights] * len(self.param_groups))


class LookSAM(SAM):
    """LookSAM (Liu et al. 2022, arXiv 2203.02714, algorithm 1): SAM every k steps, and its direction reused between.

    ::

        every k-th step:  SAM;  u = the part of g+ orthogonal to g
        between:          w <- base_optimizer(w, g + alpha |g| / |u| u)

    Norms run over all parameters together. The steps between take one pass, driven by ``TrainStep``, ``each_pass()`` or
    closures; by ``first_step()`` and ``second_step()`` they are right too, but save nothing. u is state of the method,
    the count of steps is each group's ``looksam_step``; both are part of ``state_dict()``.

    Args:
        k: SAM's share of the steps is 1 / k; at least 1.
        alpha: weight of the reused direction. 0.7 is the authors'; independent runs found it large.
        all others: as for :class:`SAM`.
    """

    takes_scaled_gradients = True
    is_capturable = False
    perturbs_micro_batches = False

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
        check_number("alpha", alpha)
        self.k, self.alpha = whole_number("k", k, 1), alpha
        self.method_state_names = ("direction",) if k > 1 else ()
        self._more_settings = {"looksam_step": 0}
        super().__init__(params, base_optimizer, rho, **handed_on(locals()))

    def passes(self) -> Passes:
        step = self.param_groups[0]["looksam_step"]
        if step % self.k == 0 or not self.has_method_state("direction"):
            g = yield Pass(kept=True)
            self.ascend(g, rule=self._rule, scale=self._radii())
            g_plus = yield Pass(perturbed=True, kept=True, last=True)
            yield Update(g_plus)
            if self.k > 1:
                self._keep_direction(g_plus, g)
        else:
            g = yield Pass(last=True)
            # A parameter without a gradient is not updated, as by any torch optimizer.
            direction = [None if x is None else u for x, u in zip(g, self.method_state("direction"), strict=True)]
            yield Update(g, direction, rule=self._reuse)
        for group in self.param_groups:
            group["looksam_step"] = step + 1

    def _keep_direction(self, g_plus: Gradients, g: Gradients) -> None:
        direction = self.method_state("direction")
        plan = self._container["plans"].without_geometry  # which knows of ranks that hold other parameters
        report = apply_rule(_orthogonal, [g_plus, g], plan, backend=self.backend)
        self.combine_into(direction, [g_plus, g], report.coefficients)

    def _reuse(self, gram: Tensor) -> Tensor:
        """(1, alpha abs(g) / abs(u))."""
        ratio = torch.where(gram[1, 1] > 0.0, (gram[0, 0] / gram[1, 1]).sqrt(), 0.0)
        return torch.stack([torch.ones_like(ratio), self.alpha * ratio])

    def _is_plain_step(self) -> bool:
        return super()._is_plain_step() and not self.has_method_state("direction")


def _orthogonal(gram: Tensor) -> Tensor:
    """Of lists (a, b): the part of a that is orthogonal to b."""
    along = torch.where(gram[1, 1] > 0.0, gram[0, 1] / gram[1, 1], 0.0)
    return torch.stack([torch.ones_like(along), -along])


def _learning_rate(group: dict[str, Any]) -> Any:
    """A copy, if it is a tensor that a scheduler writes into."""
    lr = group["lr"]
    return lr.detach().clone() if isinstance(lr, Tensor) else lr
