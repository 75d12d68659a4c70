"""What methods keep belongs to parameters, not to places, however the groups' lists change; and optimizer.state."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections import defaultdict

import pytest
import torch
from torch import nn

from sam_optim import SAMPa, VaSSO

from .bases import ADAMW, PLAIN_SGD, SGD, UNFUSED
from .cases import weights_of
from .methods import methods_with, named

# What SAMPa keeps is of one step alone.
BY_PARAMETER = methods_with(keeps_state=True, uses_previous_batch=False)


class Parts(nn.Module):
    """A sum of layers, of which some are in use."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(5, 3) for _ in range(count)).double()
        self.used = list(range(count))

    def forward(self, x):
        return sum(torch.tanh(self.layers[i](x)) for i in sorted(self.used))


def a_step(optimizer, model, number):
    generator = torch.Generator().manual_seed(number)
    x = {name: torch.randn(6, 5, generator=generator, dtype=torch.float64) for name in ("train", "validation")}
    for p in optimizer.each_pass():
        (model(x["validation" if p.data == "validation" else "train"]) - 1.0).pow(2).mean().backward()


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("base", [PLAIN_SGD, SGD, ADAMW, UNFUSED], ids=str)
@pytest.mark.parametrize("method", BY_PARAMETER, ids=str)
def test_changed_lists_are_as_parameters_without_gradients(method, base, named):
    """An optimizer that knows all layers from the beginning, and one that is told which are in use, in any order."""
    wide_model = Parts()
    narrow_model = copy.deepcopy(wide_model)
    settings = {**method.settings, **copy.deepcopy(base.settings)}
    wide = method.cls(wide_model.parameters(), base.cls, **settings)
    params = narrow_model.named_parameters() if named else narrow_model.parameters()
    narrow = method.cls(params, base.cls, **settings)
    chance = random.Random(5)
    for number in range(14):
        used = chance.sample(range(4), chance.randint(1, 4))
        order = [p for i in used for p in narrow_model.layers[i].parameters()]
        chance.shuffle(order)
        narrow.param_groups[0]["params"] = order
        for model, optimizer in ((wide_model, wide), (narrow_model, narrow)):
            model.used = used
            a_step(optimizer, model, number)
            optimizer.zero_grad()
        torch.testing.assert_close(weights_of(narrow_model), weights_of(wide_model), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", BY_PARAMETER, ids=str)
def test_a_new_head_does_not_inherit(method):
    """In the place of the old one, of its shape or another: the steps of an optimizer that always had both."""
    for size in (3, 7):
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        heads = [model[2], nn.Linear(4, size).double()]
        wide_model = copy.deepcopy(model)
        wide_heads = [wide_model[2], copy.deepcopy(heads[1])]
        settings = {"lr": 0.1, "momentum": 0.9, **method.settings}
        every = [*wide_model.parameters(), *wide_heads[1].parameters()]
        wide = method.cls(every, torch.optim.SGD, **settings)
        narrow = method.cls(model.parameters(), torch.optim.SGD, **settings)
        for number in range(6):
            if number == 3:
                model[2], wide_model[2] = heads[1], wide_heads[1]
                narrow.param_groups[0]["params"] = list(model.parameters())
            for own, optimizer in ((model, narrow), (wide_model, wide)):
                a_step(optimizer, own, number)
                optimizer.zero_grad()
            torch.testing.assert_close(weights_of(model), weights_of(wide_model), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", [named("FriendlySAM"), named("VaSSO")], ids=str)
def test_a_changed_shape_starts_anew(method):
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = method.cls([weight], torch.optim.SGD, lr=0.1, **method.settings)

    def step(own, at):
        for _ in own.each_pass():
            (at * torch.arange(1.0, 1.0 + len(at), dtype=torch.float64)).pow(2).sum().backward()

    step(optimizer, weight)
    step(optimizer, weight)
    optimizer.zero_grad()
    weight.data = torch.full((4,), 2.0, dtype=torch.float64)
    other = nn.Parameter(weight.detach().clone())
    fresh = method.cls([other], torch.optim.SGD, lr=0.1, **method.settings)
    for own, at in ((optimizer, weight), (fresh, other)):
        step(own, at)
        step(own, at)
    assert torch.equal(weight, other)


@pytest.mark.parametrize("base", [PLAIN_SGD, SGD, ADAMW], ids=str)
def test_sampa_moves_along_gradients_of_the_step_before_alone(base):
    """As an optimizer made anew for each step, whose state is carried by name."""
    model = Parts()
    other = copy.deepcopy(model)
    names = {p: name for name, p in other.named_parameters()}
    settings = {"rho": 0.1, **copy.deepcopy(base.settings)}
    narrow = SAMPa(model.parameters(), base.cls, **settings)
    of_base, of_method = {}, {}
    chance = random.Random(6)
    for number in range(10):
        used = chance.sample(range(4), chance.randint(1, 4))
        model.used = other.used = used
        narrow.param_groups[0]["params"] = [p for i in used for p in model.layers[i].parameters()]
        a_step(narrow, model, number)
        narrow.zero_grad()

        params = [p for i in sorted(used) for p in other.layers[i].parameters()]
        fresh = SAMPa(params, base.cls, **settings)
        saved = fresh.state_dict()
        for index, p in enumerate(params):
            entries = copy.deepcopy(of_base.get(names[p], {}))
            saved["state"].update({index: entries} if entries else {})
        if of_method:
            saved["method_state"] = {"y_gradient": [of_method.get(names[p]) for p in params]}
        fresh.load_state_dict(saved)
        a_step(fresh, other, number)
        fresh.zero_grad()
        of_base.update({names[p]: dict(fresh.base_optimizer.state.get(p, {})) for p in params})
        of_method = dict(zip(map(names.get, params), fresh.method_state("y_gradient"), strict=True))
        torch.testing.assert_close(weights_of(model), weights_of(other), rtol=1e-10, atol=1e-12)


def test_it_goes_with_its_parameter():
    model = Parts(2)
    optimizer = VaSSO(model.parameters(), torch.optim.SGD, lr=0.1)
    a_step(optimizer, model, 0)
    reference = weakref.ref(optimizer.method_state("direction")[3])
    model.layers, model.used = model.layers[:1], [0]
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.zero_grad()
    a_step(optimizer, model, 1)
    gc.collect()
    assert reference() is None


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_in_two_places():
    weight, other = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = VaSSO([weight, other, weight], torch.optim.SGD, lr=0.0)
    for order in ([weight, other, weight], [other, weight, weight], [weight, weight]):
        optimizer.param_groups[0]["params"] = order
        for _ in optimizer.each_pass():
            (weight + other).pow(2).sum().backward()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        entries = optimizer.method_state("direction")
        assert len(entries) == len(order)
        of_one = [entry for entry, p in zip(entries, order, strict=True) if p is weight]
        assert all(torch.equal(entry, of_one[0]) for entry in of_one)


def test_state_shows_what_is_kept():
    model = Parts(2)
    optimizer = VaSSO(model.parameters(), torch.optim.AdamW, lr=0.1)
    a_step(optimizer, model, 0)
    weight = next(model.parameters())
    kept = optimizer.method_state("direction")
    assert optimizer.state[weight]["sam_optim_direction"] is kept[0]
    assert set(optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq", "sam_optim_direction"}
    # The base is not to take foreign entries for its own.
    assert set(optimizer.base_optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}

    entries = optimizer.state[weight]
    entries["exp_avg"] = torch.full_like(weight, 3.0)
    assert optimizer.base_optimizer.state[weight]["exp_avg"].eq(3.0).all()
    entries["sam_optim_direction"] = torch.full_like(weight, 2.0)
    assert optimizer.method_state("direction")[0].eq(2.0).all()
    # As trainers move state from device to device.
    for param, held in optimizer.state.items():
        optimizer.state[param] = {k: v * 2 for k, v in held.items()}
    assert optimizer.method_state("direction")[0].eq(4.0).all()
    assert optimizer.base_optimizer.state[weight]["exp_avg"].eq(6.0).all()
    assert "sam_optim_direction" not in optimizer.base_optimizer.state[weight]
    assert type(copy.deepcopy(optimizer.state)) is dict
    other = nn.Parameter(torch.ones(1))
    assert other not in optimizer.state and optimizer.state.get(other) is None
    assert other not in optimizer.base_optimizer.state and len(optimizer.state) == 4

    del optimizer.state[weight]
    assert optimizer.method_state("direction")[0] is None
    assert weight not in optimizer.base_optimizer.state
    optimizer.state = defaultdict(dict)
    assert not optimizer.has_method_state("direction")
    assert not optimizer.state
