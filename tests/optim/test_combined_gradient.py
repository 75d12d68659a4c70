"""combine_gradients(): what an update is made of stands in p.grad, to be clipped and unscaled by whoever does that."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sam_optim import SAM, WSAM, Pass, StepOrderError, TrainStep, Update

from .bases import PLAIN_SGD, SGD, UNFUSED
from .cases import assert_same, batches, loss_of, make_net, step_by_hand, weights_of
from .drivers import by_train_step, data_of_steps
from .methods import METHODS, Method, methods_with, named

COMBINING = methods_with(combines=True, by_two_calls=True, takes_scaled_gradients=True)
# They take the gradient of their first pass again when that of another has been taken.
KEEPING = [*methods_with(combines=True), *map(named, ["LookSAM", "MGSERSAM", "AgnosticSAM"])]
# With plain SGD the weights move along the gradient of the update and no further.
ALONG = [m for m in methods_with(needs=set()) if m.fits(PLAIN_SGD) and m is not named("WSAM")]
CLIP = 0.05


def make(method, base=SGD, dtype=torch.float64):
    model = make_net(dtype)
    return model, method.make(model, base)


def train(method, steps=6, combine=True, clip=None, base=SGD):
    model, optimizer = make(method, base)
    for data in data_of_steps(steps):
        for p in optimizer.each_pass():
            loss_of(model, data[p.data]).backward()
            if p.last and combine:
                optimizer.combine_gradients()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
    return weights_of(model)


@pytest.mark.parametrize("base", [PLAIN_SGD, SGD, UNFUSED], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_step_is_the_same(method, base):
    if method.fits(base):
        torch.testing.assert_close(
            train(method, base=base), train(method, combine=False, base=base), rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("method", methods_with(tells_last=True), ids=str)
def test_clipped_as_train_step_clips(method):
    model, optimizer = make(method)
    by_train_step(optimizer, model, data_of_steps(6), max_grad_norm=CLIP)
    torch.testing.assert_close(train(method, clip=CLIP), weights_of(model), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(train(method)[0], weights_of(model)[0])


@pytest.mark.parametrize("method", ALONG, ids=str)
def test_the_update_is_along_what_is_in_grad(method):
    model, optimizer = make(method, PLAIN_SGD)
    before = weights_of(model)
    for p in optimizer.each_pass():
        loss_of(model, batches(1)[0]).backward()
        if p.last:
            optimizer.combine_gradients()
            taken = [p.grad.clone() for p in model.parameters()]
    for w, b, g in zip(weights_of(model), before, taken, strict=True):
        torch.testing.assert_close(w, b - 0.05 * g, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", COMBINING, ids=str)
def test_by_two_calls(method):
    model, optimizer = make(method)
    for batch in batches(6):
        loss_of(model, batch).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(model, batch).backward()
        optimizer.combine_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.second_step(zero_grad=True)
    torch.testing.assert_close(weights_of(model), train(method, clip=CLIP), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [named("SAM"), *COMBINING], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("way", ["two calls", "each_pass"])
def test_grad_scaler_that_unscales(method, scale, way):
    model, optimizer = make(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def before_step():
        optimizer.combine_gradients()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)

    for batch in batches(6):
        if way == "two calls":
            scaler.scale(loss_of(model, batch)).backward()
            optimizer.first_step(zero_grad=True)
            scaler.scale(loss_of(model, batch)).backward()
            before_step()
            scaler.step(optimizer)
        else:
            for p in optimizer.each_pass(step=lambda: scaler.step(optimizer)):
                scaler.scale(loss_of(model, batch)).backward()
                if p.last:
                    before_step()
        scaler.update()
        optimizer.zero_grad()
    torch.testing.assert_close(weights_of(model), train(method, clip=CLIP), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", COMBINING, ids=str)
def test_unscaling_one_of_several_gradients_is_refused(method):
    model, optimizer = make(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = weights_of(model)
    [batch] = batches(1)
    scaler.scale(loss_of(model, batch)).backward()
    optimizer.first_step(zero_grad=True)
    scaler.scale(loss_of(model, batch)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(StepOrderError, match="combine_gradients"):
        scaler.step(optimizer)
    assert_same(weights_of(model), before)
    assert not optimizer.is_step_begun


@pytest.mark.parametrize("infinite", [0, 1])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("method", [named("GSAM"), named("StableSAM")], ids=str)
def test_gradients_that_are_not_finite(method, infinite, scaled):
    """Where a Gram matrix of theirs is needed, nothing is updated, and GradScaler and clipping see why."""
    model, optimizer = make(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    before = weights_of(model)
    for number, move in enumerate((optimizer.first_step, optimizer.combine_gradients)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batches(1)[0])).backward()
        if number == infinite:
            next(model.parameters()).grad[0, 0] = float("inf")
        move()
    assert not nn.utils.clip_grad_norm_(model.parameters(), CLIP).isfinite()
    if scaled:
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0
    else:
        optimizer.second_step()
    assert not optimizer.last_step.updated
    assert_same(weights_of(model), before)


@pytest.mark.parametrize("method", methods_with(averages=False), ids=str)
def test_a_step_abandoned_after_it(method):
    """Leaves weights, and what the method keeps from step to step, as if it had not been."""
    model, optimizer = make(method)
    results = []
    for number, data in enumerate(data_of_steps(4)):
        for abandoned in (True, False) if number == 2 else (False,):
            before, state = weights_of(model), copy.deepcopy(optimizer.state_dict())
            for p in optimizer.each_pass():
                loss_of(model, data[p.data]).backward()
                if p.last and abandoned:
                    optimizer.combine_gradients()
                    optimizer.restore()
                    break
            if abandoned:
                assert_same(weights_of(model), before)
                now = optimizer.state_dict()
                assert now["param_groups"] == state["param_groups"]
                for key in ("state", "method_state"):
                    torch.testing.assert_close(now.get(key), state.get(key), rtol=0.0, atol=0.0)
            optimizer.zero_grad()
        results.append(weights_of(model))
    assert not torch.equal(results[-1][0], results[-2][0])


def test_when_it_can_be_called():
    model, optimizer = make(named("GSAM"))
    before = weights_of(model)
    with pytest.raises(StepOrderError, match="before the backward of a step's last pass"):
        optimizer.combine_gradients()
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(StepOrderError, match="no parameter has a gradient"):
        optimizer.combine_gradients()
    assert_same(weights_of(model), before)
    for p in optimizer.each_pass():
        loss_of(model, batches(1)[0]).backward()
        if not p.last:
            with pytest.raises(StepOrderError, match="last pass"):
                optimizer.combine_gradients()
    step_by_hand(optimizer, model, batches(1)[0])


def test_gram_matrices_that_overflow():
    """Finite gradients whose products are not: nothing is updated, and nobody takes the sum for a gradient."""
    model, optimizer = make(named("GSAM"))
    before = weights_of(model)
    for move in (optimizer.first_step, optimizer.combine_gradients):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e200)
        move()
    assert all(p.grad.isnan().all() for p in model.parameters())
    optimizer.second_step()
    assert not optimizer.last_step.updated
    assert_same(weights_of(model), before)


def test_clipping_does_not_reach_a_gradient_that_is_kept():
    class Keeps(SAM):
        def passes(self):
            g = yield Pass()
            self.ascend(g, rule=self._rule, scale=self.radii())
            g_plus = yield Pass(perturbed=True, kept=True, last=True)
            before = [x.clone() for x in g_plus]
            yield Update(g_plus)
            self.kept = before, g_plus

    model, optimizer = make(Method(Keeps, {"rho": 0.1}))
    for p in optimizer.each_pass():
        loss_of(model, batches(1)[0]).backward()
        if p.last:
            optimizer.combine_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    assert_same(*optimizer.kept)


def test_a_method_that_makes_its_update_itself():
    class Own(SAM):
        def passes(self):
            yield Pass(last=True)
            self.stepper.update(Update([p.grad for p in self.param_groups[0]["params"]]))

    model, optimizer = make(Method(Own, {"rho": 0.1}))
    step_by_hand(optimizer, model, batches(1)[0])
    before = weights_of(model)
    for _ in optimizer.each_pass():
        loss_of(model, batches(1)[0]).backward()
        with pytest.raises(StepOrderError, match="yield Update"):
            optimizer.combine_gradients()
        optimizer.restore()
        break
    assert_same(weights_of(model), before)


def test_clipping_does_not_reach_what_a_method_keeps():
    """Decoupled WSAM adds lr a (g+ - g) after an update with g: clipping that update must not change this g too."""
    weight = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    curvature = torch.tensor([1.0, 4.0], dtype=torch.float64)
    optimizer = WSAM([weight], torch.optim.SGD, rho=0.5, gamma=0.5, lr=0.1)
    model = nn.Module()
    model.weight = weight
    step = TrainStep(model, optimizer, lambda model, batch: (0.5 * curvature * weight**2).sum(), max_grad_norm=1.0)
    step(torch.zeros(1))
    # g = (3, 4), clipped to (0.6, 0.8); g+ - g = A e = (1, 4) * 0.5 * (0.6, 0.8)
    assert weight.tolist() == pytest.approx([3 - 0.06 - 0.03, 1 - 0.08 - 0.16], abs=1e-7)


@pytest.mark.parametrize("method", KEEPING, ids=str)
def test_one_tensor_as_the_gradient_of_all_passes(method):
    """What is assigned is somebody's own: written into for the next pass, it is no longer what the method keeps."""
    model = make_net()
    optimizer = method.make(model, PLAIN_SGD)
    before = weights_of(model)
    own = [torch.empty_like(p) for p in model.parameters()]
    with pytest.raises(StepOrderError, match="pass 1 is needed again, but was written into"):
        for p in optimizer.each_pass():
            gradients = torch.autograd.grad(loss_of(model, batches(2)[p.data != "train"]), list(model.parameters()))
            for parameter, tensor, gradient in zip(model.parameters(), own, gradients, strict=True):
                parameter.grad = tensor.copy_(gradient)
    assert_same(weights_of(model), before)
    # That of a loss that is linear may be the same tensor, unchanged.
    for _ in optimizer.each_pass():
        for parameter, tensor in zip(model.parameters(), own, strict=True):
            parameter.grad = tensor.requires_grad_(False)


