"""Ways of driving steps of any method, all of which lead to the same weights.

A driver is ``drive(optimizer, model, steps)``, where a step is a dictionary of batches (:func:`data_of_steps`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim import TrainStep

from .cases import batches, loss_of

Batch = tuple[Tensor, Tensor]
Data = dict[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]


def data_of_steps(count: int, dtype: torch.dtype = torch.float64) -> list[Data]:
    """For each step a batch for every kind of pass that a method may ask for, by its name. Sizes differ."""
    train, others = batches(count, dtype), batches(2 * count, dtype, size=5)
    return [
        {
            "train": train[number],
            "previous": train[number - 1] if number else None,
            "validation": others[number],
            "memory": others[count + number],
        }
        for number in range(count)
    ]


def by_train_step(
    optimizer: Any, model: nn.Module, steps: list[Data], loss: Loss = loss_of, **options: Any
) -> list[Any]:
    """Returns the losses. Of a run that is resumed, the first step gets the batch of the step before."""
    step = TrainStep(model, optimizer, loss, **options)
    losses = []
    for data in steps:
        previous = {} if losses else {"previous_batch": data["previous"]}
        losses.append(step(data["train"], data["validation"], memory_batch=data["memory"], **previous))
    return losses


def by_each_pass(
    optimizer: Any, model: nn.Module, steps: list[Data], loss: Loss = loss_of, memory_loss: Loss | None = None
) -> None:
    for data in steps:
        for p in optimizer.each_pass():
            (memory_loss if memory_loss and p.data == "memory" else loss)(model, data[p.data]).backward()


def by_closures(
    optimizer: Any, model: nn.Module, steps: list[Data], loss: Loss = loss_of, memory_loss: Loss | None = None
) -> list[Any]:
    """One for each kind of batch, run for every pass. Returns what the steps return."""

    def closure(data: Data, kind: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            optimizer.zero_grad()
            value = (memory_loss if memory_loss and kind == "memory" else loss)(model, data[kind])
            value.backward()
            return value

        return run

    return [
        optimizer.step(
            *(closure(data, kind) for kind in ("train", "validation", "previous")),
            memory_closure=closure(data, "memory"),
            closure_runs="every_pass",
        )
        for data in steps
    ]


def by_begin_and_advance(optimizer: Any, model: nn.Module, steps: list[Data], loss: Loss = loss_of) -> None:
    """Gradients are cleared in place between passes, which must not touch those that the method has kept."""
    for data in steps:
        waiting = optimizer.begin()
        while waiting is not None:
            optimizer.zero_grad(set_to_none=False)
            loss(model, data[waiting.data]).backward()
            waiting = optimizer.advance()
    optimizer.zero_grad()


def by_two_calls(optimizer: Any, model: nn.Module, steps: list[Data], loss: Loss = loss_of) -> None:
    """For methods whose entries say ``by_two_calls``."""
    for data in steps:
        for call in (optimizer.first_step, optimizer.second_step):
            loss(model, data["train"]).backward()
            call(zero_grad=True)


DRIVERS = [by_train_step, by_each_pass, by_closures, by_begin_and_advance]


def take_steps(step: TrainStep, batches: list[Any], others: list[Any]) -> None:
    """A step for each pair of batches; before the third the optimizer's state is saved and loaded."""
    optimizer = step.optimizer
    for number, (batch, other) in enumerate(zip(batches, others, strict=True)):
        more = {}
        if number == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            more["previous_batch"] = batches[1]
        step(batch, other, memory_batch=other, **more)
    assert optimizer.last_step.updated
    repr(optimizer.last_step.ascent)
