"""Training by a method's formula, in float64, with torch's own base optimizer. See methods.py for the formulas."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .bases import Base
from .methods import Method


def operator(model: nn.Module, adaptive: bool | str, eta: float | None) -> Tensor:
    """ASAM's T(w) of the weights as they are, one long vector."""
    parts = []
    for name, p in model.named_parameters():
        w = p.detach().reshape(-1)
        if adaptive == "weights":
            parts.append(w.abs() + (0.01 if eta is None else eta) if "weight" in name else torch.ones_like(w))
        else:
            parts.append(w.abs() + (eta or 0.0) if adaptive else torch.ones_like(w))
    return torch.cat(parts)


class PlainBase:
    """torch's own optimizer, of one long vector of weights. It minimises: of a base that maximises f, -f."""

    def __init__(self, model: nn.Module, base: Base) -> None:
        self.cls = base.cls
        self.settings = {key: value for key, value in copy.deepcopy(base.settings).items() if key != "maximize"}
        self.params = list(model.parameters())
        self.optimizer = self.cls(self.params, **self.settings)

    def __call__(self, w: Tensor, x: Tensor) -> Tensor:
        """The weights after an update from w with the gradient x."""
        return self._updated(self.params, self.optimizer, w, x)

    def look_ahead(self, w: Tensor, x: Tensor) -> Tensor:
        """The same, made by a copy of the optimizer."""
        twins = [nn.Parameter(p.detach().clone()) for p in self.params]
        twin = self.cls(twins, **copy.deepcopy(self.settings))
        twin.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return self._updated(twins, twin, w, x)

    @staticmethod
    def _updated(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, w: Tensor, x: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(w.clone(), params)  # which lets them lie in that vector
        for p, own in zip(params, x.split([p.numel() for p in params]), strict=True):
            p.grad = own.view_as(p).clone()
        optimizer.step()
        return nn.utils.parameters_to_vector(params).detach()

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def momentum(self) -> Tensor | None:
        """One long vector; None before the first update."""
        state = [self.optimizer.state[p] for p in self.params if p in self.optimizer.state]
        found = [own["momentum_buffer"] if "momentum_buffer" in own else own["exp_avg"] for own in state]
        return torch.cat([v.reshape(-1) for v in found]) if found else None


class Oracle:
    """A model that is trained by the formula of a method.

    Args:
        losses: a function of model and batch for each kind of data, and for "train".
    """

    def __init__(self, method: Method, base: Base, model: nn.Module, losses: dict[str, Any], **settings: Any) -> None:
        self.model, self.losses, self.sign = model, losses, -1.0 if base.maximizes else 1.0
        self.settings = {**method.settings, **settings}
        self.adaptive, self.eta = self.settings.pop("adaptive", False), self.settings.pop("eta", None)
        self.formula, self.base, self.kept = method.oracle, PlainBase(model, base), {}

    def step(self, batches: dict[str, Any]) -> None:
        params = list(self.model.parameters())

        def gradient(at: Tensor, data: str = "train") -> Tensor:
            nn.utils.vector_to_parameters(at, params)
            loss = self.losses.get(data, self.losses["train"])(self.model, batches[data])
            return torch.cat([g.reshape(-1) for g in torch.autograd.grad(self.sign * loss, params)])

        w = nn.utils.parameters_to_vector(params).detach()
        t = operator(self.model, self.adaptive, self.eta)
        nn.utils.vector_to_parameters(self.formula(w, t, gradient, self.base, self.kept, **self.settings), params)
