"""What an optimizer holds is given back when it goes, not when Python next looks for cycles; and threads."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from sam_optim import TrainStep

from .bases import ADAMW, KINDS, SGD
from .cases import assert_same, batches, loss_of, make_net, step_by_hand, weights_of
from .methods import METHODS, named


@pytest.fixture(scope="module")
def collected():
    # torch's compiler, imported with the first optimizer, leaves a traceback with frames behind.
    named("SAM").make(make_net(), SGD)
    gc.collect()


@pytest.fixture
def no_collector(collected):
    gc.disable()
    yield
    gc.enable()


def train(method, base, by_hand, **more):
    """References to optimizer, snapshot and a parameter after training, all of which nobody holds any more."""
    dtype = torch.bfloat16 if more else torch.float32
    model = make_net(dtype)
    optimizer = method.make(model, base, **more)
    step = TrainStep(model, optimizer, loss_of)
    batch, other = batches(2, dtype)
    for _ in range(3):
        if by_hand:
            for p in optimizer.each_pass():
                loss_of(model, other if p.data in ("validation", "memory") else batch).backward()
        elif "MGSER" in type(optimizer).__name__:
            step(batch, memory_batch=other)
        else:
            step(batch, other)
    held = [optimizer, optimizer._plans.snapshot, next(model.parameters())]
    return [weakref.ref(thing) for thing in held]


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_everything_is_freed_at_once(no_collector, method, base, by_hand):
    assert [reference() for reference in train(method, base, by_hand)] == [None] * 3


@pytest.mark.parametrize("by_hand", [True, False])
def test_masters_are_freed_at_once(no_collector, by_hand):
    assert [reference() for reference in train(named("SAM"), SGD, by_hand, master_weights=True)] == [None] * 3


@pytest.mark.parametrize("backend", ["cuda-shim", "triton"])
def test_tables_of_device_backends_are_freed_at_once(request, no_collector, backend):
    request.getfixturevalue({"cuda-shim": "shim", "triton": "interpreter"}[backend])
    assert [reference() for reference in train(named("SAM"), ADAMW, True, backend=backend)] == [None] * 3


def test_threads_with_optimizers_of_their_own():
    def train_with(rho):
        model = models[rho]
        optimizer = named("SAM").cls(model.parameters(), torch.optim.SGD, rho=rho, lr=0.05, momentum=0.9)
        for batch in batches(30):
            step_by_hand(optimizer, model, batch)
        found[rho] = weights_of(model)

    radii = (0.01, 0.05, 0.1, 0.2)
    found: dict[float, list[torch.Tensor]] = {}
    models = {rho: make_net() for rho in radii}
    for rho in radii:
        train_with(rho)
    wanted, found = found, {}
    models = {rho: make_net() for rho in radii}
    threads = [threading.Thread(target=train_with, args=(rho,)) for rho in radii]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rho in radii:
        assert_same(found[rho], wanted[rho])
