"""What every method does, however it is driven and whatever it is given."""

from __future__ import annotations

import copy

import pytest
import torch

import sam_optim
from sam_optim import SharpnessAwareOptimizer

from .bases import PLAIN_SGD, SGD, Base
from .cases import assert_same, batches, loss_of, make_net, weights_of
from .drivers import DRIVERS, by_each_pass, by_train_step, by_two_calls, data_of_steps
from .methods import ALL_SETTINGS, METHODS


def test_every_class_is_among_the_methods():
    exported = [getattr(sam_optim, name) for name in sam_optim.__all__]
    classes = {c for c in exported if isinstance(c, type) and issubclass(c, SharpnessAwareOptimizer)}
    assert classes - {SharpnessAwareOptimizer} == {method.cls for method in METHODS}, "see tests/optim/methods.py"


@pytest.mark.parametrize("method", ALL_SETTINGS, ids=str)
def test_however_it_is_driven(method):
    """The same bits."""
    by_calls = [by_two_calls] if method.by_two_calls and not method.needs else []
    results = []
    for drive in (*DRIVERS, *by_calls):
        model = make_net()
        drive(method.make(model, SGD), model, data_of_steps(6))
        results.append(weights_of(model))
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("method", ALL_SETTINGS, ids=str)
def test_resuming(method):
    results = []
    for stops in (False, True):
        model, data = make_net(), data_of_steps(9)
        optimizer = method.make(model, SGD)
        by_train_step(optimizer, model, data[:4])
        if stops:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = method.make(model, SGD)
            optimizer.load_state_dict(saved)
        by_train_step(optimizer, model, data[4:])
        results.append(weights_of(model))
    assert_same(*results)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_parameters_without_gradients(method):
    """For a while, or for ever: they stay as they are, and so does what is kept of them."""
    model = make_net()
    before = model.layers[0].weight.detach().clone()
    optimizer = method.make(model, PLAIN_SGD if method.fits(PLAIN_SGD) else SGD)
    for number, data in enumerate(data_of_steps(6)):
        model.layers[0].weight.requires_grad_(number >= 3)
        by_each_pass(optimizer, model, [data])
        assert torch.equal(model.layers[0].weight, before) == (number < 3)


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
    for base in (SGD, Base(WritesIntoGradients, SGD.settings, fused=False)):
        model = make_net()
        by_train_step(method.make(model, base), model, data_of_steps(6))
        results.append(weights_of(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_running_statistics_are_those_of_one_pass(method):
    """On the training batch, then on that from memory. Weights stay, and the perturbation is too small to be seen."""
    data, kinds = data_of_steps(4), ["train", *(method.needs & {"memory"})]
    model, wanted = make_net(batch_norm=True), make_net(batch_norm=True)
    radius = dict.fromkeys(method.rho_zero, 1e-9)
    by_train_step(method.make(model, SGD, lr=0.0, **radius), model, data)
    for own in data:
        for kind in kinds:
            wanted(own[kind][0])
    torch.testing.assert_close(list(model.buffers()), list(wanted.buffers()), rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:each_pass")  # for some of them it is the last
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_step_that_is_left_restores_the_weights(method):
    model = make_net()
    optimizer = method.make(model, SGD)
    by_train_step(optimizer, model, data_of_steps(4))
    before = weights_of(model)
    for _ in optimizer.each_pass():
        loss_of(model, batches(1)[0]).backward()
        break
    assert_same(weights_of(model), before)
    assert not optimizer.is_step_begun
