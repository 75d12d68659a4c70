"""torch's default device and default type are the user's business: nothing of ours depends on them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from sam_optim import SAM, ReservoirMemory, StabilityMonitor, TrainStep

from .bases import ADAMW, KINDS, SGD
from .cases import assert_same, batches, loss_of, make_net, weights_of
from .drivers import take_steps
from .methods import METHODS, named


@contextmanager
def default_device():
    """As with torch.set_default_device("cuda"): what does not say where it is to be goes where it is of no use."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def as_it_is():
    yield


def train(within, method, base, dtype=torch.float64, **more):
    model = make_net(dtype, batch_norm=True)
    data = batches(4, dtype), batches(4, dtype, size=5)
    with within():
        optimizer = method.make(model, base, **more)
        take_steps(TrainStep(model, optimizer, loss_of, max_grad_norm=0.5), *data)
    return weights_of(model)


@pytest.mark.parametrize("within", [default_device, default_dtype])
@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_methods(method, base, within):
    if within is default_device and (not base.fused or (method.has_plain_steps and base.cls is torch.optim.AdamW)):
        pytest.skip("the base's own steps, whose step counts torch 2.11 puts on the default device")
    assert_same(train(within, method, base), train(as_it_is, method, base))


# The interpreter is slow.
@pytest.mark.parametrize(
    ("within", "backend"),
    [
        *((default_device, backend) for backend in ("reference", "foreach", "cuda-shim", "triton")),
        *((default_dtype, backend) for backend in ("reference", "foreach", "cuda-shim")),
    ],
)
@pytest.mark.parametrize("method", [named("GSAM"), named("SAMPa")], ids=str)
def test_backends(request, backend, method, within):
    stand_ins = {"cuda-shim": "shim", "triton": "interpreter"}
    if backend in stand_ins:
        request.getfixturevalue(stand_ins[backend])
    # The base's own steps, whose step counts torch 2.11 puts on the default device.
    base = SGD if backend == "foreach" else ADAMW
    assert_same(train(within, method, base, backend=backend), train(as_it_is, method, base, backend=backend))


@pytest.mark.parametrize("within", [default_device, default_dtype])
def test_master_weights(within):
    settings = {"dtype": torch.bfloat16, "master_weights": True}
    base = SGD
    assert_same(train(within, named("SAM"), base, **settings), train(as_it_is, named("SAM"), base, **settings))


@pytest.mark.parametrize("within", [default_device, default_dtype])
def test_memory_and_monitor(within):
    found = []
    for own in (within, as_it_is):
        model = make_net()
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
        [batch] = batches(1)
        with own():
            memory = ReservoirMemory(capacity=5)
            memory.add(*batch)
            drawn = memory.sample(3)
            measured = StabilityMonitor(model, optimizer, loss_of).measure(batch)
        found.append([*drawn, torch.tensor(measured.eigenvalue), torch.tensor(measured.edge)])
    assert_same(*found)
