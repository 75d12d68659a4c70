"""MGSER-SAM: a closed form, reductions, drivers and state. Its formula is in methods.py."""

from __future__ import annotations

import copy

import pytest
import torch

from sam_optim import MGSERSAM, InvalidSettingError, StepOrderError, TrainStep
from sam_optim.training.streams import OneLane

from .bases import KINDS, PLAIN_SGD, SGD
from .cases import assert_same, batches, loss_of, make_net, memory_loss, weights_of
from .methods import named
from .stand_ins import Replayed, Reversed

METHOD = named("MGSERSAM")


def pairs(count):
    """Batches and, of another size, batches from memory."""
    return list(zip(batches(count), batches(2 * count, size=5)[count:], strict=True))


def by_passes(optimizer, model, batch, memory_batch):
    for p in optimizer.each_pass():
        if p.data == "train":
            loss_of(model, batch).backward()
        elif memory_batch is not None:
            memory_loss(model, memory_batch).backward()


def by_closures(optimizer, model, batch, memory_batch):
    def closure_of(loss, own):
        def closure():
            optimizer.zero_grad()
            value = loss(model, own)
            value.backward()
            return value

        return closure

    memory_closure = None if memory_batch is None else closure_of(memory_loss, memory_batch)
    return optimizer.step(closure_of(loss_of, batch), memory_closure=memory_closure)


def by_train_step(optimizer, model, batch, memory_batch):
    return TrainStep(model, optimizer, loss_of, memory_loss=memory_loss)(batch, memory_batch=memory_batch)


