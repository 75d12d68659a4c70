"""A small problem, and what tests compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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


def memory_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of soft labels and hard ones, as in dark experience replay."""
    logits = model(batch[0])
    return 0.5 * (logits - batch[0][:, :3]).pow(2).mean() + 0.3 * nn.functional.cross_entropy(logits, batch[1])


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


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    """Bit for bit."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
