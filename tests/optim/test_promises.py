"""What methods promise of their passes(), that gradients may be scaled above all: kept, or refused, not inherited."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from sam_kernels import Normalized
from sam_optim import (
    GSAM,
    SAM,
    WSAM,
    AgnosticSAM,
    InvalidSettingError,
    Pass,
    SharpnessAwareOptimizer,
    StepOrderError,
    TrainStep,
    UnifiedSAM,
    Update,
)

from .bases import SGD
from .cases import assert_same, batches, loss_of, make_net, weights_of
from .drivers import by_each_pass, data_of_steps
from .methods import METHODS, Method, methods_with, named

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name, cls):
    pytest.importorskip("triton") if name == "triton_rule" else None
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, cls)


def make(method):
    model = make_net()
    return model, method.make(model, SGD)


def by_scaler(optimizer, model, data, scaler):
    for p in optimizer.each_pass(step=lambda: scaler.step(optimizer)):
        scaler.scale(loss_of(model, data[p.data])).backward()
    if optimizer.last_step.descent:  # there is none in SAMPa's first step, and nothing that the scaler has seen
        scaler.update()


def by_unscaling(optimizer, model, data, scaler):
    for p in optimizer.each_pass(step=lambda: scaler.step(optimizer)):
        scaler.scale(loss_of(model, data[p.data])).backward()
        if p.last:
            optimizer.combine_gradients()
            scaler.unscale_(optimizer)
    scaler.update()


def unscaled(method):
    model, optimizer = make(method)
    by_each_pass(optimizer, model, data_of_steps(4))
    return weights_of(model)


@pytest.mark.parametrize("drive", [by_scaler, by_unscaling])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_grad_scaler_gives_the_same_steps_or_is_refused(method, drive):
    """Its scale, a power of two that changes under way, must not be seen in the weights."""
    model, optimizer = make(method)
    before = weights_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    promised = optimizer.takes_scaled_gradients
    for data in data_of_steps(4):
        try:
            drive(optimizer, model, data, scaler)
        except StepOrderError as error:
            assert "cannot be used with GradScaler" in str(error) and not promised
            assert_same(weights_of(model), before)
            assert not optimizer.is_step_begun and not optimizer.state
            assert optimizer.stepper.obstacle_to_grad_scaler() == str(error)
            assert all(p.grad is None for p in model.parameters())
            return
    assert promised
    for a, b in zip(weights_of(model), unscaled(method), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_grad_scaler_that_is_switched_off_is_none(method):
    model, optimizer = make(method)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for data in data_of_steps(4):
        by_scaler(optimizer, model, data, scaler)
    assert_same(weights_of(model), unscaled(method))


@pytest.mark.parametrize("method", methods_with(perturbs_micro_batches=False), ids=str)
def test_micro_batches_are_refused(method):
    model, optimizer = make(method)
    with pytest.raises(InvalidSettingError, match="micro-batch"):
        TrainStep(model, optimizer, loss_of, micro_batches=2, perturbation="micro_batch")


@pytest.mark.parametrize("method", methods_with(is_capturable=False), ids=str)
def test_capture_is_refused(method):
    model, optimizer = make(method)
    with pytest.raises(InvalidSettingError, match="steps differ"):
        TrainStep(model, optimizer, loss_of, capture=True)


def test_methods_that_promise_it_under_some_settings():
    def takes(cls, **settings):
        return Method(cls, settings).make(make_net(), SGD).takes_scaled_gradients

    assert takes(WSAM, decouple=False) and not takes(WSAM)
    assert takes(UnifiedSAM, k=1.0) and not takes(UnifiedSAM, k=0.9)
    assert takes(AgnosticSAM) and not takes(AgnosticSAM, smoothing=0.5)


class Plain(SharpnessAwareOptimizer):
    """USAM: e has the gradient's scale."""

    def passes(self):
        g = yield Pass()
        self.ascend(g, rule=lambda gram: torch.ones(1, dtype=torch.float64), scale=0.1)
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g_plus)


class FromSAM(SAM):
    passes = Plain.passes


