"""Maximising f is minimising -f: for every method, by every driver, also where only some groups maximise."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from sam_kernels import Normalized
from sam_optim import (
    SAM,
    WSAM,
    MomentumSAM,
    Pass,
    SharpnessAwareOptimizer,
    StableSAM,
    TrainStep,
    Update,
)
from sam_optim.training.streams import OneLane

from .bases import UNFUSED, Base
from .cases import Net, assert_same, batches, loss_of, weights_of
from .drivers import by_each_pass, by_train_step, by_two_calls, data_of_steps
from .methods import ALL_SETTINGS, METHODS, Method, methods_with, named

BASES = [
    Base(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}),
    Base(torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    UNFUSED,
]


class Turned(Net):
    """The same numbers, but for the sign of the gradient of the first layer: that of -f."""

    def forward(self, x):
        first = self.layers[0]
        weight, bias = (2 * p.detach() - p for p in (first.weight, first.bias))
        return self.layers[1:](nn.functional.linear(x, weight, bias))


def negative_loss(model, batch):
    return -loss_of(model, batch)


def groups_of(model, **first):
    """The first layer, and the rest with a radius of its own."""
    named = list(model.named_parameters())
    return [{"params": named[:2], **first}, {"params": named[2:], "rho": 0.2}]


def cases(method, base, which, dtype=torch.float64, **more):
    """Model, optimizer and loss: of what maximises, and of what minimises the negative."""
    for maximizes in (True, False):
        torch.manual_seed(1)
        model = (Turned if which == "one group" and not maximizes else Net)().to(dtype)
        settings = {**method.settings, **copy.deepcopy(base.settings), **more}
        flag = {"maximize": True} if maximizes else {}
        if which == "one group":
            yield model, method.cls(groups_of(model, **flag), base.cls, **settings), loss_of
        else:
            optimizer = method.cls(groups_of(model), base.cls, **settings, **flag)
            yield model, optimizer, loss_of if maximizes else negative_loss


def assert_maximizes_as_it_minimizes(drive, method, base, which, **more):
    results = []
    for model, optimizer, loss in cases(method, base, which, **more):
        before = weights_of(model)
        drive(optimizer, model, data_of_steps(4), loss)
        results.append(weights_of(model))
        assert not any(torch.equal(a, b) for a, b in zip(before, results[-1], strict=True))
    if base.fused:
        assert_same(*results)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("which", ["all groups", "one group"])
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method(method, base, which):
    assert_maximizes_as_it_minimizes(by_each_pass, method, base, which)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_driver(method):
    for drive in (by_train_step, *([by_two_calls] if method.by_two_calls and not method.needs else [])):
        assert_maximizes_as_it_minimizes(drive, method, BASES[0], "one group")


@pytest.mark.parametrize("backend", ["reference", "foreach"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_backends(method, backend):
    assert_maximizes_as_it_minimizes(by_each_pass, method, BASES[0], "one group", backend=backend)


@pytest.mark.parametrize("which", ["all groups", "one group"])
@pytest.mark.parametrize("method", methods_with(ALL_SETTINGS, yields_passes_together=True), ids=str)
def test_side_by_side(monkeypatch, method, which):
    monkeypatch.setattr(TrainStep, "_make_lanes", lambda self: OneLane())
    for base in BASES[:2]:
        assert_maximizes_as_it_minimizes(partial(by_train_step, passes="streams"), method, base, which)


@pytest.mark.parametrize("which", ["all groups", "one group"])
@pytest.mark.parametrize("method", methods_with(takes_scaled_gradients=True), ids=str)
def test_grad_scaler(method, which):
    def drive(*arguments):
        by_train_step(*arguments, scaler=torch.amp.GradScaler("cpu", init_scale=256.0))

    assert_maximizes_as_it_minimizes(drive, method, BASES[0], which)


@pytest.mark.parametrize("which", ["all groups", "one group"])
def test_micro_batches_perturbed_each_by_itself(which):
    results = []
    for model, optimizer, loss in cases(named("SAM"), BASES[0], which):
        by_train_step(optimizer, model, data_of_steps(3), loss, micro_batches=2, perturbation="micro_batch")
        results.append(weights_of(model))
    assert_same(*results)


@pytest.mark.parametrize("method", [named("SAM"), named("WSAM")], ids=str)
def test_master_weights(method):
    results = []
    for model, optimizer, loss in cases(method, BASES[0], "one group", torch.bfloat16, master_weights=True):
        by_each_pass(optimizer, model, data_of_steps(4, torch.bfloat16), loss)
        results.append(weights_of(model))
    assert_same(*results)


@pytest.mark.parametrize("method", [m for m in METHODS if m.cls in (SAM, StableSAM, WSAM, MomentumSAM)], ids=str)
def test_a_base_that_keeps_it_as_an_attribute(method):
    """And turns gradients in place."""
    base = Base(pytest.importorskip("pytorch_optimizer").AdaBelief, {"lr": 0.01}, fused=False)
    results = []
    for model, optimizer, loss in cases(method, base, "all groups"):
        assert "maximize" not in optimizer.param_groups[0]
        by_each_pass(optimizer, model, data_of_steps(4), loss)
        results.append(weights_of(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Own(SharpnessAwareOptimizer):
    """A method from elsewhere, with one number for all groups."""

    def passes(self):
        g = yield Pass()
        self.ascend(g, rule=Normalized(), scale=0.1)
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g_plus)


@pytest.mark.parametrize("which", ["all groups", "one group"])
def test_a_method_from_elsewhere(which):
    results = []
    for model, optimizer, loss in cases(Method(Own, {"method_defaults": {}}), BASES[0], which):
        by_each_pass(optimizer, model, data_of_steps(4), loss)
        results.append(weights_of(model))
    assert_same(*results)


def test_a_radius_on_a_device_stays_there():
    """Nobody waits for it: a tensor of the meta device has no value that could be read."""
    [(_, optimizer, _), _] = cases(named("SAM"), BASES[0], "one group")
    rho = torch.ones((), device="meta")
    first, second = optimizer._uphill([[rho], [rho]], 1)
    assert first[0].device.type == "meta" and first[0] is not rho
    assert second == [rho]


def test_the_flag_may_change_between_steps():
    """As for torch's optimizers, which look at it in each step."""
    data = batches(2)
    results = []
    for model, optimizer, loss in cases(named("SAM"), BASES[0], "all groups"):
        for batch in data:
            for _ in optimizer.each_pass():
                loss(model, batch).backward()
            for group in optimizer.param_groups:
                group["maximize"] = False
            loss = loss_of
        results.append(weights_of(model))
    assert_same(*results)
