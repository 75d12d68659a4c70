"""What single methods do that others do not: steps of one pass, coins, a momentum, and SAM-ON's groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam_optim import (
    AESAM,
    CRSAM,
    GSAM,
    SAM,
    WSAM,
    FriendlySAM,
    IntervalSAM,
    InvalidSettingError,
    LookSAM,
    MomentumSAM,
    RandomizedSAM,
    StepOrderError,
    TrainStep,
    UnifiedSAM,
    VaSSO,
    perturb_normalization_only,
)

from .bases import SGD
from .cases import assert_same, batches, loss_of, make_net, step_by_hand, weights_of


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


def test_looksam_takes_one_pass_between():
    calls = []
    model = make_net()
    optimizer = LookSAM(model.parameters(), torch.optim.SGD, k=4, lr=0.1)
    step = TrainStep(model, optimizer, lambda model, batch: (calls.append(None), loss_of(model, batch))[1])
    for batch in batches(8):
        step(batch)
    assert len(calls) == 2 * 2 + 6


def test_looksam_leaves_parameters_without_a_gradient():
    """Also those that it keeps a direction for."""
    weights = [torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizer = LookSAM(weights, torch.optim.SGD, k=5, lr=0.1)
    for active in (weights, weights[:1]):
        before = weights[1].detach().clone()
        for _ in optimizer.each_pass():
            sum((w**3).sum() for w in active).backward()
        assert torch.equal(weights[1], before) == (len(active) == 1)


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


def test_occasional_steps_between_are_the_bases_bit_for_bit():
    """And take one pass."""
    for cls, settings in ((IntervalSAM, {"every": 100, "start": 1}), (RandomizedSAM, {"probability": 0.0})):
        model, plain, calls = make_net(), make_net(), []
        optimizer = cls(model.parameters(), SGD.cls, rho=0.1, **settings, **SGD.settings)
        base = SGD.cls(plain.parameters(), **SGD.settings)
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
        (GSAM, {"alpha": -0.1}),
        (WSAM, {"gamma": 1.0}),
        (FriendlySAM, {"sigma": -1.0}),
        (FriendlySAM, {"lmbda": 1.5}),
        (LookSAM, {"k": 0}),
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
