"""GradScaler around every method that takes scaled gradients; the others refuse it (test_promises.py as well)."""

from __future__ import annotations

import pytest
import torch

from sam_optim import InvalidSettingError, StepOrderError, TrainStep

from .bases import SGD, UNFUSED
from .cases import assert_same, batches, loss_of, make_net, weights_of
from .drivers import by_train_step, data_of_steps
from .methods import methods_with

SCALED = methods_with(takes_scaled_gradients=True)
REFUSING = methods_with(takes_scaled_gradients=False)
BY_TWO_CALLS = methods_with(takes_scaled_gradients=True, by_two_calls=True, needs=set())


def assert_close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", SCALED, ids=str)
def test_by_train_step(method):
    """Rules do not depend on the gradients' scale."""
    results = []
    for scaled in (True, False):
        model = make_net(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if scaled else None
        by_train_step(method.make(model, SGD), model, data_of_steps(5, torch.float32), scaler=scaler)
        results.append(weights_of(model))
    assert_close(*results)


@pytest.mark.parametrize("method", BY_TWO_CALLS, ids=str)
def test_by_hand(method):
    """Where a step takes one pass, first_step() must not update with a gradient whose scale it cannot know."""
    results = []
    for scale in (256.0, 1.0):
        model = make_net(torch.float32)
        optimizer = method.make(model, SGD)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for batch in batches(6, torch.float32):
            scaler.scale(loss_of(model, batch)).backward()
            optimizer.first_step(zero_grad=True)
            scaler.scale(loss_of(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(weights_of(model))
    assert_close(*results)


COMBINING = methods_with(takes_scaled_gradients=True, combines=True)


@pytest.mark.parametrize("method", COMBINING, ids=str)
@pytest.mark.parametrize("infinite_pass", [0, 1])
def test_an_infinity_in_either_gradient_is_seen(method, infinite_pass):
    model = make_net(torch.float32)
    calls = []

    def loss(model, batch):
        calls.append(None)
        return loss_of(model, batch) * (float("inf") if len(calls) - 1 == infinite_pass else 1.0)

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    step = TrainStep(model, method.make(model, SGD), loss, scaler=scaler)
    before = weights_of(model)
    for number, batch in enumerate(batches(2, torch.float32)):
        step(batch)
        assert scaler.get_scale() == 128.0
        assert step.optimizer.last_step.updated == (number > 0)
        if number == 0:
            assert_same(weights_of(model), before)
    assert all(w.isfinite().all() for w in weights_of(model))


@pytest.mark.parametrize("method", [m for m in COMBINING if m in BY_TWO_CALLS], ids=str)
@pytest.mark.parametrize("base", [SGD, UNFUSED], ids=str)
def test_an_infinite_first_gradient_by_hand(method, base):
    """GradScaler sees the second one alone, here finite: nothing is updated all the same."""
    model = make_net(torch.float32)
    optimizer = method.make(model, base)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = weights_of(model)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batches(1, torch.float32)[0]) * factor).backward()
        if factor != 1.0:
            optimizer.first_step()
    scaler.step(optimizer)
    scaler.update()
    assert not optimizer.last_step.updated
    assert_same(weights_of(model), before)


@pytest.mark.parametrize("method", [m for m in SCALED if not m.combines], ids=str)
def test_an_infinite_first_gradient_leaves_the_weights_finite(method):
    """The update takes another: it is made from the weights unperturbed, or skipped if it is that gradient itself."""
    model = make_net(torch.float32)
    calls = []

    def loss(model, batch):
        calls.append(None)
        return loss_of(model, batch) * (float("inf") if len(calls) == 1 else 1.0)

    step = TrainStep(model, method.make(model, SGD), loss, scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    before = weights_of(model)
    for data in data_of_steps(2, torch.float32):
        step(data["train"], data["validation"])
        if not step.optimizer.last_step.updated:
            assert len(calls) == 1
            assert_same(weights_of(model), before)
    assert step.optimizer.last_step.updated
    assert all(w.isfinite().all() for w in weights_of(model))


@pytest.mark.parametrize("method", REFUSING, ids=str)
def test_refused(method):
    model = make_net(torch.float32)
    optimizer = method.make(model, SGD)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(InvalidSettingError, match="GradScaler"):
        TrainStep(model, optimizer, loss_of, scaler=scaler)
    if not method.by_two_calls or method.needs:
        return
    before = weights_of(model)
    for first in (True, False):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batches(1, torch.float32)[0])).backward()
        if first:
            optimizer.first_step()
    with pytest.raises(StepOrderError, match="GradScaler"):
        scaler.step(optimizer)
    assert_same(weights_of(model), before)
