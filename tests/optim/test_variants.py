"""GSAM, Stable SAM, WSAM, Friendly SAM and LookSAM against their formulas, in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from sam_optim import (
    AESAM,
    CRSAM,
    GSAM,
    SAM,
    WSAM,
    FriendlySAM,
    InvalidSettingError,
    LookSAM,
    StableSAM,
    StepOrderError,
    TrainStep,
)

from .cases import (
    BASES,
    Base,
    Method,
    assert_same,
    batches,
    by_every_pass_closure,
    loss_of,
    make_net,
    step_by_hand,
    weights_of,
)
from .test_formulas import toy_step

PLAIN = Base(torch.optim.SGD, {"lr": 0.05})
MOMENTUM = Base(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01})


@pytest.mark.parametrize(
    ("method", "settings", "wanted"),
    [
        (GSAM, {"alpha": 0.5}, (2.6938579882, 0.4259408284)),
        (GSAM, {"alpha": 0.0}, (2.67, 0.44)),
        (StableSAM, {}, (2.7461538462, 0.5692307692)),
        (WSAM, {"gamma": 0.8 / 1.8, "decouple": False}, (2.676, 0.472)),  # with a = 0.8 the gradient norm penalty
        (WSAM, {"gamma": 0.9}, (2.43, -0.84)),
        (WSAM, {"gamma": 0.9, "decouple": False}, (2.43, -0.84)),  # the same for plain SGD
        (WSAM, {"gamma": 0.0}, (2.7, 0.6)),
        (FriendlySAM, {}, (2.67, 0.44)),
        (LookSAM, {}, (2.67, 0.44)),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_toy_problem(method, settings, wanted, backend):
    got = toy_step(lambda params: method(params, torch.optim.SGD, rho=0.5, lr=0.1, backend=backend, **settings))
    assert got == pytest.approx(wanted, abs=2e-10)


class Oracle:
    """The methods written out on one long vector, with torch's own base optimizer, which minimises."""

    def __init__(self, method, base, rho=0.1):
        self.model = make_net()
        self.base, self.sign = base.minimizing(self.model.parameters()), base.sign
        self.method, self.rho, self.number, self.kept = method, rho, 0, None

    @property
    def weights(self):
        return torch.nn.utils.parameters_to_vector(self.model.parameters()).detach()

    def put(self, vector):
        torch.nn.utils.vector_to_parameters(vector, self.model.parameters())

    def gradient(self, at, batch):
        before = self.weights.clone()
        self.put(at)
        gradients = torch.autograd.grad(self.sign * loss_of(self.model, batch), list(self.model.parameters()))
        self.put(before)
        return torch.cat([g.reshape(-1) for g in gradients])

    def update(self, direction):
        sizes = [p.numel() for p in self.model.parameters()]
        for p, own in zip(self.model.parameters(), direction.split(sizes), strict=True):
            p.grad = own.view_as(p).clone()
        self.base.step()

    def step(self, batch):
        w = self.weights.clone()
        g = self.gradient(w, batch)
        name, settings = self.method.cls.__name__, self.method.settings
        if name == "LookSAM" and self.number % settings["k"] != 0:
            u = self.kept
            self.update(g + settings["alpha"] * g.norm() / u.norm() * u)
            self.number += 1
            return
        d = g
        if name == "FriendlySAM":
            d = g if self.kept is None else g - settings["sigma"] * self.kept
            self.kept = g if self.kept is None else settings["lmbda"] * self.kept + (1 - settings["lmbda"]) * g
        p = self.gradient(w + self.rho * d / d.norm(), batch)
        if name == "GSAM":
            self.update(p - settings["alpha"] * (g - g.dot(p) / p.dot(p) * p))
        elif name == "StableSAM":
            self.update(p * g.norm() / p.norm())
        elif name == "WSAM":
            a = settings["gamma"] / (1 - settings["gamma"])
            if settings["decouple"]:
                lr = float(self.base.param_groups[0]["lr"])
                self.update(g)
                self.put(self.weights - lr * a * (p - g))
            else:
                self.update((1 - a) * g + a * p)
        else:
            if name == "LookSAM":
                self.kept = p - g.dot(p) / g.dot(g) * g
            self.update(p)
        self.number += 1


