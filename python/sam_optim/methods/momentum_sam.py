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
    """Momentum-SAM (Becker et al. 2024, arXiv 2401.12033): only SAM's second gradient, at w - rho v / abs(v).

    v is the base optimizer's momentum: SGD's ``momentum_buffer``, or ``exp_avg`` of Adam and the like. So a step takes
    one pass. The authors leave the model at the perturbed weights between steps, and remove the perturbation to
    evaluate and to save. Here it is removed when a step ends, so that the model holds w. Until there is momentum, steps
    are those of the base optimizer.

    Weight decay is our reading: it is the base optimizer's and acts on w. The authors' code is an optimizer by itself:
    there that of SGD acts on the perturbed weights, and that of AdamW on the weights after the update. Without weight
    decay there is no difference.

    Args:
        rho: radius; by default 3, which the authors' published commands use, for CIFAR-100 and ImageNet alike
            (github.com/MarlonBecker/MSAM; the defaults of their classes are 0.3 for SGD and 1 for AdamW).
        all others: as for :class:`SAM`; the base must keep a momentum.

    Drive it with closures, ``each_pass()`` or ``TrainStep``: the perturbation comes before the only backward pass. With
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
        """As for all methods, but a step must have been begun.

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
        """Refuses state without a momentum, with which no step would be perturbed. (Before the first there is none.)"""
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