class Halving:
    """A wrapper that changes gradients before it calls ``step()``, as those for several tasks do."""

    def __init__(self, optimizer, in_place):
        self.optimizer, self.in_place = optimizer, in_place

    def step(self):
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if self.in_place:
                    p.grad.mul_(0.5)
                else:
                    p.grad = p.grad * 0.5
        self.optimizer.step()


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("method", [named("SAM"), named("GSAM")], ids=str)
@pytest.mark.parametrize("combined", [True, False])
def test_the_update_takes_what_its_maker_puts_into_grad(method, in_place, combined):
    """Without momentum half of the gradient is half of the step."""
    model, reference = make_net(), make_net()
    optimizer = method.make(model, PLAIN_SGD)
    step_by_hand(method.make(reference, PLAIN_SGD), reference, batches(1)[0])
    start = weights_of(model)

    def go():
        for p in optimizer.each_pass(step=Halving(optimizer, in_place).step):
            loss_of(model, batches(1)[0]).backward()
            if p.last and combined:
                optimizer.combine_gradients()

    if method.combines and not combined:
        with pytest.raises(StepOrderError, match=r"has changed p.grad.*combine_gradients\(\)"):
            go()
        assert_same(weights_of(model), start)
        return
    go()
    for w, full, before in zip(weights_of(model), weights_of(reference), start, strict=True):
        torch.testing.assert_close(w - before, 0.5 * (full - before))


@pytest.mark.parametrize("method", KEEPING, ids=str)
def test_gradients_in_memory_of_numpy(method):
    """Which is written in every pass, and torch cannot know it."""
    (model, optimizer), (other, fresh) = (make(method) for _ in range(2))
    own = [p.detach().numpy().copy() for p in model.parameters()]
    for batch, another in zip(batches(3), batches(3, size=5), strict=True):
        for p in optimizer.each_pass():
            loss = loss_of(model, batch if p.data == "train" else another)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for parameter, array, gradient in zip(model.parameters(), own, gradients, strict=True):
                array[...] = gradient.numpy()
                parameter.grad = torch.from_numpy(array)
        for p in fresh.each_pass():
            loss_of(other, batch if p.data == "train" else another).backward()
    assert_same(weights_of(model), weights_of(other))