METHODS = [
    Method(GSAM, {"rho": 0.1, "alpha": 0.4}),
    Method(StableSAM, {"rho": 0.1}),
    Method(WSAM, {"rho": 0.1, "gamma": 0.8, "decouple": True}),
    Method(WSAM, {"rho": 0.1, "gamma": 0.3, "decouple": False}),
    Method(FriendlySAM, {"rho": 0.1, "sigma": 0.7, "lmbda": 0.6}),
    Method(LookSAM, {"rho": 0.1, "k": 3, "alpha": 0.5}),
]


def assert_trajectory(oracle, method, base):
    model = make_net()
    step = TrainStep(model, method.make(model, base), loss_of)
    for batch in batches(8):
        oracle.step(batch)
        step(batch)
        got = torch.nn.utils.parameters_to_vector(model.parameters())
        torch.testing.assert_close(got, oracle.weights, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_trajectory(method, base):
    assert_trajectory(Oracle(method, base), method, base)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_however_it_is_driven(method):
    assert_same_however_driven(method)


def assert_same_however_driven(method):
    """By TrainStep, by passes, by closures, by SAM's two calls."""
    results = []
    for way in ("TrainStep", "each_pass", "closure", *(["two calls"] if method.cls not in (AESAM, CRSAM) else [])):
        model = make_net()
        optimizer = method.make(model, MOMENTUM)
        step = TrainStep(model, optimizer, loss_of)
        for batch in batches(6):
            if way == "TrainStep":
                step(batch)
            elif way == "each_pass":
                for _ in optimizer.each_pass():
                    loss_of(model, batch).backward()
            elif way == "closure":
                optimizer.closure_runs = "every_pass"
                by_every_pass_closure(optimizer, model, batch)
            else:
                step_by_hand(optimizer, model, batch)
        results.append(weights_of(model))
    for other in results[1:]:
        assert_same(results[0], other)


def assert_resumes(method):
    results = []
    for stops in (False, True):
        model = make_net()
        optimizer = method.make(model, MOMENTUM)
        step = TrainStep(model, optimizer, loss_of)
        for number, batch in enumerate(batches(9)):
            if stops and number == 4:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = method.make(model, MOMENTUM)
                optimizer.load_state_dict(saved)
                step = TrainStep(model, optimizer, loss_of)
            step(batch)
        results.append(weights_of(model))
    assert_same(*results)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_resuming(method):
    assert_resumes(method)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_parameters_without_gradients(method):
    """For a while, or for ever: they stay as they are, and so does what is kept of them."""
    model = make_net()
    before = model.layers[0].weight.detach().clone()
    optimizer = method.make(model, PLAIN)
    for number, batch in enumerate(batches(6)):
        model.layers[0].weight.requires_grad_(number >= 3)
        for _ in optimizer.each_pass():
            loss_of(model, batch).backward()
        assert torch.equal(model.layers[0].weight, before) == (number < 3)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_adaptive(method):
    """In ASAM's geometry too: of Friendly SAM the norm of the difference, of LookSAM plain norms of gradients."""
    model = make_net()
    step = TrainStep(model, method.make(model, MOMENTUM, adaptive=True, rho=0.5), loss_of)
    losses = [step(batch).item() for batch in batches(1) * 12]
    assert losses[-1] < losses[0]


def test_looksam_leaves_parameters_without_a_gradient():
    """Also those that it keeps a direction for."""
    weights = [torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizer = LookSAM(weights, torch.optim.SGD, k=5, lr=0.1)
    for active in (weights, weights[:1]):
        before = weights[1].detach().clone()
        for _ in optimizer.each_pass():
            sum((w**3).sum() for w in active).backward()
        assert torch.equal(weights[1], before) == (len(active) == 1)


class WritesIntoGradients(torch.optim.SGD):
    """As bases do that centralise or normalise gradients in place."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.fill_(float("nan"))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_bases_that_write_into_gradients(method):
    results = []
    for base in (MOMENTUM, Base(WritesIntoGradients, MOMENTUM.settings, fused=False)):
        model = make_net()
        step = TrainStep(model, method.make(model, base), loss_of)
        for batch in batches(6):
            step(batch)
        results.append(weights_of(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_looksam_takes_one_pass_between():
    calls = []
    model = make_net()
    optimizer = LookSAM(model.parameters(), torch.optim.SGD, k=4, lr=0.1)
    step = TrainStep(model, optimizer, lambda model, batch: (calls.append(None), loss_of(model, batch))[1])
    for batch in batches(8):
        step(batch)
    assert len(calls) == 2 * 2 + 6


@pytest.mark.parametrize("method", [METHODS[2], METHODS[4]], ids=str)
def test_grad_scaler_is_refused(method):
    model = make_net(torch.float32)
    optimizer = method.make(model, MOMENTUM)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(InvalidSettingError, match="GradScaler"):
        TrainStep(model, optimizer, loss_of, scaler=scaler)
    before = weights_of(model)
    for first in (True, False):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batches(1, torch.float32)[0])).backward()
        if first:
            optimizer.first_step()
    with pytest.raises(StepOrderError, match="GradScaler"):
        scaler.step(optimizer)
    assert_same(weights_of(model), before)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[1], METHODS[3]], ids=str)
def test_grad_scaler(method):
    """Rules do not depend on the gradients' scale."""
    results = []
    for scaled in (True, False):
        model = make_net(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if scaled else None
        step = TrainStep(model, method.make(model, MOMENTUM), loss_of, scaler=scaler)
        for batch in batches(4, torch.float32):
            step(batch)
        results.append(weights_of(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[1], METHODS[3]], ids=str)
@pytest.mark.parametrize("infinite_pass", [0, 1])
def test_grad_scaler_sees_an_infinity_in_either_gradient(method, infinite_pass):
    model = make_net(torch.float32)
    calls = []

    def loss(model, batch):
        calls.append(None)
        return loss_of(model, batch) * (float("inf") if len(calls) - 1 == infinite_pass else 1.0)

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    step = TrainStep(model, method.make(model, MOMENTUM), loss, scaler=scaler)
    before = weights_of(model)
    for number, batch in enumerate(batches(2, torch.float32)):
        step(batch)
        assert scaler.get_scale() == 128.0
        assert step.optimizer.last_step.updated == (number > 0)
        if number == 0:
            assert_same(weights_of(model), before)
    assert all(w.isfinite().all() for w in weights_of(model))


@pytest.mark.parametrize("method", [METHODS[0], METHODS[1], METHODS[3]], ids=str)
def test_an_infinite_first_gradient_by_hand(method):
    """GradScaler sees the second one alone, here finite: nothing is updated all the same."""
    for base in (MOMENTUM, Base(torch.optim.RMSprop, {"lr": 0.01}, fused=False)):
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


def test_rho_zero_is_the_base():
    for method in METHODS:
        if method.cls in (LookSAM, FriendlySAM, GSAM, StableSAM):
            model, plain = make_net(), make_net()
            step = TrainStep(model, method.make(model, MOMENTUM, rho=0.0), loss_of)
            base = MOMENTUM.cls(plain.parameters(), **MOMENTUM.settings)
            for batch in batches(1):
                step(batch)
                loss_of(plain, batch).backward()
                base.step()
            for a, b in zip(weights_of(model), weights_of(plain), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_wrong_settings():
    params = [torch.nn.Parameter(torch.zeros(2))]
    for cls, settings in (
        (GSAM, {"alpha": -0.1}),
        (WSAM, {"gamma": 1.0}),
        (FriendlySAM, {"sigma": -1.0}),
        (FriendlySAM, {"lmbda": 1.5}),
        (LookSAM, {"k": 0}),
    ):
        with pytest.raises(InvalidSettingError, match=next(iter(settings))):
            cls(params, torch.optim.SGD, lr=0.1, **settings)
    model = make_net()
    for method in (METHODS[2], METHODS[4], METHODS[5]):
        with pytest.raises(InvalidSettingError, match="micro-batch"):
            step = TrainStep(model, method.make(model, PLAIN), loss_of, micro_batches=2, perturbation="micro_batch")
    step = TrainStep(model, SAM(model.parameters(), torch.optim.SGD, lr=0.1), loss_of)
    assert step.passes == "sequential"
    with pytest.raises(InvalidSettingError, match="steps differ"):
        TrainStep(model, METHODS[5].make(model, PLAIN), loss_of, capture=True)
