"""What only a GPU can show: launches, streams, graphs, large tensors, no waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import sam_kernels as sk
from sam_kernels import cuda, triton
from sam_kernels.registry import backend_for
from sam_optim import SAM, AgnosticSAM

from ..on_gpu import kernels_of, no_waiting
from .cases import ALL_FORMS, Problem, poisoned_snapshot, same_bits

pytestmark = pytest.mark.gpu

SIZES = [1, 3, 700, 16384, 16385, 300_000, 2_000_001]


@pytest.fixture(autouse=True, params=["cuda", "triton"])
def backend(request, monkeypatch):
    """Both backends in turn, as users have them, chosen as a user can choose."""
    monkeypatch.setenv("SAM_KERNELS_BACKEND", request.param)
    module = {"cuda": cuda, "triton": triton}[request.param]
    assert module.backend.unavailable_reason() is None, module.backend.unavailable_reason()
    monkeypatch.setattr(module.backend, "tuning", module.Tuning())
    return module.backend


def all_on_gpu(**arguments):
    return Problem.random(SIZES, **arguments).to("cuda")


def test_order_of_preference(monkeypatch):
    monkeypatch.delenv("SAM_KERNELS_BACKEND")
    assert sk.backends()["cuda"].available, sk.backends()["cuda"].detail
    assert backend_for(torch.device("cuda")).name == "cuda"
    assert sk.gram([[torch.ones(5, device="cuda")]]).device.type == "cuda"


def test_norm_has_the_same_bits_for_every_grid_and_on_every_run(backend):
    problem = all_on_gpu(lists=2, adaptive=True)
    plan = problem.plan()
    wanted = None
    name = "blocks_per_multiprocessor" if backend.name == "cuda" else "programs_per_multiprocessor"
    for one_launch in (True, False):
        for blocks in (1, 2):
            backend.tuning = replace(backend.tuning, one_launch=one_launch, **{name: blocks})
            for _ in range(20):
                snapshot = sk.Snapshot(plan)
                report = sk.ascent_(plan, problem.xs, scale=0.1, snapshot=snapshot)
                gram = report.gram.clone()
                sk.restore_(plan, snapshot)
                wanted = gram if wanted is None else wanted
                assert same_bits(gram.cpu(), wanted.cpu())


@pytest.mark.parametrize(("base", "settings"), ALL_FORMS, ids=str)
def test_same_bits_as_the_cpu_backend(base, settings):
    """The formulas are the same and nothing is contracted, so only the order of sums differs; here there are none."""
    on_cpu = Problem.random(SIZES, adaptive=True, lists=2)
    on_gpu = on_cpu.to("cuda")
    on_gpu.steps = [s.cpu() for s in on_gpu.steps]
    for own in (on_cpu, on_gpu):
        plan = own.plan()
        snapshot = poisoned_snapshot(plan)
        sk.perturb_(plan, own.xs, [0.3, -0.1], snapshot=snapshot)
        sk.descent_(plan, own.xs, own.base(base, settings), snapshot=snapshot)
    for a, b in zip(on_gpu.tensors(), on_cpu.tensors(), strict=True):
        assert same_bits(a.cpu(), b)


def model_and_optimizer(base=torch.optim.SGD, method=SAM, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(40))).cuda()
    settings = {"lr": 0.01, **({"momentum": 0.9} if base is torch.optim.SGD else {}), **settings}
    optimizer = method(model.parameters(), base, **settings)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for _ in range(2):  # state is made
        optimizer.first_step()
        optimizer.second_step()
    return model, optimizer


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("one_launch", [True, False])
def test_launches_of_a_sam_step(backend, base, one_launch):
    backend.tuning = replace(backend.tuning, one_launch=one_launch)
    _, optimizer = model_and_optimizer(base)

    def step():
        optimizer.first_step()
        optimizer.second_step()

    step()
    names = [name for name in kernels_of(step) if "memcpy" not in name.lower()]  # a Triton table that changed
    assert len(names) == (2 if one_launch else 3), names


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_triton_table_is_copied_only_if_it_changed(backend):
    model, optimizer = model_and_optimizer()

    def step():
        optimizer.first_step()
        optimizer.second_step()

    step()
    assert len(kernels_of(step)) == 3
    for p in model.parameters():
        p.grad = p.grad.clone()
    assert len(kernels_of(step)) == 5


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.Adam, {"capturable": True}),
    ],
)
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_step_does_not_wait_for_the_gpu(base, settings, adaptive):
    _, optimizer = model_and_optimizer(base, adaptive=adaptive, **settings)
    with no_waiting():
        for _ in range(3):
            optimizer.first_step()
            optimizer.second_step()
        report = optimizer.last_step
    assert report.updated
    assert report.ascent.norms.item() > 0


def test_a_rule_of_the_users_own_does_not_wait():
    problem = all_on_gpu(lists=2)
    plan = problem.plan()
    snapshot = sk.Snapshot(plan)
    base = problem.adam()
    with no_waiting():
        sk.ascent_(plan, problem.xs, rule=lambda gram: gram.diagonal().rsqrt(), snapshot=snapshot)
        sk.descent_(plan, problem.xs, base, rule=lambda gram: gram.diagonal().rsqrt(), snapshot=snapshot)


@pytest.mark.parametrize("settings", [{}, {"fused": True}])
def test_grad_scaler(settings):
    """An overflow skips the update and restores the weights; with fused=True without waiting for the GPU."""
    model, optimizer = model_and_optimizer(torch.optim.AdamW, **settings)
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cuda", init_scale=16.0)
    for overflow in (True, False):
        for first in (True, False):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(8, 64, device="cuda")).square().mean()).backward()
            if first:
                optimizer.first_step()
        if overflow:
            next(model.parameters()).grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.last_step.updated != overflow
        unchanged = all(same_bits(p.detach().cpu(), b.cpu()) for p, b in zip(model.parameters(), before, strict=True))
        assert unchanged == overflow


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_captured_training_step(base):
    """Forward, backward and optimizer in one graph; lr and rho are tensors on the device, changed between replays."""
    settings = {"capturable": True} if base is torch.optim.AdamW else {}
    results = []
    for captured in (False, True):
        lr, rho = torch.tensor(0.01, device="cuda"), torch.tensor(0.05, device="cuda")
        model, optimizer = model_and_optimizer(base, lr=lr, rho=rho, **settings)
        x = torch.randn(16, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(1))

        def step(model=model, optimizer=optimizer, x=x):
            for move in (optimizer.first_step, optimizer.second_step):
                optimizer.zero_grad(set_to_none=False)
                model(x).square().mean().backward()
                move()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        make_step = step
        if captured:
            # Capturing records a step without making it.
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            make_step = graph.replay
        for number in range(4):
            lr.fill_(0.01 * (number + 1))
            rho.fill_(0.1 * number)
            make_step()
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_replays_make_the_steps_that_eager_calls_make():
    steps = []
    for captured in (False, True):
        lr, rho = torch.tensor(0.01, device="cuda"), torch.tensor(0.05, device="cuda")
        problem = all_on_gpu(group_count=1)
        plan = problem.plan()
        snapshot = sk.Snapshot(plan)
        base = problem.adam(lr=lr)

        def step(plan=plan, problem=problem, snapshot=snapshot, base=base, rho=rho):
            sk.ascent_(plan, problem.xs, scale=[[rho]], snapshot=snapshot)
            sk.descent_(plan, problem.xs, base, snapshot=snapshot)

        step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                step()
        for number in range(3):
            lr.fill_(0.01 * (number + 1))
            rho.fill_(0.1 * number)
            if captured:
                graph.replay()
            else:
                step()
        steps.append([t.clone() for t in problem.tensors()])
    for a, b in zip(*steps, strict=True):
        assert same_bits(a.cpu(), b.cpu())


def test_a_capture_that_would_repeat_a_first_step_is_refused():
    weight = nn.Parameter(torch.ones(4, device="cuda"))
    weight.grad = torch.ones_like(weight)
    optimizer = SAM([weight], torch.optim.AdamW, lr=0.1)
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.first_step()
        optimizer.second_step()


@pytest.mark.alone
def test_more_than_two_billion_elements():
    count = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    weight = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    gradient = torch.zeros_like(weight)
    gradient[-3:] = torch.tensor([3.0, 0.0, 4.0], dtype=torch.bfloat16)
    plan = sk.Plan([weight])
    snapshot = sk.Snapshot(plan)
    report = sk.ascent_(plan, [[gradient]], scale=5.0, snapshot=snapshot)
    assert report.norms.tolist() == [5.0]
    assert weight[-3:].tolist() == [3.0, 0.0, 4.0]
    assert weight[: 2**31].any().item() is False
    sk.descent_(plan, [[gradient]], sk.SGD([sk.SGDSettings(1.0)], [], bytearray(1)), snapshot=snapshot)
    assert weight[-3:].tolist() == [-3.0, 0.0, -4.0]


@pytest.mark.alone
@pytest.mark.slow
def test_cooperative_launches_on_two_streams_do_not_deadlock(backend):
    backend.tuning = replace(backend.tuning, one_launch=True)
    streams = [torch.cuda.Stream() for _ in range(2)]
    problems = [all_on_gpu() for _ in streams]
    plans = [p.plan() for p in problems]
    snapshots = [sk.Snapshot(plan) for plan in plans]
    torch.cuda.synchronize()
    for _ in range(10_000):
        for stream, problem, plan, snapshot in zip(streams, problems, plans, snapshots, strict=True):
            with torch.cuda.stream(stream):
                sk.ascent_(plan, problem.xs, scale=0.1, snapshot=snapshot)
    torch.cuda.synchronize()
    for plan, snapshot, problem in zip(plans, snapshots, problems, strict=True):
        perturbed = [p.clone() for p in problem.params]
        sk.restore_(plan, snapshot)
        sk.ascent_(plan, problem.xs, scale=0.1, snapshot=snapshot)
        assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(problem.params, perturbed, strict=True))


def test_launches_go_to_the_callers_stream():
    """Work queued before on the same stream is waited for, and work on the default stream is not."""
    weight = torch.ones(1000, device="cuda")
    gradient = torch.zeros_like(weight)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        gradient.fill_(1.0)
        sk.perturb_([weight], [[gradient]], [1.0])
    assert weight.sum().item() in (1000.0, 2000.0)
    stream.synchronize()
    assert weight.sum().item() == 2000.0


def test_version_counters_rise():
    weight = torch.ones(10, device="cuda")
    version = weight._version
    sk.perturb_([weight], [[torch.ones_like(weight)]], [1.0])
    assert weight._version > version


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_parameters_on_two_gpus():
    on_cpu = Problem.random(SIZES)
    devices = [f"cuda:{i % 2}" for i in range(len(SIZES))]
    on_gpus = on_cpu.copy()
    for column in (on_gpus.params, *on_gpus.xs, *on_gpus.states, on_gpus.steps):
        column[:] = [t.to(device) for t, device in zip(column, devices, strict=True)]
    for own in (on_cpu, on_gpus):
        plan = own.plan()
        snapshot = sk.Snapshot(plan)
        sk.ascent_(plan, own.xs, scale=0.3, snapshot=snapshot)
        sk.descent_(plan, own.xs, own.adam(), snapshot=snapshot)
    for a, b in zip(on_gpus.tensors(), on_cpu.tensors(), strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_agnostic_sam_trains():
    model, optimizer = model_and_optimizer(method=SAM)
    optimizer = AgnosticSAM(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    batches = {"train": torch.randn(32, 64, device="cuda"), "validation": torch.randn(32, 64, device="cuda")}
    losses = []
    for _ in range(20):
        for p in optimizer.each_pass():
            loss = model(batches[p.data]).square().mean()
            loss.backward()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
