"""Unified SAM, VaSSO, Momentum-SAM, CR-SAM, SAM in some steps, and SAM-ON, against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam_optim import (
    AESAM,
    CRSAM,
    SAM,
    IntervalSAM,
    InvalidSettingError,
    MomentumSAM,
    RandomizedSAM,
    StepOrderError,
    TrainStep,
    UnifiedSAM,
    VaSSO,
    perturb_normalization_only,
)

from .cases import BASES, Base, Method, assert_same, batches, loss_of, make_net, step_by_hand, weights_of
from .test_variants import MOMENTUM, PLAIN, Oracle, assert_resumes, assert_same_however_driven, assert_trajectory

METHODS = [
    Method(UnifiedSAM, {"rho": 0.1, "k": 0.3}),
    Method(UnifiedSAM, {"rho": 0.1, "k": 0.0}),
    Method(VaSSO, {"rho": 0.1, "theta": 0.4}),
    Method(MomentumSAM, {"rho": 0.1}),
    Method(CRSAM, {"rho": 0.1, "gamma": 0.3, "beta": 0.2}),
    Method(IntervalSAM, {"rho": 0.1, "every": 3, "start": 1}),
    Method(RandomizedSAM, {"rho": 0.1, "probability": 0.5, "seed": 4}),
    Method(AESAM, {"rho": 0.1, "c": 0.2}),
]
WITH_MOMENTUM = [b for b in BASES if "momentum" in b.settings or "Adam" in b.cls.__name__]


class FamilyOracle(Oracle):
    """The methods written out on one long vector."""

    def step(self, batch):
        w = self.weights.clone()
        s, name = self.method.settings, self.method.cls.__name__
        rho = s["rho"]
        number, self.number = self.number, self.number + 1
        if name == "MomentumSAM":
            state = [self.base.state.get(p, {}) for p in self.model.parameters()]
            buffers = [entries.get("momentum_buffer", entries.get("exp_avg")) for entries in state]
            if buffers[0] is None:
                self.update(self.gradient(w, batch))
                return
            v = torch.cat([b.reshape(-1) for b in buffers])
            self.update(self.gradient(w - rho * v / v.norm(), batch))
            return
        g = self.gradient(w, batch)
        if name == "AESAM":
            squared = g.dot(g).item()
            mean, variance = squared, 0.0
            if self.kept is not None:
                mean = 0.9 * self.kept[0] + 0.1 * squared
                variance = 0.9 * self.kept[1] + 0.1 * (squared - mean) ** 2
            self.kept = mean, variance
            sharp = squared >= mean + s["c"] * variance**0.5
        elif name == "IntervalSAM":
            sharp = number >= s["start"] and (number - s["start"]) % s["every"] == 0
        elif name == "RandomizedSAM":
            sharp = self.method.make(make_net(), PLAIN).is_sharpness_aware(number)
        else:
            sharp = True
        if not sharp:
            self.update(g)
            return
        d = g / g.norm()
        if name == "UnifiedSAM":
            d = (1 - s["k"] + s["k"] / g.norm()) * g
        elif name == "VaSSO":
            average = g if self.kept is None else s["theta"] * g + (1 - s["theta"]) * self.kept
            self.kept, d = average, average / average.norm()
        p = self.gradient(w + rho * d, batch)
        if name == "CRSAM":
            m = self.gradient(w - rho * d, batch)
            p = p + s["gamma"] * (p + m - 2 * g) + s["beta"] * (p - m)
        self.update(p)


@pytest.mark.parametrize(
    ("method", "settings", "wanted"),
    [
        (UnifiedSAM, {"k": 0.5}, (2.61, 0.12)),
        (UnifiedSAM, {"k": 0.0, "rho": 0.1}, (2.67, 0.44)),
        (UnifiedSAM, {"k": 1.0}, (2.67, 0.44)),
        (VaSSO, {}, (2.67, 0.44)),
        (CRSAM, {}, (2.6694, 0.4368)),
        (CRSAM, {"gamma": 0.0, "beta": 0.0}, (2.67, 0.44)),
        (IntervalSAM, {}, (2.67, 0.44)),
        (IntervalSAM, {"start": 1}, (2.7, 0.6)),
        (RandomizedSAM, {"probability": 1.0}, (2.67, 0.44)),
        (RandomizedSAM, {"probability": 0.0}, (2.7, 0.6)),
        (AESAM, {}, (2.67, 0.44)),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_toy_problem(method, settings, wanted, backend):
    settings = {"rho": 0.5, **settings}
    weights = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (3.0, 1.0)]
    optimizer = method(weights, torch.optim.SGD, lr=0.1, backend=backend, **settings)
    for _ in optimizer.each_pass():
        (0.5 * (weights[0] ** 2 + 4 * weights[1] ** 2)).sum().backward()
    got = [w.item() for w in weights]
    assert got == pytest.approx(wanted, abs=2e-10)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_vasso_as_its_authors_code_runs(backend):
    """Two steps on the toy problem: numbers of their code, whose average starts at the first gradient."""
    weights = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (3.0, 1.0)]
    optimizer = VaSSO(weights, torch.optim.SGD, rho=0.5, theta=0.4, lr=0.1, backend=backend)
    for _ in range(2):
        for _ in optimizer.each_pass():
            (0.5 * (weights[0] ** 2 + 4 * weights[1] ** 2)).sum().backward()
    assert [w.item() for w in weights] == pytest.approx((2.3690683088, 0.1171046450), abs=2e-10)


def test_vasso_goes_on_from_an_average_that_began_at_zero():
    """That is (1 - theta) 0 + theta g after the first step; and each parameter's starts with its own first gradient."""
    weight = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    late = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = VaSSO([weight, late], torch.optim.SGD, rho=0.5, theta=0.4, lr=0.0)
    state = optimizer.state_dict()
    state["method_state"] = {"direction": [torch.tensor([1.2, 1.6], dtype=torch.float64), None]}
    optimizer.load_state_dict(state)
    for _ in optimizer.each_pass():
        weight.grad = torch.tensor([1.0, 0.0], dtype=torch.float64)
        late.grad = torch.tensor([2.0], dtype=torch.float64)
    average = optimizer.method_state("direction")
    assert average[0].tolist() == pytest.approx([0.6 * 1.2 + 0.4, 0.6 * 1.6], abs=1e-15)
    assert average[1].tolist() == [2.0]


