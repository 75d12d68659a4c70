"""SAMPa: closed forms, reductions, state and safety. Its formula is in methods.py."""

from __future__ import annotations

import copy

import pytest
import torch

from sam_optim import InvalidSettingError, SAMPa, StepOrderError, freeze_in_perturbed_passes

from .bases import BASES, KINDS, SGD, Base
from .cases import assert_same, batches, by_every_pass_closure, loss_of, make_net, weights_of


def quadratic(settings, steps, lr=0.1, rho=0.1, h=(2.0, 1.0), start=(1.0, -1.0), **more):
    """Plain SGD on L = 1/2 w' diag(h) w; w after each call."""
    w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    curvature = torch.tensor(h, dtype=torch.float64)
    optimizer = SAMPa([w], torch.optim.SGD, rho, lr=lr, **settings, **more)
    seen = []
    for _ in range(steps):
        for _ in optimizer.each_pass():
            (curvature * w**2).sum().div(2).backward()
        seen.append(w.tolist())
    return seen


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_closed_forms(backend):
    start, first, second = quadratic({"lam": 0.2}, 3, backend=backend)
    assert start == [1.0, -1.0]
    assert first == pytest.approx((0.793689164944008, -0.898422291236002), abs=1e-12)
    assert second == pytest.approx((0.627406123361221, -0.806457972195343), abs=1e-12)
    _, first = quadratic({"lam": 0.0}, 2, backend=backend)
    assert first == pytest.approx((0.78211145618001, -0.895527864045002), abs=1e-12)


def test_lam_zero_settles_on_its_cycle():
    # f = a w^2 / 2 in one dimension, c = lr a: A, -B, -A, B.
    a, lr, rho = 5.0, 0.1, 0.2
    c = lr * a
    wanted_a = c * rho * (2 - c) / (1 + (1 - c) ** 2)
    wanted_b = c**2 * rho / (1 + (1 - c) ** 2)
    seen = [w[0] for w in quadratic({"lam": 0.0}, 200, lr=lr, rho=rho, h=(a,), start=(1.0,))][-4:]
    largest = max(range(4), key=lambda i: seen[i])
    cycle = [seen[(largest + i) % 4] for i in range(4)]
    assert cycle == pytest.approx([wanted_a, -wanted_b, -wanted_a, wanted_b], abs=1e-9)


def test_an_unperturbed_group_looks_ahead():
    """By the formula, with rho 0 for the second weight alone."""
    h, lr, rho, lam = torch.tensor([2.0, 1.0], dtype=torch.float64), 0.1, 0.1, 0.2
    x = torch.tensor([1.0, -1.0], dtype=torch.float64)
    weights = [x[i : i + 1].clone().requires_grad_() for i in range(2)]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "perturb": False}]
    optimizer = SAMPa(groups, torch.optim.SGD, rho, lam, lr=lr)
    g_y = h * x
    for number in range(4):
        for _ in optimizer.each_pass():
            (h * torch.cat(weights) ** 2).sum().div(2).backward()
        if number > 0:
            tilde = x + rho * torch.stack([g_y[0].sign(), g_y[1] * 0])
            g_y_next = h * (x - lr * g_y)
            x = x - lr * ((1 - lam) * h * tilde + lam * g_y_next)
            g_y = g_y_next
        torch.testing.assert_close(torch.cat(weights).detach(), x, rtol=1e-12, atol=1e-14)


def make(base: Base = SGD, rho=0.2, model=None, **settings):
    model = model or make_net()
    return model, SAMPa(model.named_parameters(), base.cls, rho, **{**copy.deepcopy(base.settings), **settings})


def by_passes(optimizer, model, previous, batch):
    for p in optimizer.each_pass():
        loss_of(model, previous if p.data == "previous" else batch).backward()


def by_closures(optimizer, model, previous, batch):
    return by_every_pass_closure(optimizer, model, batch)


def run(driver, base=SGD, count=6, **settings):
    model, optimizer = make(base, **settings)
    previous = None
    for batch in batches(count):
        driver(optimizer, model, previous, batch)
        previous = batch
    return weights_of(model)


@pytest.mark.parametrize("base", KINDS, ids=str)
def test_without_rho_and_lam_it_is_the_base(base):
    model = make_net()
    plain = base.cls(model.parameters(), **copy.deepcopy(base.settings))
    for batch in batches(6)[:-1]:
        plain.zero_grad()
        loss_of(model, batch).backward()
        plain.step()
    assert_same(run(by_passes, base, rho=0.0, lam=0.0), weights_of(model))


def test_with_lam_one_rho_does_not_matter():
    assert_same(run(by_passes, rho=0.1, lam=1.0), run(by_passes, rho=3.0, lam=1.0))


