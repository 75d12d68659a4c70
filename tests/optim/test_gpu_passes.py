"""Passes on CUDA streams and steps as CUDA graphs, on a GPU: the same numbers, and kernels that overlap."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sam_optim import SAM, TrainStep

from .bases import SGD, Base
from .cases import batches, loss_of, make_net, weights_of
from .methods import named

pytestmark = pytest.mark.gpu

ADAMW = Base(torch.optim.AdamW, {"lr": 0.01, "capturable": True})
IN_PARALLEL = [
    named("AgnosticSAM"),
    named("AgnosticSAM smoothed"),
    named("AlignSAM"),
    named("SAMPa"),
    named("SAMPa of lam 0"),
]
METHODS = [named("SAM"), named("SAM adaptive"), *IN_PARALLEL]


@pytest.fixture(autouse=True, params=["cuda", "triton"])
def backend(request, monkeypatch):
    monkeypatch.setenv("SAM_KERNELS_BACKEND", request.param)
    return request.param


def train(method, base, steps=12, model=None, **options):
    model = (make_net() if model is None else model).cuda()
    optimizer = method.make(model, base)
    step = TrainStep(model, optimizer, loss_of, **options)
    losses = []
    for a, b in zip(batches(steps), batches(steps, size=5), strict=True):
        losses.append(step(tuple(t.cuda() for t in a), tuple(t.cuda() for t in b)))
    return [*weights_of(model), *losses, *(b.clone() for b in model.buffers())], optimizer


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=str)
@pytest.mark.parametrize("method", IN_PARALLEL, ids=str)
def test_streams(method, base):
    wanted, _ = train(method, base)
    got, _ = train(method, base, passes="streams")
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_capture(method, base):
    wanted, _ = train(method, base)
    got, optimizer = train(method, base, capture=True)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert optimizer.last_step.updated


@pytest.mark.parametrize("method", IN_PARALLEL, ids=str)
def test_streams_captured(method):
    wanted, _ = train(method, SGD)
    got, _ = train(method, SGD, passes="streams", capture=True)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"capture": True}, {"passes": "streams"}], ids=str)
def test_batch_norm(options):
    """Statistics are updated once a step, by the training pass alone."""
    wanted, _ = train(IN_PARALLEL[0], SGD, model=make_net(batch_norm=True))
    got, _ = train(IN_PARALLEL[0], SGD, model=make_net(batch_norm=True), **options)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("capture", [False, True])
def test_dropout_draws_the_same_masks_in_both_passes(capture):
    """And other ones in the next step."""
    model = make_net(dropout=0.5).cuda()
    masks = torch.zeros(16, 2, 12, 33, device="cuda")
    counter = torch.zeros((), dtype=torch.long, device="cuda")

    def loss_fn(model, batch):
        hidden = model.layers[2](model.layers[1](model.layers[0](batch[0])))
        # Where it was called, device-side: a graph replays this too.
        masks.view(32, 12, 33).index_copy_(0, counter.view(1), (hidden == 0).float()[None].detach())
        counter.add_(1)
        return nn.functional.cross_entropy(model.layers[3](hidden), batch[1])

    step = TrainStep(model, named("SAM").make(model, SGD), loss_fn, capture=capture)
    for batch in batches(10):
        step(tuple(t.cuda() for t in batch))
    assert counter.item() == 20
    seen = masks[:10].cpu()
    assert torch.equal(seen[:, 0], seen[:, 1])
    assert all(not torch.equal(seen[i, 0], seen[i + 1, 0]) for i in range(9))


def test_a_learning_rate_on_the_gpu_changes_between_replays():
    results = []
    for capture in (False, True):
        model = make_net().cuda()
        lr, rho = torch.tensor(0.05, device="cuda"), torch.tensor(0.1, device="cuda")
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=lr, momentum=0.9)
        step = TrainStep(model, optimizer, loss_of, capture=capture)
        for number, batch in enumerate(batches(8)):
            lr.fill_(0.05 / (number + 1))
            rho.fill_(0.1 * number)
            step(tuple(t.cuda() for t in batch))
        results.append(weights_of(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_eager_steps_between_replays():
    """Their gradients lie elsewhere; the graph must not follow them there."""
    data = [tuple(t.cuda() for t in batch) for batch in batches(10)]
    odd = [tuple(t.cuda() for t in batch) for batch in batches(2, size=7)]
    results = []
    for capture in (False, True):
        model = make_net().cuda()
        optimizer = named("SAM").make(model, SGD)
        step = TrainStep(model, optimizer, loss_of, capture=capture)
        by_hand = TrainStep(model, optimizer, loss_of)
        for number, batch in enumerate(data):
            step(batch)
            if number in (5, 7):
                by_hand(odd[number // 7])
        results.append(weights_of(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_loading_state_between_replays(method):
    """What is loaded counts, not what the graph has worked on."""
    results = []
    for capture in (False, True):
        model = make_net().cuda()
        optimizer = method.make(model, SGD)
        step = TrainStep(model, optimizer, loss_of, capture=capture)
        pairs = zip(batches(9), batches(9, size=5), strict=True)
        data = [tuple(tuple(t.cuda() for t in b) for b in pair) for pair in pairs]
        for pair in data[:3]:
            step(*pair)
        saved = copy.deepcopy(optimizer.state_dict())
        for pair in data[3:6]:
            step(*pair)
        optimizer.load_state_dict(saved)
        for pair in data[6:]:
            step(*pair)
        results.append(weights_of(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_an_exception_while_recording_leaves_the_weights():
    model = make_net().cuda()
    optimizer = named("SAM").make(model, SGD)
    data = [tuple(t.cuda() for t in batch) for batch in batches(6)]
    fails = [False]

    def loss_fn(model, batch):
        loss = loss_of(model, batch)
        if fails[0] and torch.cuda.is_current_stream_capturing() and optimizer.waiting.perturbed:
            raise RuntimeError("out of luck")
        return loss

    step = TrainStep(model, optimizer, loss_fn, capture=True)
    for batch in data[:3]:
        step(batch)
    before = weights_of(model)
    fails[0] = True
    with pytest.raises(RuntimeError):
        step(data[3])
    torch.testing.assert_close(weights_of(model), before, rtol=0.0, atol=0.0)
    fails[0] = False
    step(data[4])
    assert not torch.equal(weights_of(model)[0], before[0])


@pytest.mark.alone
@pytest.mark.parametrize("capture", [False, True])
def test_passes_overlap(capture):
    """Kernels of both passes run at the same time, on two streams."""
    torch.manual_seed(0)
    # Each kernel is long and leaves most of the GPU idle.
    model = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(4)), nn.Linear(4096, 3)).cuda()
    optimizer = named("SAMPa").make(model, SGD)
    step = TrainStep(model, optimizer, loss_of, passes="streams", capture=capture)
    batch = (torch.randn(8, 4096, device="cuda"), torch.randint(3, (8,), device="cuda"))
    for _ in range(6):
        step(batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            step(batch)
        torch.cuda.synchronize()
    events = [
        (e.start_ns(), e.start_ns() + e.duration_ns(), e.device_resource_id())
        for e in profile.profiler.kineto_results.events()
        if e.device_type() == torch.autograd.DeviceType.CUDA
    ]
    overlapping = sum(
        1 for a in events for b in events if a[2] != b[2] and a[0] < b[1] and b[0] < a[1] and a[0] <= b[0]
    )
    assert overlapping > 10, f"{overlapping} of {len(events)} kernels overlap"
