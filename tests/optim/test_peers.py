"""The loops that pytorch-optimizer documents, with its classes and with ours: the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sam_optim

from .cases import batches, loss_of, make_net, weights_of
from .methods import METHODS

peers = pytest.importorskip("pytorch_optimizer")

SGD = {"lr": 0.05, "momentum": 0.9}


class _Rho:
    """What its GSAM asks for."""

    def step(self):
        return 0.1


def _gsam(model):
    return peers.GSAM(model.parameters(), torch.optim.SGD(model.parameters(), **SGD), model, _Rho(), alpha=0.4)


def _of(name, **settings):
    """Its class, and ours, from a model."""

    def its(model):
        before = (model,) if name == "WSAM" else ()
        return getattr(peers, name)(*before, model.parameters(), torch.optim.SGD, rho=0.1, **settings, **SGD)

    def ours(model):
        return getattr(sam_optim, name)(model.parameters(), torch.optim.SGD, rho=0.1, **settings, **SGD)

    return (_gsam if name == "GSAM" else its), ours


def _layer():
    torch.manual_seed(1)
    return nn.Linear(7, 3, bias=False).double()


def closure_of(optimizer, model, batch, clears):
    @torch.enable_grad()
    def closure():
        if clears:
            optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return closure


def second_pass(optimizer, model, batch, clears, **settings):
    """Its README: a backward pass, a closure for the other one, and clearing afterwards."""
    loss_of(model, batch).backward()
    optimizer.step(closure_of(optimizer, model, batch, clears), **settings)
    optimizer.zero_grad()


def every_pass(optimizer, model, batch, clears, **settings):
    optimizer.step(closure_of(optimizer, model, batch, clears), **settings)


def train(make, step, model, clears=True, **settings):
    optimizer = make(model)
    for batch in batches(6):
        step(optimizer, model, batch, clears, **settings)
    return weights_of(model)


def assert_close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=1e-7)  # its norms are taken in float32


@pytest.mark.parametrize("clears", [True, False], ids=["clears", "clears nothing"])
@pytest.mark.parametrize(
    ("name", "settings", "make_model"),
    [
        ("SAM", {}, make_net),
        ("FriendlySAM", {"sigma": 1.0, "lmbda": 0.9}, make_net),
        ("LookSAM", {"k": 1}, make_net),
        ("LookSAM", {"k": 2, "alpha": 0.7}, _layer),  # its norms and products are each tensor's, ours the model's
    ],
)
def test_a_backward_pass_and_a_closure(name, settings, make_model, clears):
    its, ours = _of(name, **settings)
    assert_close(train(ours, second_pass, make_model(), clears), train(its, second_pass, make_model(), clears))


@pytest.mark.parametrize("before", [False, True], ids=["", "after a backward pass"])
@pytest.mark.parametrize("clears", [True, False], ids=["clears", "clears nothing"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [("GSAM", {"alpha": 0.4}), ("WSAM", {"gamma": 0.8}), ("WSAM", {"gamma": 0.8, "decouple": False})],
)
def test_a_closure_for_every_pass(name, settings, clears, before):
    """Its closures have to clear; ours may."""
    its, ours = _of(name, **settings)
    if name == "GSAM":

        def step(optimizer, model, batch, clears):
            closure = closure_of(optimizer, model, batch, True)
            optimizer.step(lambda: (None, closure()))

    else:
        step = every_pass
    drive = second_pass if before else every_pass
    got = train(ours, drive, make_net(), clears, closure_runs="every_pass")
    assert_close(got, train(its, step, make_net()))


EVERY_PASS = {
    "CRSAM",
    "LookSAM",
    "IntervalSAM",
    "RandomizedSAM",
    "AESAM",
    "MomentumSAM",
    "AgnosticSAM",
    "AlignSAM",
    "MGSERSAM",
    "SAMPa",
}


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_whose_closures_run_every_pass(method):
    """As docs/usage.md says, in one table for all."""
    optimizer = method.cls(make_net().named_parameters(), torch.optim.SGD, **method.settings, **SGD)
    assert optimizer.closure_runs == ("every_pass" if method.cls.__name__ in EVERY_PASS else "second_pass")
    usage = (Path(__file__).parents[2] / "docs" / "usage.md").read_text()
    table = usage.split("| default | classes | why |")[1].split("\n\n")[0]
    second_pass, every_pass = table.split('"every_pass"')
    assert f"`{method.cls.__name__}`" in (every_pass if method.cls.__name__ in EVERY_PASS else second_pass)
