"""Methods that perturb along something else than the batch's normalised gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sam_kernels.rules import NORM_EPSILON

from .construction import BaseOptimizer
from .errors import InvalidSettingError, StepOrderError
from .optimizer import ClosureRuns
from .passes import Gradients, Pass, Passes, Update
from .sam import SAM
from .settings import Adaptive, check_number, handed_on


class UnifiedSAM(SAM):
    """Between the plain and the normalised perturbation: e = rho (1 - k + k / abs(g)) g.

    k = 0 is USAM (Andriushchenko & Flammarion 2022, arXiv 2206.06232), k = 1 is SAM, and what lies between is Unified
    SAM (2025, arXiv 2503.02225). With ``adaptive`` the norm is that in ASAM's geometry.

    Args:
        k: from 0 to 1.
        all others: as for :class:`SAM`; a plain perturbation wants a smaller rho
            the larger the gradients are.

    GradScaler is refused with k below 1: the perturbation has the gradient's scale.
    """

    is_capturable = True
    plain_steps_take_one_pass = True
    perturbs_micro_batches = True
    _scaling_obstacle = "its perturbation has the gradient's scale"

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        k: float = 0.5,
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
        check_number("k", k, 0, 1)
        self.k = k
        super().__init__(params, base_optimizer, rho, **handed_on(locals()))

    @property
    def takes_scaled_gradients(self) -> bool:  # type: ignore[override]
        return self.k == 1.0

    def passes(self) -> Passes:
        g = yield Pass()
        self.ascend(g, rule=self._mixed, scale=self._radii())
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g_plus)

    def _mixed(self, gram: Tensor) -> Tensor:
        return 1.0 - self.k + self.k / (gram.diagonal().sqrt() + self._rule.epsilon)


class VaSSO(SAM):
    """Variance-suppressed SAM (Li & Giannakis 2023, arXiv 2309.15639): perturbs along an average of gradients.

    ::

        d <- (1 - theta) d + theta g,  d = g in the first step        e = rho d / |d|

    d is state of the method, and part of ``state_dict()``; one that began at zero, as it did here once, goes on.

    Args:
        theta: weight of the new gradient, above 0 and at most 1, where the method is SAM.
        all others: as for :class:`SAM`.

    GradScaler is refused: the average would mix gradients of different scales.
    """

    takes_scaled_gradients = False
    is_capturable = True
    perturbs_micro_batches = False
    _scaling_obstacle = "it averages gradients over steps, whose scales differ"
    method_state_names = ("direction",)

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        theta: float = 0.9,
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
        check_number("theta", theta, 0, 1)
        if theta == 0.0:
            raise InvalidSettingError("Invalid theta: 0; it must be above 0, or the average would stay what it is")
        self.theta = theta
        super().__init__(params, base_optimizer, rho, **handed_on(locals()))

    def passes(self) -> Passes:
        g = yield Pass()
        direction = self.moving_average("direction", g, 1.0 - self.theta, starts_at_gradient=True)
        self.ascend(direction, rule=self._rule, scale=self._radii())
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g_plus)


class MomentumSAM(SAM):
    """Momentum-SAM (Becker et al. 2024, arXiv 2401.12033): SAM's second gradient alone, at w - rho v / abs(v).

    v is the base optimizer's momentum: SGD's ``momentum_buffer``, or ``exp_avg`` of Adam and its kin. So a step takes
    one pass. The authors leave the model at the perturbed weights between steps and take the perturbation away to
    evaluate and to save; here it is taken away when a step ends, and the model always holds w itself. Until there is
    momentum, steps are the base optimizer's.

    Weight decay is our reading: the base optimizer's, of w. In the authors' code, an optimizer by itself, SGD's acts on
    the perturbed weights, and AdamW's on the weights after the update. Without weight decay there is no difference.

    Args:
        all others: as for :class:`SAM`; the base must keep a momentum.

    Drive it by closures, ``each_pass()`` or ``TrainStep``: the perturbation comes before the only backward pass. By
    ``first_step()`` and ``second_step()`` it is right too, but the first gradient is computed for nothing.
    """

    takes_scaled_gradients = True
    is_capturable = True
    perturbs_micro_batches = False

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor,
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
        super().__init__(params, base_optimizer, rho, **handed_on(locals()))
        if not {"momentum", "betas"} & set(self.defaults):
            base = type(self.base_optimizer).__name__
            raise InvalidSettingError(f"MomentumSAM perturbs along the base optimizer's momentum, and {base} has none")

    def advance(self, zero_grad: bool = False) -> Pass | None:
        """As for all methods, but only of a step that is begun.

        Raises:
            StepOrderError: if none is: the gradient would have been taken before the perturbation.
        """
        if not self.is_step_begun:
            raise StepOrderError(
                "MomentumSAM perturbs before its only backward pass: drive it by each_pass(), TrainStep, or "
                "step(closure) with closure_runs='every_pass'"
            )
        return super().advance(zero_grad)

    def passes(self) -> Passes:
        momentum = self._momentum()
        if any(v is not None for v in momentum):
            # A base that maximises keeps the momentum of -f.
            self.ascend(momentum, rule=self._rule, scale=[[-rho] for [rho] in self._radii()], follows_maximize=False)
        g_plus = yield Pass(last=True)
        yield Update(g_plus)

    def _momentum(self) -> Gradients:
        state = self.base_optimizer.state
        found: Gradients = []
        for p in self._params():
            own = state.get(p, {})
            v = own.get("momentum_buffer")
            found.append(own.get("exp_avg") if v is None else v)
        if not any(v is not None for v in found):
            self._refuse_other_state()
        return found

    def _refuse_other_state(self) -> None:
        """Before a first step there is no state; where there is some, steps without a perturbation would go on."""
        names = {str(name) for own in self.base_optimizer.state.values() for name in own}
        others = sorted(names - {"momentum_buffer", "exp_avg", "step"})
        if others:
            raise InvalidSettingError(
                "MomentumSAM perturbs along the base optimizer's momentum, a momentum_buffer or exp_avg of each "
                f"parameter, and {type(self.base_optimizer).__name__} keeps {', '.join(others)}: take another base"
            )

    def validate_group(self, group: dict[str, Any]) -> None:
        super().validate_group(group)
        if group.get("momentum") == 0.0:
            raise InvalidSettingError("Invalid momentum: 0; MomentumSAM perturbs along the base optimizer's momentum")