class TurnsGradients(torch.optim.SGD):
    """As pytorch-optimizer's do in place, to maximise."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.neg_()
        return super().step(closure)


def test_a_base_that_writes_into_gradients_does_not_into_the_one_that_is_kept():
    model = make_net()
    optimizer = SAMPa(model.parameters(), TurnsGradients, lr=0.05)
    [first] = batches(1)
    for _ in optimizer.each_pass():
        loss_of(model, first).backward()
    kept = [g.clone() for g in optimizer.method_state("y_gradient")]
    for number, _ in enumerate(optimizer.each_pass()):
        if number == 1:
            break
        loss_of(model, first).backward()
    assert_same(optimizer.method_state("y_gradient"), kept)


@pytest.mark.parametrize(
    ("base", "backend"), [*((base, "cpu") for base in BASES), *((base, "reference") for base in KINDS)], ids=str
)
def test_the_look_ahead_leaves_state_and_weights_alone(base, backend):
    model, optimizer = make(base, backend=backend)
    data = batches(4)
    for previous, batch in zip([None, *data], data[:3], strict=False):
        by_passes(optimizer, model, previous, batch)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    weights = weights_of(model)
    with pytest.raises(KeyboardInterrupt):
        for p in optimizer.each_pass():
            if p.data == "train":
                assert any(not torch.equal(a, b) for a, b in zip(weights_of(model), weights, strict=True))
                raise KeyboardInterrupt
            loss_of(model, data[2]).backward()
    assert_same(weights_of(model), weights)
    after = optimizer.state_dict()["state"]
    assert after.keys() == before.keys()
    for index, entries in before.items():
        assert entries.keys() == after[index].keys()
        for key, value in entries.items():
            assert value is None or torch.equal(torch.as_tensor(value), torch.as_tensor(after[index][key])), key


def test_a_resumed_run_by_closures_needs_the_previous_batch_once():
    data = batches(5)
    model, optimizer = make()
    for batch in data[:3]:
        by_closures(optimizer, model, None, batch)
    other_model, other = make()
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = weights_of(other_model)
    with pytest.raises(StepOrderError, match="previous batch"):
        by_closures(other, other_model, None, data[3])
    assert_same(weights_of(other_model), before)
    by_closures(optimizer, model, None, data[3])

    def closure(batch):
        return lambda: loss_of(other_model, batch).backward()

    other.zero_grad()
    other.step(closure(data[3]), previous_closure=closure(data[2]))
    by_closures(optimizer, model, None, data[4])
    other.zero_grad()
    by_closures(other, other_model, None, data[4])
    assert_same(weights_of(model), weights_of(other_model))


def test_statistics_are_those_of_the_y_passes():
    model, optimizer = make(model=make_net(batch_norm=True))
    freeze_in_perturbed_passes(model, optimizer)
    previous = None
    for count, batch in enumerate(batches(4), start=1):
        by_passes(optimizer, model, previous, batch)
        previous = batch
        assert model.layers[1].num_batches_tracked == count


def test_hooks_fire_for_updates_only():
    model, optimizer = make()
    calls = []
    optimizer.register_step_post_hook(lambda *args: calls.append(1))
    previous = None
    for batch in batches(3):
        by_passes(optimizer, model, previous, batch)
        previous = batch
    assert len(calls) == 2


def test_infinite_y_gradients():
    model, optimizer = make()
    data = batches(4)
    by_passes(optimizer, model, None, data[0])
    state = optimizer.method_state("y_gradient")
    state[0][0, 0] = float("inf")
    before = weights_of(model)
    for p in optimizer.each_pass():
        # Neither point can be reached, so both gradients are taken at x.
        assert_same(weights_of(model), before)
        loss_of(model, data[0] if p.data == "previous" else data[1]).backward()
    assert optimizer.last_step.updated
    by_passes(optimizer, model, data[1], data[2])
    assert all(torch.isfinite(w).all() for w in weights_of(model))


@pytest.mark.parametrize("arguments", [{"lam": -0.1}, {"lam": 1.1}, {"warm_start": "hot"}, {"rho": -1.0}])
def test_settings_out_of_range(arguments):
    with pytest.raises(InvalidSettingError):
        make(**arguments)


def test_grad_scaler_is_refused():
    model, optimizer = make(model=make_net(torch.float32))
    scaler = torch.amp.GradScaler("cpu")
    data = batches(2, torch.float32)
    by_passes(optimizer, model, None, data[0])
    before = weights_of(model)
    passes = optimizer.each_pass()
    assert next(passes).data == "previous"
    scaler.scale(loss_of(model, data[0])).backward()
    assert next(passes).data == "train"
    scaler.scale(loss_of(model, data[1])).backward()
    with pytest.raises(StepOrderError, match="GradScaler"):
        scaler.step(optimizer)
    assert_same(weights_of(model), before)
    assert not hasattr(optimizer, "grad_scale")
