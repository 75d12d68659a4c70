"""Momentum-SAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sam_kernels.rules import NORM_EPSILON

from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.errors import InvalidSettingError, StepOrderError
from ..core.passes import Gradients, Pass, Passes, Update
from ..core.settings import Adaptive, handed_on
from .sam import SAM


class MomentumSAM(SAM):
    """Momentum-SAM (Becker et al. 2024, arXiv 2401.12033): SAM's second gradient alone, at w - rho v / abs(v).

    v is the base optimizer's momentum: SGD's ``momentum_buffer``, or ``exp_avg`` of Adam and its kin. So a step takes
    one pass. The authors leave the model at the perturbed weights between steps and take the perturbation away to
    evaluate and to save; here it is taken away when a step ends, and the model always holds w itself. Until there is
    momentum, steps are the base optimizer's.

    Weight decay is our reading: the base optimizer's, of w. In the authors' code, an optimizer by itself, SGD's acts on
    the perturbed weights, and AdamW's on the weights after the update. Without weight decay there is no difference.

    Args:
        rho: radius; 3, with which the authors' published commands run, CIFAR-100 and ImageNet alike (github.com/
            MarlonBecker/MSAM; as defaults their classes have 0.3 for SGD and 1 for AdamW).
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
        rho: float | Tensor = 3.0,
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
            self.ascend(momentum, rule=self._rule, scale=[[-rho] for [rho] in self.radii()], follows_maximize=False)
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
