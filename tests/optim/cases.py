"""One database of base optimizers and methods, a small problem, and SAM written out plainly as the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim import SAM, SharpnessAwareOptimizer


@dataclass(frozen=True)
class Base:
    """A base optimizer and settings for it."""

    cls: type[torch.optim.Optimizer]
    settings: dict[str, Any]
    fused: bool = True

    def __str__(self) -> str:
        return ",".join([self.cls.__name__, *(f"{k}={v}" for k, v in self.settings.items())])

    @property
    def sign(self) -> float:
        """-1 if it maximises f, which is to minimise -f."""
        return -1.0 if self.settings.get("maximize") else 1.0

    def minimizing(self, params: Any) -> torch.optim.Optimizer:
        """For the oracles: the base without ``maximize``, to be given gradients of ``sign`` times f."""
        settings = {k: v for k, v in copy.deepcopy(self.settings).items() if k != "maximize"}
        return self.cls(params, **settings)


BASES = [
    Base(torch.optim.SGD, {"lr": 0.05}),
    Base(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    Base(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.2, "maximize": True}),
    Base(torch.optim.SGD, {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
    Base(torch.optim.SGD, {"lr": torch.tensor(0.05), "momentum": 0.9}),
    Base(torch.optim.Adam, {"lr": 0.01}),
    Base(torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    Base(torch.optim.Adam, {"lr": 0.01, "betas": (0.3, 0.9), "maximize": True, "weight_decay": 0.1}),
    Base(torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    Base(torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "eps": 1e-3}),
    Base(torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}, fused=False),
    Base(torch.optim.Adagrad, {"lr": 0.05}, fused=False),
    Base(torch.optim.RAdam, {"lr": 0.01}, fused=False),
]


@dataclass(frozen=True)
class Method:
    """A method, its settings, and T(w) for the oracle: from a weight's name and value to T."""

    cls: type[SharpnessAwareOptimizer]
    settings: dict[str, Any]
    geometry: Callable[[str, Tensor], Tensor | float] = field(default=lambda name, w: 1.0)

    def __str__(self) -> str:
        return ",".join([self.cls.__name__, *(f"{k}={v}" for k, v in self.settings.items())])

    def make(self, model: nn.Module, base: Base, **more: Any) -> SharpnessAwareOptimizer:
        settings = {**self.settings, **copy.deepcopy(base.settings), **more}
        return self.cls(model.named_parameters(), base.cls, **settings)


METHODS = [
    Method(SAM, {"rho": 0.1}),
    Method(SAM, {"rho": 1.0, "adaptive": True}, lambda name, w: w.abs()),
    Method(SAM, {"rho": 0.5, "adaptive": "elementwise", "eta": 0.1}, lambda name, w: w.abs() + 0.1),
    Method(SAM, {"rho": 0.5, "adaptive": "weights"}, lambda name, w: w.abs() + 0.01 if "weight" in name else 1.0),
]


class Net(nn.Module):
    """Two layers with weights and biases of odd sizes."""

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(7, 33)]
        if batch_norm:
            layers.append(nn.BatchNorm1d(33))
        layers += [nn.Tanh(), nn.Dropout(dropout), nn.Linear(33, 3)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def make_net(dtype: torch.dtype = torch.float64, **kwargs: Any) -> Net:
    torch.manual_seed(1)
    return Net(**kwargs).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64, size: int = 12) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(size, 7, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(
        model(batch[0]).float() if batch[0].dtype.itemsize < 4 else model(batch[0]), batch[1]
    )


def step_by_hand(optimizer: Any, model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """The loop that users of SAM classes know. Returns the loss at the weights themselves."""
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, batch).backward()
    optimizer.second_step(zero_grad=True)
    return loss.item()


def by_every_pass_closure(optimizer: Any, model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """A step by one closure that clears the gradients and runs forward and backward. Returns what the step returns."""

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss.item()

    return optimizer.step(closure)


def oracle_step(
    model: nn.Module, base: torch.optim.Optimizer, rho: float, geometry: Any, batch: Any, sign: float = 1.0
) -> None:
    """SAM from its formula: e = rho T^2 g / |T g|, then torch's own base optimizer with the gradient at w + e.

    Of sign times the loss, which the base minimises.
    """
    base.zero_grad()
    (sign * loss_of(model, batch)).backward()
    named = dict(model.named_parameters())
    before = {name: w.detach().clone() for name, w in named.items()}
    operators = {name: geometry(name, w) for name, w in before.items()}
    norm = torch.sqrt(sum(((operators[name] * w.grad) ** 2).sum() for name, w in named.items()))
    with torch.no_grad():
        for name, w in named.items():
            w.copy_(before[name] + rho * operators[name] ** 2 * w.grad / norm)
    base.zero_grad()
    (sign * loss_of(model, batch)).backward()
    with torch.no_grad():
        for name, w in named.items():
            w.copy_(before[name])
    base.step()


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    """Bit for bit."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
