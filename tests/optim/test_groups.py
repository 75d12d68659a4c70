"""Groups that are added later: by the optimizer, by its base, or by whoever holds the list of groups."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sam_optim import SAM, InvalidSettingError, LookSAM, MomentumSAM, StepOrderError

from .bases import KINDS
from .cases import assert_same, batches, by_every_pass_closure, loss_of, make_net, step_by_hand, weights_of


def parts_of(model):
    return list(model.layers[0].parameters()), list(model.layers[-1].parameters())


def by_optimizer(optimizer, group):
    optimizer.add_param_group(group)


def by_base(optimizer, group):
    optimizer.base_optimizer.add_param_group(group)


def by_list(optimizer, group):
    optimizer.param_groups.append(group)


def by_new_list(optimizer, group):
    optimizer.param_groups = [*optimizer.param_groups, group]


WAYS = [by_optimizer, by_base, by_list, by_new_list]


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("add", WAYS)
@pytest.mark.parametrize("drive", [step_by_hand, by_every_pass_closure])
def test_an_added_group_is_trained(base, add, drive):
    """As if it had been there from the start, where the base has no state yet."""
    found = []
    for later in (True, False):
        model = make_net()
        first, second = parts_of(model)
        groups = [{"params": first}] if later else [{"params": first}, {"params": second}]
        settings = copy.deepcopy(base.settings)
        optimizer = SAM(groups, base.cls, rho=0.1, **settings)
        if later:
            # torch's own add_param_group() has the base's defaults, not what the constructor was given.
            add(optimizer, {"params": second})
        if drive is by_every_pass_closure:
            optimizer.closure_runs = "every_pass"
        for batch in batches(3):
            drive(optimizer, model, batch)
        found.append(weights_of(model))
    assert_same(*found)


@pytest.mark.parametrize("add", WAYS[1:])
def test_settings_of_an_added_group(add):
    model = make_net()
    first, second = parts_of(model)
    optimizer = SAM(first, torch.optim.SGD, rho=0.1, lr=0.1)
    add(optimizer, {"params": second, "rho": 0.0, "lr": 0.01})
    before = weights_of(model)
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step(zero_grad=True)
    moved = [not torch.equal(a, b) for a, b in zip(weights_of(model), before, strict=True)]
    assert moved == [True, True, False, False]
    group = optimizer.param_groups[-1]
    assert (group["rho"], group["lr"], group["adaptive"], group["momentum"]) == (0.0, 0.01, False, 0)


@pytest.mark.parametrize("params", ["tensor", "generator"])
def test_forms_of_params(params):
    model = make_net()
    first, second = parts_of(model)
    optimizer = SAM(first, torch.optim.SGD, rho=0.1, lr=0.1)
    optimizer.param_groups.append({"params": second[0] if params == "tensor" else (p for p in second)})
    before = weights_of(model)
    step_by_hand(optimizer, model, batches(1)[0])
    changed = [not torch.equal(a, b) for a, b in zip(weights_of(model), before, strict=True)]
    assert changed == [True, True, True, params == "generator"]


@pytest.mark.parametrize("add", WAYS[1:])
@pytest.mark.parametrize("rho", [0.1, 0.0])
def test_in_the_middle_of_a_step(add, rho):
    model = make_net()
    first, second = parts_of(model)
    optimizer = SAM(first, torch.optim.SGD, rho=rho, lr=0.1)
    step_by_hand(optimizer, model, batches(1)[0])
    model.zero_grad()
    before = weights_of(model)
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step(zero_grad=True)
    add(optimizer, {"params": second})
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(StepOrderError, match="in the middle of a step"):
        optimizer.second_step()
    assert_same(weights_of(model), before)
    model.zero_grad()
    step_by_hand(optimizer, model, batches(1)[0])
    assert all(not torch.equal(a, b) for a, b in zip(weights_of(model), before, strict=True))


@pytest.mark.parametrize("add", WAYS)
def test_settings_out_of_range(add):
    model = make_net()
    first, second = parts_of(model)
    optimizer = SAM(first, torch.optim.SGD, rho=0.1, lr=0.1)
    before = weights_of(model)
    with pytest.raises(InvalidSettingError, match="Invalid rho: -1"):
        add(optimizer, {"params": second, "rho": -1.0})
        step_by_hand(optimizer, model, batches(1)[0])
    assert_same(weights_of(model), before)
    assert not optimizer.is_step_begun


def test_an_entry_that_is_no_group():
    model = make_net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    optimizer.param_groups.append({"lr": 0.1})
    with pytest.raises(InvalidSettingError, match="must be a dict with 'params'"):
        step_by_hand(optimizer, model, batches(1)[0])


def of(params):
    return lambda p: {"params": params(p)}


@pytest.mark.parametrize(
    "make_group",
    [
        lambda p: "x",
        lambda p: 3,
        lambda p: None,
        of(lambda p: "x"),
        of(lambda p: 3),
        of(lambda p: {p}),
        of(lambda p: [torch.ones(2) * p.sum()]),
        of(lambda p: [p]),
        lambda p: {"lr": 0.1},
    ],
)
def test_what_torch_refuses(make_group):
    """The same error as torch's, and nothing is changed: neither groups, nor the dict."""
    errors = []
    for with_sam in (True, False):
        weight = nn.Parameter(torch.ones(3))
        make = (lambda p: SAM(p, torch.optim.SGD, lr=0.1)) if with_sam else lambda p: torch.optim.SGD(p, lr=0.1)
        optimizer = make([weight])
        group = make_group(weight)
        keys = set(group) if isinstance(group, dict) else None
        with pytest.raises(Exception) as raised:
            optimizer.add_param_group(group)
        errors.append((type(raised.value), str(raised.value).partition("tensor(")[0]))
        assert len(optimizer.param_groups) == 1
        if with_sam and keys is not None:
            assert set(group) == keys
    assert errors[0] == errors[1]


def test_what_the_method_refuses_changes_nothing():
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = MomentumSAM([weight], torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    group = {"params": [other], "momentum": 0.0}
    with pytest.raises(InvalidSettingError, match="Invalid momentum"):
        optimizer.add_param_group(group)
    assert group == {"params": [other], "momentum": 0.0}
    assert len(optimizer.param_groups) == 1 and other not in optimizer.state


def test_the_dict_that_is_given_is_the_group():
    """As with torch, whose callers change lr in the dict that they have added."""
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = LookSAM([weight], torch.optim.SGD, rho=0.1, lr=0.1)
    group = {"params": other, "rho": 0.3}
    optimizer.add_param_group(group)
    assert optimizer.param_groups[1] is group
    assert group["params"] == [other] and group["rho"] == 0.3 and group["lr"] == 0.1 and group["looksam_step"] == 0


def test_duplicates_within_a_group_are_warned_of():
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = SAM([weight], torch.optim.SGD, rho=0.1, lr=0.1)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer.add_param_group({"params": [other, other]})