class FromWSAM(WSAM):
    passes = Plain.passes


class FromMixin(type("Mixin", (), {"passes": Plain.passes}), GSAM):
    pass


class Declared(SharpnessAwareOptimizer):
    takes_scaled_gradients = is_capturable = perturbs_micro_batches = True

    def passes(self):
        g = yield Pass(kept=True)
        self.ascend(g, rule=Normalized(), scale=0.1)
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g, g_plus, scale=0.5)


class Later(Declared):
    """Has no passes() of its own, and keeps the promise."""


class Restored(FromSAM):
    takes_scaled_gradients = True


NAMES = ("takes_scaled_gradients", "is_capturable", "perturbs_micro_batches")


def test_a_promise_is_of_the_passes_that_it_was_made_for():
    for cls in (SharpnessAwareOptimizer, Plain, FromSAM, FromMixin):
        assert [getattr(cls, name) for name in NAMES] == [False] * 3
    # Whatever the settings of the class that it comes from.
    optimizer = FromWSAM(make_net().parameters(), torch.optim.SGD, lr=0.1, decouple=False)
    assert [getattr(optimizer, name) for name in NAMES] == [False] * 3
    for cls in (SAM, GSAM, Declared, Later):
        assert [getattr(cls, name) for name in NAMES] == [True] * 3
    assert [getattr(Restored, name) for name in NAMES] == [True, False, False]
    assert "does not say takes_scaled_gradients" in optimizer.stepper.obstacle_to_grad_scaler()


@pytest.mark.parametrize("cls", [Plain, FromSAM, FromMixin])
def test_methods_of_ones_own_are_refused_unless_they_declare_it(cls):
    model = make_net()
    optimizer = cls(model.parameters(), torch.optim.SGD, **({"method_defaults": {}} if cls is Plain else {}), lr=0.1)
    before = weights_of(model)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(StepOrderError, match="takes_scaled_gradients = True"):
        by_scaler(optimizer, model, data_of_steps(1)[0], scaler)
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step(zero_grad=True)
    scaler.scale(loss_of(model, batches(1)[0])).backward()
    with pytest.raises(StepOrderError, match="takes_scaled_gradients = True"):
        scaler.step(optimizer)
    assert_same(weights_of(model), before)
    with pytest.raises(InvalidSettingError, match="takes_scaled_gradients = True"):
        TrainStep(model, optimizer, loss_of, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(InvalidSettingError, match="perturbs_micro_batches = True"):
        TrainStep(model, optimizer, loss_of, micro_batches=2, perturbation="micro_batch")
    with pytest.raises(InvalidSettingError, match="is_capturable = True"):
        TrainStep(model, optimizer, loss_of, capture=True)


def test_a_method_of_ones_own_that_declares_it():
    results = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**10), torch.amp.GradScaler("cpu", enabled=False)):
        model = make_net()
        optimizer = Declared(model.parameters(), torch.optim.SGD, {}, lr=0.05, momentum=0.9)
        for data in data_of_steps(4):
            by_scaler(optimizer, model, data, scaler)
        results.append(weights_of(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "cls"), [("own_method", "MongeSAM"), ("triton_rule", "SAGM")])
def test_published_examples_are_refused_since_their_perturbation_has_the_gradients_scale(name, cls):
    model = make_net()
    optimizer = example(name, cls)(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.05)
    before = weights_of(model)
    with pytest.raises(StepOrderError, match="cannot be used with GradScaler"):
        by_scaler(optimizer, model, data_of_steps(1)[0], torch.amp.GradScaler("cpu", init_scale=2.0**16))
    assert_same(weights_of(model), before)


def test_the_first_step_of_sampa_is_refused_too():
    """It makes no update, and would keep a scaled gradient."""
    model, optimizer = make(named("SAMPa"))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, batches(1)[0])).backward()
    optimizer.first_step()
    with pytest.raises(StepOrderError, match="cannot be used with GradScaler"):
        scaler.step(optimizer)
    assert "y_gradient" not in optimizer.state_dict().get("method_state", {})