DRIVERS = [by_passes, by_closures, by_train_step]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_closed_form(backend):
    """L_t = 1/2 (w - a)' A (w - a), L_s = 1/2 (w - b)' B (w - b); plain SGD."""
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    curvature, other = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    start, rho, mu, lr = torch.tensor([0.5, -0.5], dtype=torch.float64), 0.2, 1.0, 0.1
    w = start.clone().requires_grad_()
    optimizer = MGSERSAM([w], torch.optim.SGD, rho, mu, lr=lr, backend=backend)
    for p in optimizer.each_pass():
        loss = curvature * (w - a) ** 2 if p.data == "train" else other * (w - b) ** 2
        (0.5 * loss).sum().backward()
    g_m = other * (start - b)
    g = curvature * (start - a) + g_m
    moved = start + rho * g / g.norm()
    wanted = start - lr * (curvature * (moved - a) + other * (moved - b) + mu * g_m)
    torch.testing.assert_close(w.detach(), wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("driver", DRIVERS)
def test_an_empty_memory_is_sam(base, driver):
    """Bit for bit, in the weights and in the base optimizer's state."""
    results = []
    for method, run in ((METHOD, driver), (named("SAM"), None)):
        model = make_net()
        optimizer = method.make(model, base)
        for batch in batches(4):
            if run is not None:
                run(optimizer, model, batch, None)
            else:
                for _ in optimizer.each_pass():
                    loss_of(model, batch).backward()
        state = [v for entries in optimizer.state.values() for v in entries.values() if isinstance(v, torch.Tensor)]
        results.append([*weights_of(model), *state])
    assert_same(*results)


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("driver", DRIVERS)
def test_without_rho_and_mu_it_is_replay(base, driver):
    """The plain base optimizer on L_t + L_s, bit for bit: DER++ if L_s is that of DER++."""
    model, wanted = make_net(), make_net()
    optimizer = METHOD.make(model, base, rho=0.0, mu=0.0)
    plain = base.cls(wanted.parameters(), **copy.deepcopy(base.settings))
    for batch, memory_batch in pairs(5):
        driver(optimizer, model, batch, memory_batch)
        plain.zero_grad()
        loss_of(wanted, batch).backward()
        memory_loss(wanted, memory_batch).backward()
        plain.step()
        assert_same(weights_of(model), weights_of(wanted))


def test_however_it_is_driven():
    results = []
    for driver in DRIVERS:
        model = make_net()
        optimizer = METHOD.make(model, SGD)
        for number, (batch, memory_batch) in enumerate(pairs(5)):
            driver(optimizer, model, batch, memory_batch if number > 1 else None)
        results.append(weights_of(model))
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("lanes", [OneLane, Reversed])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_side_by_side(monkeypatch, lanes, batch_norm):
    """The passes on batch and memory; with running statistics, which both update, in their order."""
    monkeypatch.setattr(TrainStep, "_make_lanes", lambda self: lanes())
    results = []
    for passes in ("streams", "sequential"):
        model = make_net(batch_norm=batch_norm)
        optimizer = METHOD.make(model, SGD)
        step = TrainStep(model, optimizer, loss_of, memory_loss=memory_loss, passes=passes)
        for number, (batch, memory_batch) in enumerate(pairs(4)):
            step(batch, memory_batch=memory_batch if number > 0 else None)
        results.append([*weights_of(model), *(b.clone() for b in model.buffers())])
    assert_same(*results)


def test_captured(monkeypatch):
    """A graph for steps with an empty memory, one for the others."""
    recorder = Replayed()
    monkeypatch.setattr(TrainStep, "_make_recorder", lambda self: recorder)
    results = []
    for capture in (False, True):
        model = make_net()
        optimizer = METHOD.make(model, SGD)
        step = TrainStep(model, optimizer, loss_of, memory_loss=memory_loss, capture=capture)
        for number, (batch, memory_batch) in enumerate(pairs(9)):
            step(batch, memory_batch=memory_batch if number > 5 else None)
        results.append(weights_of(model))
    assert recorder.recorded == 2
    assert_same(*results)


def test_running_statistics_learn_from_batch_and_memory_once():
    model = make_net(batch_norm=True)
    step = TrainStep(model, METHOD.make(model, SGD), loss_of, memory_loss=memory_loss)
    seen = []
    model.layers[0].register_forward_hook(lambda module, args, out: seen.append(out.detach().mean(0)))
    for batch, memory_batch in pairs(1):
        step(batch, memory_batch=memory_batch)
    norm = model.layers[1]
    assert norm.num_batches_tracked == 2 and len(seen) == 4
    torch.testing.assert_close(norm.running_mean, 0.9 * (0.1 * seen[0]) + 0.1 * seen[1])


def test_dropout_draws_alike_in_the_passes_of_one_batch():
    model = make_net(dropout=0.5)
    seen = []
    model.layers[2].register_forward_hook(lambda module, args, out: seen.append(out == 0))
    step = TrainStep(model, METHOD.make(model, SGD), loss_of, memory_loss=memory_loss)
    for batch, memory_batch in pairs(1):
        step(batch, memory_batch=memory_batch)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


@pytest.mark.parametrize("options", [{"micro_batches": 2}, {"max_grad_norm": 0.1}], ids=str)
def test_options_of_the_driver(options):
    """Micro-batches make the step of the whole batch; a clipped update has the norm that was asked for."""
    model, whole = make_net(), make_net()
    step = TrainStep(model, METHOD.make(model, PLAIN_SGD), loss_of, memory_loss=memory_loss, **options)
    other = TrainStep(whole, METHOD.make(whole, PLAIN_SGD), loss_of, memory_loss=memory_loss)
    before = torch.cat([w.reshape(-1) for w in weights_of(model)])
    [(batch, memory_batch)] = pairs(1)
    step(batch, memory_batch=memory_batch)
    other(batch, memory_batch=memory_batch)
    if "micro_batches" in options:
        for a, b in zip(weights_of(model), weights_of(whole), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    else:
        moved = torch.cat([w.reshape(-1) for w in weights_of(model)]) - before
        assert moved.norm().item() == pytest.approx(0.05 * 0.1, rel=1e-4)


def test_exceptions_leave_everything_as_it_was():
    for failing in range(4):
        model = make_net(batch_norm=True)
        calls = []

        def loss(model, batch, calls=calls, failing=failing):
            calls.append(None)
            if len(calls) - 1 == failing:
                raise KeyError("in a pass")
            return loss_of(model, batch)

        step = TrainStep(model, METHOD.make(model, SGD), loss)
        before = [*weights_of(model), *(b.clone() for b in model.buffers())]
        [(batch, memory_batch)] = pairs(1)
        with pytest.raises(KeyError):
            step(batch, memory_batch=memory_batch)
        assert_same([*weights_of(model), *(b.clone() for b in model.buffers())], before)


def test_what_is_refused():
    model = make_net(torch.float32)
    with pytest.raises(InvalidSettingError, match="mu"):
        MGSERSAM(model.parameters(), torch.optim.SGD, mu=-1.0, lr=0.1)
    optimizer = MGSERSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(InvalidSettingError, match="GradScaler"):
        TrainStep(model, optimizer, loss_of, scaler=torch.amp.GradScaler("cpu"))
    # The training pass must leave gradients; only that on the memory may be empty.
    with pytest.raises(StepOrderError, match="no parameter has a gradient"):
        for _ in optimizer.each_pass():
            pass
