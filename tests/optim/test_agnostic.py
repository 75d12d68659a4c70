"""Agnostic-SAM and Align-SAM: closed forms, reductions and safety. Their formula is in methods.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sam_optim import SAM, AgnosticSAM, InvalidSettingError, StepOrderError, freeze_in_perturbed_passes

from .bases import KINDS, SGD, Base
from .cases import assert_same, batches, loss_of, make_net, weights_of
from .drivers import by_closures

# L_t = 1/2 (w-a)'A(w-a), L_v = 1/2 (w-b)'B(w-b): w after one step of plain SGD, rho_train .2, rho_val .1, lr .1.
A, B = torch.tensor([2.0, 1.0], dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
a, b = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
CLOSED_FORMS = [
    ({"variant": "agnostic"}, (0.637895268000044, -0.450999486332767)),
    ({"variant": "agnostic", "normalizer": "first"}, (0.638034498649299, -0.451653102022103)),
    ({"variant": "align"}, (0.637985718161494, -0.450994565436737)),
    ({"rho_val": 0.0}, (0.635777087639997, -0.441055728090001)),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("settings", "wanted"), CLOSED_FORMS, ids=str)
def test_closed_forms(settings, wanted, backend):
    w = torch.tensor([0.5, -0.5], dtype=torch.float64, requires_grad=True)
    optimizer = AgnosticSAM([w], torch.optim.SGD, 0.2, lr=0.1, backend=backend, **settings)
    for p in optimizer.each_pass():
        loss = (A * (w - a) ** 2).sum() / 2 if p.data == "train" else (B * (w - b) ** 2).sum() / 2
        loss.backward()
    assert w.tolist() == pytest.approx(wanted, abs=1e-12)


def data(count=6):
    return list(zip(batches(count), batches(2 * count, size=5)[count:], strict=True))


def make(base: Base = SGD, rho_train=0.2, model=None, **settings):
    model = model or make_net()
    settings = {**copy.deepcopy(base.settings), **settings}
    return model, AgnosticSAM(model.named_parameters(), base.cls, rho_train, **settings)


def by_passes(optimizer, model, train, validation):
    for p in optimizer.each_pass():
        loss_of(model, train if p.data == "train" else validation).backward()


@pytest.mark.parametrize("variant", ["agnostic", "align"])
@pytest.mark.parametrize("base", KINDS, ids=str)
def test_without_validation_radius_it_is_sam(variant, base):
    model, optimizer = make(base, rho_val=0.0, variant=variant)
    other = make_net()
    sam = SAM(other.parameters(), base.cls, rho=0.2, **copy.deepcopy(base.settings))
    for train, validation in data():
        by_passes(optimizer, model, train, validation)
        for _ in sam.each_pass():
            loss_of(other, train).backward()
    assert_same(weights_of(model), weights_of(other))


@pytest.mark.parametrize("variant", ["agnostic", "align"])
@pytest.mark.parametrize("base", KINDS, ids=str)
def test_without_any_radius_it_is_the_base(variant, base):
    model, optimizer = make(base, rho_train=0.0, variant=variant)
    other = make_net()
    plain = base.cls(other.parameters(), **copy.deepcopy(base.settings))
    for train, validation in data():
        by_passes(optimizer, model, train, validation)
        plain.zero_grad()
        loss_of(other, train).backward()
        plain.step()
    assert_same(weights_of(model), weights_of(other))


def test_align_on_one_batch_is_sam_with_the_difference():
    model, optimizer = make(variant="align", rho_train=0.5, rho_val=0.2)
    other = make_net()
    sam = SAM(other.parameters(), SGD.cls, rho=0.3, **SGD.settings)
    for train, _ in data():
        by_passes(optimizer, model, train, train)
        for _ in sam.each_pass():
            loss_of(other, train).backward()
    for x, y in zip(weights_of(model), weights_of(other), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


def test_align_does_not_depend_on_the_scale_of_the_validation_loss():
    results = []
    for scale in (1.0, 1000.0):
        model, optimizer = make(variant="align")
        for train, validation in data():
            for p in optimizer.each_pass():
                loss = loss_of(model, train) if p.data == "train" else scale * loss_of(model, validation)
                loss.backward()
        results.append(weights_of(model))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
@pytest.mark.parametrize("drive", ["passes", "closures", "break"])
def test_leaving_at_any_pass_restores_the_weights(failing, drive):
    model, optimizer = make(adaptive=True)
    pairs = data()
    by_passes(optimizer, model, *pairs[0])
    before = weights_of(model)
    calls = 0

    def run(batch):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise KeyboardInterrupt
        loss_of(model, batch).backward()

    if drive == "passes":
        with pytest.raises(KeyboardInterrupt):
            for p in optimizer.each_pass():
                run(pairs[1][0] if p.data == "train" else pairs[1][1])
    elif drive == "closures":
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(lambda: run(pairs[1][0]), lambda: run(pairs[1][1]))
    else:
        for p in optimizer.each_pass():
            if calls + 1 == failing:
                break
            run(pairs[1][0] if p.data == "train" else pairs[1][1])
    assert_same(weights_of(model), before)
    assert not optimizer.is_step_begun
    optimizer.zero_grad()
    by_passes(optimizer, model, *pairs[2])


@pytest.mark.parametrize("bad", [2, 3])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_infinite_validation_gradients_leave_the_weights_unperturbed(bad, backend):
    model, optimizer = make(backend=backend)
    before = weights_of(model)
    train, validation = data()[0]
    for number, p in enumerate(optimizer.each_pass(), start=1):
        if number == bad + 1:
            assert_same(weights_of(model), before)
            assert not optimizer.last_step.ascent.finite
        loss_of(model, train if p.data == "train" else validation).backward()
        if number == bad:
            model.layers[0].weight.grad[0, 0] = float("inf")
    assert optimizer.last_step.updated


def test_dropout_draws_and_statistics():
    torch.manual_seed(4)
    model, optimizer = make(model=make_net(dropout=0.5, batch_norm=True))
    freeze_in_perturbed_passes(model, optimizer)
    draws = []
    model.layers[3].register_forward_hook(lambda module, args, output: draws.append((output == 0).clone()))
    for train, validation in data(2):
        by_closures(optimizer, model, [{"train": train, "validation": validation}])
    for start in (0, 4):
        train, validation, validation_again, train_again = draws[start : start + 4]
        assert torch.equal(train, train_again)
        assert torch.equal(validation, validation_again)
        assert not torch.equal(train[:5], validation)
    assert not torch.equal(draws[0], draws[4])
    # Neither are the draws of one step taken up again by the next.
    assert not torch.equal(draws[1], draws[4][:5])
    assert model.layers[1].num_batches_tracked == 4


def test_step_hooks_fire_once():
    model, optimizer = make()
    calls = []
    optimizer.register_step_post_hook(lambda *args: calls.append(1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for train, validation in data(2):
        by_passes(optimizer, model, train, validation)
        scheduler.step()
    assert len(calls) == 2


def test_missing_and_partial_gradients():
    # A head that the validation loss does not see, and a parameter that only it sees.
    shared, head, probe = (nn.Parameter(torch.full((3,), value, dtype=torch.float64)) for value in (1.0, 2.0, 3.0))
    optimizer = AgnosticSAM([shared, head, probe], torch.optim.SGD, 0.2, lr=0.1, momentum=0.9)
    for _ in range(2):
        probe_before = probe.detach().clone()
        for p in optimizer.each_pass():
            loss = (shared * head).sum() if p.data == "train" else (shared**2 * probe).sum()
            loss.backward()
        assert torch.equal(probe, probe_before)


def test_calls_that_make_no_sense():
    model, optimizer = make()
    train, _ = data(1)[0]
    before = weights_of(model)
    with pytest.raises(StepOrderError, match="validation batch"):
        optimizer.step(lambda: loss_of(model, train).backward())
    for finish in (optimizer.step, optimizer.second_step):
        optimizer.zero_grad()
        loss_of(model, train).backward()
        optimizer.first_step()
        loss_of(model, train).backward()
        with pytest.raises(StepOrderError, match="each_pass"):
            finish()
        assert_same(weights_of(model), before)
    for arguments in (
        {"variant": "both"},
        {"normalizer": "last"},
        {"smoothing": 1.0},
        {"rho_val": -1.0},
        {"rho_train": -1.0},
    ):
        with pytest.raises(InvalidSettingError):
            make(**arguments)


def test_rho_val_follows_rho_train():
    model, optimizer = make()
    optimizer.param_groups[0]["rho"] = 0.0
    other = make_net()
    plain = SGD.cls(other.parameters(), **SGD.settings)
    train, validation = data(1)[0]
    by_passes(optimizer, model, train, validation)
    loss_of(other, train).backward()
    plain.step()
    assert_same(weights_of(model), weights_of(other))
