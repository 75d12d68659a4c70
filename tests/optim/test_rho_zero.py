"""rho = 0: the base optimizer's steps bit for bit, and one gradient where the driver can do with one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sam_optim import SAM, FriendlySAM, TrainStep, VaSSO

from .bases import ADAMW_AMSGRAD, SGD
from .cases import assert_same, batches, loss_of, make_net, weights_of
from .methods import methods_with


class Counted(nn.Module):
    """Counts its forward passes."""

    def __init__(self, model):
        super().__init__()
        self.model, self.count = model, 0

    def forward(self, x):
        self.count += 1
        return self.model(x)


def by_each_pass(model, optimizer, data):
    for batch in data:
        for p in optimizer.each_pass():
            assert (p.data, p.perturbed, p.last) == ("train", False, True)
            loss_of(model, batch).backward()


def by_closure(model, optimizer, data):
    for batch in data:

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        assert optimizer.step(closure, closure_runs="every_pass") is not None


def by_train_step(model, optimizer, data):
    step = TrainStep(model, optimizer, loss_of)
    for batch in data:
        step(batch)


def by_groups(model, optimizer, data):
    for batch in data:
        for group in optimizer.stepper.each_group():
            loss_of(model, batch).backward()
            group.gradients = [[p.grad for p in optimizer.param_groups[0]["params"]]]
            optimizer.zero_grad()


DRIVERS = [by_each_pass, by_closure, by_train_step, by_groups]


@pytest.mark.parametrize("method", methods_with(plain_steps_take_one_pass=True), ids=str)
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("base", [SGD, ADAMW_AMSGRAD], ids=str)
def test_one_pass_and_the_base_bit_for_bit(method, driver, base):
    """Dropout's draws and BatchNorm's statistics included."""
    data = batches(5, torch.float32)
    results = []
    for plain in (True, False):
        model = Counted(make_net(torch.float32, dropout=0.5, batch_norm=True))
        torch.manual_seed(3)
        if plain:
            optimizer = base.cls(model.parameters(), **copy.deepcopy(base.settings))
            for batch in data:
                loss_of(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        else:
            driver(model, method.make(model, base, rho=0.0), data)
        assert model.count == len(data)
        results.append([*weights_of(model), *model.buffers(), torch.get_rng_state()])
    assert_same(*results)


def test_two_gradients_where_the_driver_has_two():
    """The second is the one that counts, as ever; and a closure for the second pass is called."""
    for by_hand in (True, False):
        model, plain = Counted(make_net()), make_net()
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.0, lr=0.1)
        base = torch.optim.SGD(plain.parameters(), lr=0.1)
        first, second = batches(2)
        loss_of(model, first).backward()
        if by_hand:
            optimizer.first_step(zero_grad=True)
            loss_of(model, second).backward()
            optimizer.second_step()
        else:
            optimizer.step(
                lambda model=model, batch=second: loss_of(model, batch).backward(), closure_runs="second_pass"
            )
        assert model.count == 2
        loss_of(plain, second).backward()
        base.step()
        assert_same(weights_of(model), weights_of(plain))


def test_one_radius_above_zero_takes_two_passes():
    model = Counted(make_net())
    groups = [{"params": [p], "rho": 0.1 if number == 2 else 0.0} for number, p in enumerate(model.parameters())]
    optimizer = SAM(groups, torch.optim.SGD, lr=0.1)
    step = TrainStep(model, optimizer, loss_of)
    for radius, passes in ((0.1, 2), (0.0, 3), (0.1, 5)):
        optimizer.param_groups[2]["rho"] = radius
        step(batches(1)[0])
        assert model.count == passes


@pytest.mark.parametrize(("cls", "name"), [(FriendlySAM, "average"), (VaSSO, "direction")])
def test_averages_are_fed_at_radius_zero(cls, name):
    """A step that leaves something for later steps is not cut short."""
    model = make_net()
    optimizer = cls(model.parameters(), torch.optim.SGD, rho=0.0, lr=0.0)
    step = TrainStep(model, optimizer, loss_of)
    seen = []
    for batch in batches(2):
        step(batch)
        seen.append([t.clone() for t in optimizer.method_state(name)])
    assert not any(torch.equal(a, b) for a, b in zip(*seen, strict=True))


class _Averaging(SAM):
    """A method of a user's, which has not promised anything."""

    def passes(self):
        yield from super().passes()
        self.param_groups[0]["seen"] = self.param_groups[0].get("seen", 0) + 1


def test_a_method_that_promises_nothing_is_run():
    model = make_net()
    optimizer = _Averaging(model.parameters(), torch.optim.SGD, rho=0.0, lr=0.1)
    by_train_step(model, optimizer, batches(3))
    assert optimizer.param_groups[0]["seen"] == 3
