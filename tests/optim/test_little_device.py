"""On devices without float64, such as Apple's GPUs, everything works on the backends that are plain PyTorch."""

from __future__ import annotations

import pytest
import torch

import sam_kernels as sk
from sam_optim import SAM, RandomState, ReservoirMemory, StabilityMonitor, TrainStep

from ..little_device import DEVICE, brought_back, little_device, moved, moved_module
from .bases import KINDS, SGD
from .cases import batches, loss_of, make_net
from .drivers import take_steps
from .methods import METHODS, named


def train(method, base, on_device, backend):
    model = make_net(torch.float32)
    data = [batches(4, torch.float32), batches(4, torch.float32, size=5)]
    if on_device:
        model = moved_module(model)
        data = [[tuple(moved(t) for t in batch) for batch in own] for own in data]
    optimizer = method.make(model, base, backend=backend)
    take_steps(TrainStep(model, optimizer, loss_of, max_grad_norm=0.5), *data)
    return [brought_back(p) for p in model.parameters()]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_methods(method, base, backend):
    with little_device():
        found = train(method, base, True, backend)
    for a, b in zip(found, train(method, base, False, "reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_master_weights(backend):
    def train_bfloat16(on_device):
        model = make_net(torch.bfloat16)
        data = batches(3, torch.bfloat16)
        if on_device:
            model = moved_module(model)
            data = [tuple(moved(t) for t in batch) for batch in data]
        optimizer = named("SAM").make(model, SGD, backend=backend, master_weights=True)
        step = TrainStep(model, optimizer, loss_of)
        for batch in data:
            step(batch)
        return [brought_back(p) for p in model.parameters()]

    with little_device():
        found = train_bfloat16(on_device=True)
    for a, b in zip(found, train_bfloat16(on_device=False), strict=True):
        torch.testing.assert_close(a, b, rtol=0.01, atol=1e-4)


def test_memory_and_monitor():
    def measured(on_device):
        model, [batch] = make_net(torch.float32), batches(1, torch.float32)
        if on_device:
            model, batch = moved_module(model), tuple(moved(t) for t in batch)
        memory = ReservoirMemory(capacity=5)
        memory.add(*batch)
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, backend="reference")
        record = StabilityMonitor(model, optimizer, loss_of).measure(batch)
        return [record.eigenvalue, record.edge, record.gradient_norm]

    with little_device():
        found = measured(on_device=True)
    assert found == pytest.approx(measured(on_device=False), rel=1e-3)


def test_the_generator_of_any_accelerator_is_kept(monkeypatch):
    class Generator:
        state = torch.tensor([3])

        def get_rng_state(self, device):
            assert device == DEVICE
            return self.state

        def set_rng_state(self, state, device):
            assert device == DEVICE
            self.state = state

    generator = Generator()
    monkeypatch.setattr(torch, DEVICE.type, generator, raising=False)
    before = RandomState([DEVICE, torch.device("cpu")])
    generator.state = torch.tensor([4])
    before.restore()
    assert generator.state == 3


def gram_of(xs, params, adaptive, backend=None):
    plan = sk.Plan(params, geometry=[0.01 if adaptive else None] * len(params))
    matrix = sk.gram(xs, plan, backend=backend)
    assert matrix.device.type == "cpu" and matrix.dtype == torch.float64
    return matrix


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_gram(backend, dtype, adaptive, magnitude):
    shapes = [(3, 5), (0,), (), (70,), (2, 0)]
    params = [torch.randn(shape, dtype=dtype) for shape in shapes]
    xs = [[torch.randn(shape, dtype=dtype) * magnitude for shape in shapes] for _ in range(3)]
    xs[1][0] = None
    xs[2][3] = torch.zeros(70, dtype=dtype)
    wanted = gram_of(xs, params, adaptive, "reference")
    with little_device():
        found = gram_of(
            [[None if t is None else moved(t) for t in x] for x in xs], [moved(p) for p in params], adaptive, backend
        )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.diagonal().min()))
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_gradients_that_are_not_finite(bad):
    weights = torch.randn(5)
    gradient = torch.randn(5)
    gradient[3] = bad
    with little_device():
        plan = sk.Plan([moved(weights)])
        report = sk.ascent_(plan, [[moved(gradient)]], scale=0.1, snapshot=sk.Snapshot(plan))
        assert not report.finite
        assert torch.equal(brought_back(plan.tensors[0]), weights)


def test_no_gradient_list_has_an_entry():
    with little_device():
        params = [moved(torch.randn(5))]
        assert torch.equal(gram_of([[None]], params, False), torch.zeros(1, 1, dtype=torch.float64))
        sk.combine_(params, [[None]], [1.0])
        assert torch.equal(brought_back(params[0]), torch.zeros(5))
