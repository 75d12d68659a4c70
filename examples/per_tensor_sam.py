"""The yardstick: SAM as it is commonly written, a handful of PyTorch calls for each tensor.

Kept for comparisons, in the quickstart and the benchmarks; it takes 92 bytes of traffic a parameter with SGD, like the
classes in use, multiplications by 1.0 included. Train with :class:`sam_optim.SAM`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class PerTensorSAM(Optimizer):
    """SAM and elementwise ASAM with one norm, one copy and a few additions for each tensor.

    Args:
        params, base_optimizer, rho, adaptive, **kwargs: as for :class:`sam_optim.SAM`; ``adaptive`` is a bool.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        norms = [
            ((p.abs() if group["adaptive"] else 1.0) * p.grad).norm()
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        norm = torch.stack(norms).norm()
        for group in self.param_groups:
            scale = group["rho"] / (norm + 1e-12)
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.state[p]["old"] = p.detach().clone()
                p.add_((p.pow(2) if group["adaptive"] else 1.0) * p.grad * scale.to(p))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Runs the closure for the second pass."""
        if closure is None:
            raise RuntimeError("PerTensorSAM.step needs a closure")
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            loss = closure()
        self.second_step()
        return loss
