"""torch.compile of the model, and of whole steps: the same bits as without, and nothing to be warned of."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from .bases import ADAMW, SGD
from .cases import assert_same, batches, by_every_pass_closure, loss_of, make_net, weights_of
from .drivers import by_train_step, data_of_steps
from .methods import named

BACKEND = "aot_eager"


def by_hand(optimizer, model, batch):
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, batch).backward()
    optimizer.second_step(zero_grad=True)


def by_passes(optimizer, model, batch):
    for _ in optimizer.each_pass():
        loss_of(model, batch).backward()


def by_closure(optimizer, model, batch):
    by_every_pass_closure(optimizer, model, batch)


def train(method, base, drive, compiled, **more):
    torch._dynamo.reset()
    model = make_net(torch.float32)
    optimizer = method.make(model, base, closure_runs="every_pass", **more)
    evaluated, step = model, drive
    if compiled == "model":
        evaluated = torch.compile(model, backend=BACKEND)
    elif compiled == "step":
        step = torch.compile(drive, backend=BACKEND)
    for batch in batches(4, torch.float32):
        step(optimizer, evaluated, batch)
    return weights_of(model)


@pytest.mark.parametrize(("name", "base"), [("SAM", SGD), ("SAM adaptive", ADAMW), ("GSAM", SGD)], ids=str)
@pytest.mark.parametrize("drive", [by_hand, by_passes, by_closure])
@pytest.mark.parametrize("compiled", ["model", "step"])
def test_same_bits_and_no_warning(name, base, drive, compiled):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        got = train(named(name), base, drive, compiled)
    assert [str(w.message) for w in seen if "Dynamo" in str(w.message)] == []
    assert_same(got, train(named(name), base, drive, None))


@pytest.mark.filterwarnings("ignore:each_pass\\(\\) was left:UserWarning")
def test_an_exception_in_a_compiled_step_leaves_the_weights():
    model = make_net(torch.float32)
    optimizer = named("SAM").make(model, SGD)
    before = weights_of(model)

    def step(batch):
        for p in optimizer.each_pass():
            loss_of(model, batch).backward()
            if p.perturbed:
                raise ValueError("in the second pass")

    with pytest.raises(ValueError, match="second pass"):
        torch.compile(step, backend=BACKEND)(batches(1, torch.float32)[0])
    assert_same(weights_of(model), before)


@pytest.mark.parametrize("method", [named("AgnosticSAM"), named("SAMPa")], ids=str)
def test_train_step_with_a_compiled_model(method):
    results = []
    for compiles in (False, True):
        torch._dynamo.reset()
        model = make_net(torch.float32)
        optimizer = method.make(model, SGD)
        evaluated = torch.compile(model, backend=BACKEND) if compiles else model
        by_train_step(optimizer, evaluated, data_of_steps(4, torch.float32))
        results.append(weights_of(model))
    assert_same(*results)


def test_importing_the_package_does_not_import_the_compiler():
    program = "import sys, sam_optim; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
