"""The optimizers on other backends than the CPU's: the same steps as on the reference, by fibers, a GPU, or torch."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from per_tensor_sam import PerTensorSAM
from sam_optim import SAM, TrainStep

from ..little_device import little_device, moved
from .bases import ADAMW, BASES, FUSED, PLAIN_SGD, SGD
from .cases import assert_same, batches, loss_of, make_net, step_by_hand, weights_of
from .methods import METHODS, named


def on(device, batch):
    return tuple(t.to(device) for t in batch)


def train(method, base, backend, device, steps=4, **options):
    """Weights and state after some steps."""
    model = make_net().to(device)
    optimizer = method.make(model, base, backend=backend)
    step = TrainStep(model, optimizer, loss_of, **options)
    for a, b in zip(batches(steps), batches(steps, size=5), strict=True):
        step(on(device, a), on(device, b))
    state = [v for entries in optimizer.state.values() for v in entries.values() if isinstance(v, torch.Tensor)]
    return model, optimizer, [t.cpu() for t in (*weights_of(model), *state)]


# Kernels know bases and rules, not methods: every base with one that looks ahead, every method with a base, and both
# kinds of update after a rule.
PAIRS = [
    *((named("SAMPa"), base) for base in BASES),
    *((method, SGD) for method in METHODS if method is not named("SAMPa")),
    (named("GSAM"), ADAMW),
]


@pytest.mark.parametrize(("method", "base"), PAIRS, ids=str)
def test_steps(gpu_target, method, base):
    _, _, wanted = train(method, base, "reference", "cpu")
    _, optimizer, got = train(method, base, gpu_target.name, gpu_target.device)
    assert optimizer.last_step.updated
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("base", FUSED, ids=str)
@pytest.mark.parametrize("when", [0, 2])
def test_an_overflow_under_grad_scaler(gpu_target, base, when):
    """In the very first step too, where the state is new; with dampening a buffer's first use must stay first."""
    method = named("SAM")

    def run(backend, device):
        scaler = torch.amp.GradScaler(device.type, init_scale=16.0)
        model = make_net().to(device)
        optimizer = method.make(model, base, backend=backend)
        calls = []

        def loss_fn(model, batch):
            calls.append(None)
            return loss_of(model, batch) * (float("inf") if len(calls) == 2 * when + 2 else 1.0)

        step = TrainStep(model, optimizer, loss_fn, scaler=scaler)
        updated = []
        for batch in batches(4):
            step(on(device, batch))
            updated.append(optimizer.last_step.updated)
        assert updated == [number != when for number in range(4)]
        return [t.cpu() for t in weights_of(model)]

    for a, b in zip(run(gpu_target.name, gpu_target.device), run("reference", torch.device("cpu")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("base", FUSED, ids=str)
def test_checkpoints_move_between_devices(gpu_target, base):
    """Half of the steps on the reference, the others here."""
    method = named("SAM")
    _, _, wanted = train(method, base, "reference", "cpu", steps=4)
    model, optimizer, _ = train(method, base, "reference", "cpu", steps=2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model = make_net().to(gpu_target.device)
    optimizer = method.make(model, base, backend=gpu_target.name)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    step = TrainStep(model, optimizer, loss_of)
    for batch in batches(4)[2:]:
        step(on(gpu_target.device, batch))
    for a, b in zip(weights_of(model), wanted, strict=False):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-12)


class CountedCalls(TorchDispatchMode):
    """Calls of torch's functions that compute something; a function on lists counts once for each tensor."""

    FREE = ("detach", "alias", "view", "unbind", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name.startswith("_foreach"):
            self.count += len(args[0])
        elif name not in self.FREE:
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=str)
@pytest.mark.parametrize("adaptive", [False, True])
def test_without_kernels_a_step_takes_fewer_calls_than_the_common_sam(adaptive, base):
    """Where each call is a launch, as on Apple's GPUs."""
    counts = []
    for method in (PerTensorSAM, SAM):
        with little_device():
            params = [torch.nn.Parameter(moved(torch.randn(10))) for _ in range(100)]
            optimizer = method(params, base.cls, rho=0.1, adaptive=adaptive, **base.settings)
            for counted in (nullcontext(), CountedCalls()):
                for p in params:
                    p.grad = moved(torch.randn(10))
                with counted:
                    optimizer.first_step()
                    optimizer.second_step()
        counts.append(counted.count / len(params))
    common, ours = counts
    assert ours < common, (ours, common)


@pytest.mark.parametrize("backend", ["foreach", "reference"])
def test_parameters_that_change_between_steps(backend):
    """Their type, here, where no table of a native backend would notice: copies are of the new one."""
    model = make_net(torch.float32)
    optimizer = named("SAM").make(model, PLAIN_SGD, backend=backend, lr=0.0)
    for dtype in (torch.float32, torch.float64, torch.float32):
        model.to(dtype)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p))
        before = weights_of(model)
        for batch in batches(2, dtype):
            step_by_hand(optimizer, model, batch)
            assert_same(weights_of(model), before)
        assert optimizer.last_step.ascent.finite
