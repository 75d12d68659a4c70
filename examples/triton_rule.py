"""A method of one's own whose rule is compiled into the kernels: SAGM (Wang et al. 2023, arXiv 2303.10353).

SAGM perturbs by e = (rho / |g| - alpha) g and updates with (g + g+) / 2. Its rule is one line, written twice: in
Triton, for the kernels, and in torch, as the definition that every other backend uses. With the Triton backend, a step
is as many launches as a step of SAM. Run it: ``python examples/triton_rule.py``.

alpha g has the gradient's scale, so the class does not declare ``takes_scaled_gradients``, and GradScaler is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sam_kernels.triton import TritonRule
from sam_optim import Pass, Passes, SharpnessAwareOptimizer, Update


@triton.jit
def sagm_kernel(gram, parameters):
    """From gram[i][j] = <x_i, x_j>, here |g|^2 alone, to one coefficient for each gradient list."""
    return (parameters[0] / tl.sqrt(gram[0][0]) - parameters[1],)


def sagm(gram: Tensor, parameters: tuple[float, ...]) -> Tensor:
    """The same in torch."""
    return parameters[0] / gram.diagonal().sqrt() - parameters[1]


class SAGM(SharpnessAwareOptimizer):
    """base(w, (g + g+) / 2) with g+ taken at w + (rho / |g| - alpha) g."""

    def __init__(
        self, params: Any, base_optimizer: Any, rho: float = 0.05, alpha: float = 0.001, **kwargs: Any
    ) -> None:
        super().__init__(params, base_optimizer, {"rho": rho, "alpha": alpha}, **kwargs)

    def passes(self) -> Passes:
        g = yield Pass(kept=True)  # the update needs it again
        group = self.param_groups[0]
        self.ascend(g, rule=TritonRule(sagm_kernel, sagm, (group["rho"], group["alpha"])))
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g, g_plus, scale=0.5)


def main() -> None:
    # L(w) = 1/2 w' diag(1, 4) w from (3, 1): the gradient is (3, 4), its norm 5.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = torch.tensor([3.0, 1.0], dtype=torch.float64, device=device)
    weight = start.clone().requires_grad_()
    curvature = torch.tensor([1.0, 4.0], dtype=torch.float64, device=device)
    optimizer = SAGM([weight], torch.optim.SGD, rho=0.5, alpha=0.01, lr=0.1)
    for step in (optimizer.first_step, optimizer.second_step):
        (0.5 * curvature * weight**2).sum().backward()
        step(zero_grad=True)
    print("after one step:", weight.tolist(), "(the formula gives 2.6865, 0.528)")


if __name__ == "__main__":
    main()