def test_momentum_sam_on_the_toy_problem():
    """From (3, 1) with momentum 0.5: v = (3, 4), then w~ = w - 0.5 (0.6, 0.8)."""
    weight = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = MomentumSAM([weight], torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.5)
    seen = []
    for _ in range(2):
        for _ in optimizer.each_pass():
            seen.append(weight.detach().clone())
            (0.5 * torch.tensor([1.0, 4.0]) * weight**2).sum().backward()
    assert seen[0].tolist() == [3.0, 1.0]
    assert seen[1].tolist() == pytest.approx([2.7 - 0.3, 0.6 - 0.4], abs=1e-12)
    # v = 0.5 (3, 4) + (2.4, 0.8)
    assert weight.tolist() == pytest.approx([2.7 - 0.39, 0.6 - 0.28], abs=1e-12)


@pytest.mark.parametrize(
    ("method", "base"),
    [(m, b) for m in METHODS for b in (WITH_MOMENTUM if m.cls is MomentumSAM else BASES)],
    ids=str,
)
def test_trajectory(method, base):
    assert_trajectory(FamilyOracle(method, base), method, base)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_however_it_is_driven(method):
    assert_same_however_driven(method)


@pytest.mark.parametrize("method", [METHODS[3], METHODS[5], METHODS[6]], ids=str)
def test_grad_scaler_by_hand(method):
    """Where a step takes one pass, first_step() must not update with a gradient whose scale it cannot know."""
    results = []
    for scale in (256.0, 1.0):
        model = make_net(torch.float32)
        optimizer = method.make(model, MOMENTUM)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for batch in batches(6, torch.float32):
            scaler.scale(loss_of(model, batch)).backward()
            optimizer.first_step(zero_grad=True)
            scaler.scale(loss_of(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(weights_of(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_aesam_by_hand_leaves_the_weights():
    model = make_net()
    optimizer = AESAM(model.parameters(), torch.optim.SGD, lr=0.1, c=10.0)
    [batch] = batches(1)
    step_by_hand(optimizer, model, batch)  # the first is one of SAM's
    before = weights_of(model)
    with pytest.raises(StepOrderError, match="each_pass"):
        step_by_hand(optimizer, model, batch)
    assert_same(weights_of(model), before)
    assert not optimizer.is_step_begun


@pytest.mark.parametrize("drive", ["each_pass", "begin", "first_step"])
def test_a_method_that_fails_as_it_begins_restores(drive):
    """Momentum-SAM perturbs before there is any pass."""

    class Failing(MomentumSAM):
        def passes(self):
            passes = super().passes()
            next(passes)
            raise KeyboardInterrupt
            yield

    model = make_net()
    optimizer = Failing(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    momentum = SAM(model.parameters(), optimizer.base_optimizer)
    step_by_hand(momentum, model, batches(1)[0])
    before = weights_of(model)
    with pytest.raises(KeyboardInterrupt):
        next(optimizer.each_pass()) if drive == "each_pass" else getattr(optimizer, drive)()
    assert_same(weights_of(model), before)
    assert not optimizer.is_step_begun


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_resuming(method):
    assert_resumes(method)


@pytest.mark.filterwarnings("ignore:each_pass")  # for some of them it is the last
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_exceptions_restore(method):
    model = make_net()
    optimizer = method.make(model, MOMENTUM)
    step = TrainStep(model, optimizer, loss_of)
    for batch in batches(4):
        step(batch)
    before = weights_of(model)
    for _ in optimizer.each_pass():
        loss_of(model, batch).backward()
        break
    assert_same(weights_of(model), before)


def test_occasional_steps_between_are_the_bases_bit_for_bit():
    """And take one pass."""
    for cls, settings in ((IntervalSAM, {"every": 100, "start": 1}), (RandomizedSAM, {"probability": 0.0})):
        model, plain, calls = make_net(), make_net(), []
        optimizer = Method(cls, {"rho": 0.1, **settings}).make(model, MOMENTUM)
        base = MOMENTUM.cls(plain.parameters(), **MOMENTUM.settings)
        step = TrainStep(model, optimizer, lambda m, b, calls=calls: (calls.append(None), loss_of(m, b))[1])
        for batch in batches(1):
            step(batch)
            loss_of(plain, batch).backward()
            base.step()
        assert_same(weights_of(model), weights_of(plain))
        assert len(calls) == 1


def test_the_coin_is_fair_and_the_same_everywhere():
    tosses = []
    for seed in (0, 0, 1):
        optimizer = RandomizedSAM(make_net().parameters(), torch.optim.SGD, probability=0.3, seed=seed, lr=0.1)
        tosses.append([optimizer.is_sharpness_aware(step) for step in range(2000)])
    assert tosses[0] == tosses[1] != tosses[2]
    assert 500 < sum(tosses[0]) < 700
    # Neighbouring tosses have nothing to do with each other.
    both = sum(a and b for a, b in zip(tosses[0], tosses[0][1:], strict=False))
    assert 120 < both < 240


def test_aesam_follows_the_gradient():
    model = make_net()
    calm = AESAM(model.parameters(), torch.optim.SGD, lr=0.0, c=10.0)
    passes = []
    for batch in batches(3) * 4:
        passes.append(sum(1 for _ in _driven(calm, model, batch)))
    assert passes[0] == 2 and set(passes[1:]) == {1}
    calm.c = -10.0
    assert sum(1 for _ in _driven(calm, model, batch)) == 2


def _driven(optimizer, model, batch):
    for p in optimizer.each_pass():
        loss_of(model, batch).backward()
        yield p


def test_momentum_sam_refuses_what_comes_too_late():
    model = make_net()
    optimizer = MomentumSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    before = weights_of(model)
    loss_of(model, batches(1)[0]).backward()
    for call in (optimizer.advance, optimizer.step, lambda: optimizer.step(lambda: 0.0, closure_runs="second_pass")):
        with pytest.raises(StepOrderError):
            call()
        assert_same(weights_of(model), before)


def test_momentum_sam_updates_statistics_and_draws_anew():
    """Its only pass is the one that is trained on."""
    model = make_net(batch_norm=True)
    optimizer = MomentumSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    step = TrainStep(model, optimizer, loss_of)
    for batch in batches(3):
        step(batch)
    assert int(model.layers[1].num_batches_tracked) == 3


@pytest.mark.parametrize("method", [METHODS[0], METHODS[2], METHODS[7]], ids=str)
def test_grad_scaler_is_refused(method):
    model = make_net(torch.float32)
    with pytest.raises(InvalidSettingError, match="GradScaler"):
        TrainStep(model, method.make(model, MOMENTUM), loss_of, scaler=torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("method", [METHODS[3], METHODS[4], METHODS[5]], ids=str)
def test_grad_scaler(method):
    results = []
    for scaled in (True, False):
        model = make_net(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if scaled else None
        step = TrainStep(model, method.make(model, MOMENTUM), loss_of, scaler=scaler)
        for batch in batches(5, torch.float32):
            step(batch)
        results.append(weights_of(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.gain


def test_normalization_only():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3))
    model.append(nn.LayerNorm(3)).append(Custom())
    groups = perturb_normalization_only(model)
    assert [name for name, _ in groups[0]["params"]] == [
        "1.weight",
        "1.bias",
        "2.weight",
        "2.bias",
        "5.weight",
        "5.bias",
    ]
    assert groups[1]["perturb"] is False
    assert len(groups[0]["params"]) + len(groups[1]["params"]) == len(list(model.parameters()))
    assert "6.gain" in [name for name, _ in perturb_normalization_only(model, Custom)[0]["params"]]
    with pytest.raises(ValueError, match="no parameter"):
        perturb_normalization_only(nn.Linear(2, 2))

    chosen = {name for name, _ in groups[0]["params"]}
    optimizer = SAM(groups, torch.optim.SGD, rho=0.5, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(5, 3, 4, 4)).square().sum().backward()
    optimizer.first_step()
    moved = {name: not torch.equal(p, b) for (name, p), b in zip(model.named_parameters(), before, strict=True)}
    assert {name for name, did in moved.items() if did} <= chosen
    length = sum(((p - b) ** 2).sum() for p, b in zip(model.parameters(), before, strict=True)).sqrt()
    assert length.item() == pytest.approx(0.5, rel=1e-5)


def test_wrong_settings():
    params = [nn.Parameter(torch.zeros(2))]
    for cls, settings in (
        (UnifiedSAM, {"k": 1.5}),
        (VaSSO, {"theta": 0.0}),
        (CRSAM, {"gamma": -1.0}),
        (CRSAM, {"beta": -1.0}),
        (IntervalSAM, {"every": 0}),
        (IntervalSAM, {"start": -1}),
        (RandomizedSAM, {"probability": 1.1}),
        (AESAM, {"decay": 1.0}),
        (MomentumSAM, {"momentum": 0.0, "rho": 0.1}),
    ):
        with pytest.raises(InvalidSettingError, match=next(iter(settings))):
            cls(params, torch.optim.SGD, lr=0.1, **settings)
    with pytest.raises(InvalidSettingError, match="Adagrad has none"):
        MomentumSAM(params, torch.optim.Adagrad, rho=0.1, lr=0.1)


def test_momentum_sam_on_a_base_whose_momentum_is_another():
    """It names betas, and keeps no average of gradients: all steps would be the base's."""

    class Other(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr, "betas": (0.9, 0.999)})

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p]["z"] = p.detach().clone()

    model = make_net()
    optimizer = MomentumSAM(model.parameters(), Other, rho=0.1, lr=0.1)
    batch = batches(1)[0]
    for _ in optimizer.each_pass():
        loss_of(model, batch).backward()
    before = weights_of(model)
    with pytest.raises(InvalidSettingError, match="Other keeps z: take another base"):
        next(optimizer.each_pass())
    assert_same(weights_of(model), before)
    assert not optimizer.is_step_begun


@pytest.mark.parametrize("method", METHODS[:5], ids=str)
def test_adaptive(method):
    model = make_net()
    step = TrainStep(
        model, method.make(model, Base(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}), adaptive=True), loss_of
    )
    losses = [step(batch).item() for batch in batches(1) * 12]
    assert losses[-1] < losses[0]
