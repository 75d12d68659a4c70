"""Two optimizers in one loop: adversaries, and heads on one encoder."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import nn

from sam_optim import GSAM, SAM, LookSAM, StepOrderError

from .cases import assert_same, weights_of

SGD = {"lr": 0.05, "momentum": 0.9}


def layers(*sizes):
    return nn.Sequential(*[m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]).double()


class Adversaries:
    """A generator of samples and who tells them from real ones; their losses go backward through both."""

    def __init__(self):
        torch.manual_seed(3)
        self.generator, self.critic = layers(2, 8, 3), layers(3, 8, 1)

    def critics_loss(self, real, noise):
        return self.critic(self.generator(noise)).mean() - self.critic(real).mean()

    def generators_loss(self, noise):
        return -self.critic(self.generator(noise)).mean()

    def weights(self):
        return weights_of(self.generator) + weights_of(self.critic)


def data(count):
    generator = torch.Generator().manual_seed(4)
    return [
        (
            torch.randn(5, 3, generator=generator, dtype=torch.float64),
            torch.randn(5, 2, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def sam_step(params, base, loss_of):
    """SAM from its formula, by torch.autograd.grad: gradients of nobody else come near it."""
    gradients = torch.autograd.grad(loss_of(), params)
    norm = torch.sqrt(sum((g**2).sum() for g in gradients))
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, g in zip(params, gradients, strict=True):
            p.add_(0.1 * g / norm)
    gradients = torch.autograd.grad(loss_of(), params)
    with torch.no_grad():
        for p, w in zip(params, before, strict=True):
            p.copy_(w)
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    base.step()
    for p in params:
        p.grad = None


def test_adversaries_one_after_the_other():
    both, oracle = Adversaries(), Adversaries()
    optimizers = [SAM(m.parameters(), torch.optim.SGD, rho=0.1, **SGD) for m in (both.critic, both.generator)]
    bases = [torch.optim.SGD(m.parameters(), **SGD) for m in (oracle.critic, oracle.generator)]
    for real, noise in data(4):
        for _ in optimizers[0].each_pass():
            both.critics_loss(real, noise).backward()
        for _ in optimizers[1].each_pass():
            both.generators_loss(noise).backward()
        sam_step(list(oracle.critic.parameters()), bases[0], lambda r=real, n=noise: oracle.critics_loss(r, n))
        sam_step(list(oracle.generator.parameters()), bases[1], lambda n=noise: oracle.generators_loss(n))
    for a, b in zip(both.weights(), oracle.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("methods", [(SAM, SAM), (GSAM, SAM), (SAM, LookSAM)])
def test_zip_of_two_loops_warns(methods):
    """It stops when the first has made its update; the second has not."""
    both = Adversaries()
    one, two = (
        cls(m.parameters(), torch.optim.SGD, rho=0.1, **SGD)
        for cls, m in zip(methods, (both.critic, both.generator), strict=True)
    )
    before = weights_of(both.generator)
    with pytest.warns(UserWarning, match="makes no update"):
        for _ in zip(one.each_pass(), two.each_pass(), strict=False):
            both.critics_loss(*data(1)[0]).backward()
    assert_same(weights_of(both.generator), before)
    assert one.last_step.updated and not two.last_step.updated
    assert not two.is_step_begun


def test_leaving_a_loop_on_purpose_warns_of_nothing():
    model = layers(3, 2)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for p in optimizer.each_pass():
            if p.last:
                break  # before its backward
            model(torch.ones(3, dtype=torch.float64)).sum().backward()
        for p in optimizer.each_pass():
            model(torch.ones(3, dtype=torch.float64)).sum().backward()
            if p.last:
                optimizer.restore()
                break
        [model(torch.ones(3, dtype=torch.float64)).sum().backward() for _ in optimizer.each_pass()]
    assert optimizer.last_step.updated


class Heads:
    def __init__(self):
        torch.manual_seed(5)
        self.encoder, self.actor, self.critic = layers(3, 8), layers(8, 2), layers(8, 1)

    def loss(self, head, x):
        return (getattr(self, head)(self.encoder(x)) ** 2).mean()

    def optimizers(self):
        return [
            SAM([*self.encoder.parameters(), *getattr(self, head).parameters()], torch.optim.SGD, rho=0.1, lr=0.1)
            for head in ("actor", "critic")
        ]

    def weights(self):
        return [w for m in (self.encoder, self.actor, self.critic) for w in weights_of(m)]


def test_steps_on_shared_parameters_do_not_interleave():
    """Each would take the other's perturbation for the weights themselves."""
    heads = Heads()
    one, two = heads.optimizers()
    x = data(1)[0][0]
    before = heads.weights()
    heads.loss("actor", x).backward()
    one.first_step(zero_grad=True)
    heads.loss("critic", x).backward()
    for begin in (two.first_step, two.begin, lambda: next(two.each_pass())):
        with pytest.raises(StepOrderError, match="one step after the other"):
            begin()
    assert one.is_step_begun
    one.restore()
    assert_same(heads.weights(), before)
    for _ in two.each_pass():
        heads.loss("critic", x).backward()
    assert two.last_step.updated


def test_an_optimizer_that_is_gone_disturbs_nobody():
    heads = Heads()
    one, two = heads.optimizers()
    next(one.each_pass())
    del one
    for _ in two.each_pass():
        heads.loss("critic", data(1)[0][0]).backward()
    assert two.last_step.updated


def test_one_optimizer_of_all_and_a_sum_of_losses():
    """What the docs recommend for one encoder: one perturbation, with settings by groups."""
    heads = Heads()
    groups = [
        {"params": heads.encoder.parameters()},
        {"params": heads.actor.parameters(), "lr": 0.02},
        {"params": heads.critic.parameters(), "perturb": False},
    ]
    optimizer = SAM(groups, torch.optim.SGD, rho=0.1, lr=0.1)
    before = heads.weights()
    for _ in optimizer.each_pass():
        (heads.loss("actor", data(1)[0][0]) + 0.5 * heads.loss("critic", data(1)[0][0])).backward()
    assert not any(torch.equal(a, b) for a, b in zip(heads.weights(), before, strict=True))
