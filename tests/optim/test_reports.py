"""``optimizer.last_step`` says what was seen, and nothing of what nobody has looked at."""

from __future__ import annotations

import copy

import pytest
import torch

import sam_kernels as sk
from sam_optim import GSAM, SAM

from .bases import KINDS
from .cases import batches, loss_of, make_net, step_by_hand

BACKENDS = ["reference", "foreach", "cpu"]


def norm_of(model, factor=1.0):
    return torch.sqrt(sum((p.grad.double() ** 2).sum() for p in model.parameters())).item() / factor


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rho", [0.1, 0.0])
def test_a_healthy_step(base, backend, rho):
    model = make_net()
    optimizer = SAM(model.parameters(), base.cls, rho=rho, backend=backend, **copy.deepcopy(base.settings))
    loss_of(model, batches(1)[0]).backward()
    norm = norm_of(model)
    optimizer.zero_grad()
    step_by_hand(optimizer, model, batches(1)[0])
    last = optimizer.last_step
    assert last.updated and last.ascent.finite
    assert last.ascent.norms.tolist() == pytest.approx([norm])
    assert last.descent.finite is None and last.descent.norms is None and last.descent.gram is None
    assert "nan" not in repr(last)
    assert "not known" in repr(last.descent)
    assert "updated=True" in repr(last)


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_with_nan_is_not_called_finite(base, backend):
    """It is made, as torch's own optimizers make it."""
    model = make_net()
    optimizer = SAM(model.parameters(), base.cls, rho=0.1, backend=backend, **copy.deepcopy(base.settings))
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, batches(1)[0]).backward()
    for p in model.parameters():
        p.grad.fill_(torch.nan)
    optimizer.second_step()
    assert all(p.isnan().all() for p in model.parameters())
    assert optimizer.last_step.updated
    assert optimizer.last_step.descent.finite is None


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_that_looks_says_what_it_saw(base, backend):
    for bad in (False, True):
        model = make_net()
        optimizer = GSAM(model.parameters(), base.cls, rho=0.1, backend=backend, **copy.deepcopy(base.settings))
        loss_of(model, batches(1)[0]).backward()
        first = norm_of(model)
        optimizer.first_step(zero_grad=True)
        loss_of(model, batches(1)[0]).backward()
        if bad:
            next(model.parameters()).grad[0, 0] = torch.inf
        second = norm_of(model)
        optimizer.second_step()
        last = optimizer.last_step
        assert last.descent.finite == last.updated == (not bad)
        if not bad:
            assert last.descent.norms.tolist() == pytest.approx([second, first])


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("method", [SAM, GSAM])
def test_norms_are_unscaled_once_the_scale_is_known(base, method):
    model = make_net()
    optimizer = method(model.parameters(), base.cls, rho=0.1, **copy.deepcopy(base.settings))
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=1)
    scaler.scale(loss_of(model, batches(1)[0])).backward()
    first = norm_of(model, 512.0)
    optimizer.first_step(zero_grad=True)
    scaler.scale(loss_of(model, batches(1)[0])).backward()
    second = norm_of(model, 512.0)
    scaler.step(optimizer)
    scaler.update()  # doubles the scale, which is none of the last step's
    last = optimizer.last_step
    assert last.ascent.norms.tolist() == pytest.approx([first])
    assert last.ascent.unread().norms.tolist() == pytest.approx([first])
    if method is GSAM:
        assert last.descent.norms.tolist() == pytest.approx([second, first])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("rule", [sk.Fixed(), sk.NormMatched()], ids=str)
def test_a_skipped_descent_has_looked_at_nothing(backend, rule):
    weight = torch.ones(3)
    xs = [[torch.ones(3)], [torch.full((3,), 2.0)]]
    base = sk.SGD([sk.SGDSettings(0.1)], [], bytearray(1))
    report = sk.descent_([weight], xs, base, rule=rule, found_inf=True, backend=backend)
    assert report.finite is None and report.norms is None and report.coefficients.shape == (2,)
    assert report.overflow is False
    assert weight.tolist() == [1.0] * 3
