"""A method of one's own: two passes, and a rule that no kernel knows.

Monge SAM (arXiv 2502.08448) shortens the perturbation where the gradient is large: e = rho g / (|g| sqrt(1 + |g|^2)).
Its rule maps the Gram matrix to a coefficient in two lines of torch; Gram matrix, perturbation and fused update run in
the package's kernels. Run it: ``python examples/own_method.py``.

The perturbation depends on how large the gradient is, so the class does not declare ``takes_scaled_gradients``, and
GradScaler is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sam_optim import Pass, Passes, SharpnessAwareOptimizer, Update


class MongeSAM(SharpnessAwareOptimizer):
    """base(w, g+) with g+ taken at w + rho g / (|g| sqrt(1 + |g|^2))."""

    def __init__(self, params: Any, base_optimizer: Any, rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, base_optimizer, {"rho": rho}, **kwargs)

    def rule(self, gram: Tensor) -> Tensor:
        """From the Gram matrix of the gradient lists, here |g|^2 alone, to their coefficients."""
        squared = gram.diagonal()
        return (squared * (1.0 + squared)).rsqrt().nan_to_num(posinf=0.0)

    def passes(self) -> Passes:
        g = yield Pass()
        self.ascend(g, rule=self.rule, scale=self.radii())
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g_plus)


def main() -> None:
    # L(w) = 1/2 w' diag(1, 4) w from (3, 1): the gradient is (3, 4), its norm 5.
    weight = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = MongeSAM([weight], torch.optim.SGD, rho=0.5, lr=0.1)
    for step in (optimizer.first_step, optimizer.second_step):
        (0.5 * torch.tensor([1.0, 4.0]) * weight**2).sum().backward()
        step(zero_grad=True)
    print("after one step:", weight.tolist(), "(the formula gives 2.69412, 0.56862)")


if __name__ == "__main__":
    main()
