"""Exceptions and interrupts at any point of a step leave the weights as they were before it."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import signal

import pytest
import torch
from torch import nn

from sam_optim import SAM, Pass, SharpnessAwareOptimizer, StepOrderError

from .bases import KINDS
from .cases import assert_same, batches, by_every_pass_closure, loss_of, make_net, step_by_hand, weights_of
from .methods import make_sam


class _Boom(BaseException):
    """Not an Exception, as KeyboardInterrupt."""


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, _Boom])
def test_exceptions_in_a_pass_restore_the_weights(base, failing, error):
    model, optimizer = make_sam(base, closure_runs="every_pass", adaptive=True)
    data = batches(4)
    by_every_pass_closure(optimizer, model, data[0])
    before, state = weights_of(model), copy.deepcopy(optimizer.state_dict())
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = loss_of(model, data[1])
        if calls == failing:
            raise error("out of memory, say")
        loss.backward()
        return loss

    with pytest.raises(error):
        optimizer.step(closure)
    assert_same(weights_of(model), before)
    assert not optimizer.is_step_begun
    # And the run goes on as if the step had never begun.
    by_every_pass_closure(optimizer, model, data[2])
    other, fresh = make_sam(base, closure_runs="every_pass", adaptive=True)
    with torch.no_grad():
        for p, w in zip(other.parameters(), before, strict=True):
            p.copy_(w)
    fresh.load_state_dict(state)
    by_every_pass_closure(fresh, other, data[2])
    assert_same(weights_of(model), weights_of(other))


# An interrupt that strikes in a callback of the garbage collector (hypothesis has one) is reported and dropped.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_interrupts_at_any_moment(backend):
    """Signals strike between any two lines of Python; with lr 0 the weights must never be seen to move."""
    torch.set_num_threads(1)
    weights = [nn.Parameter(torch.randn(n)) for n in (5, 300, 40_000)]
    gradients = [torch.randn_like(w) for w in weights]
    before = [w.detach().clone() for w in weights]
    optimizer = SAM(weights, torch.optim.SGD, lr=0.0, momentum=0.9, closure_runs="every_pass", backend=backend)

    def closure():
        for w, g in zip(weights, gradients, strict=True):
            w.grad = g

    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    generator = random.Random(0)
    try:
        for _ in range(200):
            with pytest.raises(KeyboardInterrupt):
                # Python drops an interrupt that strikes in a destructor or a callback of the garbage collector.
                signal.setitimer(signal.ITIMER_REAL, generator.uniform(2e-4, 2e-3), 0.5)
                while True:
                    optimizer.step(closure)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert not optimizer.is_step_begun
            assert torch.is_grad_enabled()
            assert_same([w.detach() for w in weights], before)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        torch.set_grad_enabled(True)


@pytest.mark.parametrize("drive", ["hand", "closure"])
def test_an_interrupt_that_gets_stuck_in_no_grad(monkeypatch, drive):
    """What is left when a signal strikes after no_grad() was entered and before its block can leave it."""
    model, optimizer = make_sam()
    before = weights_of(model)
    batch = batches(1)[0]

    def ascent_(*args, **kwargs):
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt

    monkeypatch.setattr("sam_kernels.ascent_", ascent_)
    loss_of(model, batch).backward()
    try:
        with pytest.raises(KeyboardInterrupt):
            if drive == "hand":
                optimizer.first_step()
            else:
                optimizer.step(lambda: loss_of(model, batch).backward())
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    assert_same(weights_of(model), before)


def test_arguments_that_step_does_not_take():
    model, optimizer = make_sam()
    before = weights_of(model)
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'grad_scaler'"):
        optimizer.step(grad_scaler=None)
    assert_same(weights_of(model), before)
    assert not optimizer.is_step_begun


def test_restore_on_error_for_hand_driven_passes():
    model, optimizer = make_sam()
    before = weights_of(model)
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(KeyboardInterrupt), optimizer.restore_on_error():
        raise KeyboardInterrupt
    assert_same(weights_of(model), before)
    optimizer.restore()
    assert_same(weights_of(model), before)


def assert_same_state(state, wanted):
    assert list(state) == list(wanted)
    assert_same(list(state.values()), list(wanted.values()))


@pytest.mark.parametrize("settings", [{}, {"master_weights": True}], ids=str)
def test_a_checkpoint_in_the_middle_of_a_step_holds_the_weights(settings):
    dtype = torch.bfloat16 if settings else torch.float64
    model = nn.Sequential(make_net(dtype, batch_norm=True))
    tied = nn.Module()
    tied.net, tied.same = model, model[0].layers[0]
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=5.0, lr=0.1, **settings)
    handle = optimizer.watch(tied)
    batch = batches(1, dtype)[0]
    before = copy.deepcopy(tied.state_dict())
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    perturbed = weights_of(model)
    found = tied.state_dict()
    for name, entry in before.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(found[name], entry)
            assert found[name].dtype == entry.dtype
    assert_same(weights_of(model), perturbed)
    assert not torch.equal(
        model.state_dict()["0.layers.0.weight"], before["net.0.layers.0.weight"]
    )  # nobody watches it
    # The step goes on as if nobody had looked, and between steps the entries are what they are in any module.
    loss_of(model, batch).backward()
    optimizer.second_step(zero_grad=True)
    assert_same_state(
        tied.state_dict(), {**tied.state_dict(), **{f"net.{k}": v for k, v in model.state_dict().items()}}
    )
    assert tied.state_dict(keep_vars=True)["net.0.layers.0.weight"] is model[0].layers[0].weight
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    handle.remove()
    assert_same_state(
        tied.state_dict(), {**tied.state_dict(), **{f"net.{k}": v for k, v in model.state_dict().items()}}
    )


def test_a_watched_model_can_be_copied_and_pickled():
    model, optimizer = make_sam()
    optimizer.watch(model)
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        # It belongs to no optimizer, and has what it was given.
        assert_same(list(other.state_dict().values()), weights_of(model))
    assert not torch.equal(model.state_dict()["layers.0.weight"], model.layers[0].weight)
    del optimizer
    gc.collect()
    assert torch.equal(model.state_dict()["layers.0.weight"], model.layers[0].weight)


def test_a_checkpoint_in_the_handler_of_an_exception():
    """The loop that everybody writes, with the one line that makes its handler right."""
    model, optimizer = make_sam()
    optimizer.watch(model)
    before = {name: entry.clone() for name, entry in model.state_dict().items()}
    try:
        loss_of(model, batches(1)[0]).backward()
        optimizer.first_step(zero_grad=True)
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert_same_state(model.state_dict(), before)


class _FailingBase(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        raise RuntimeError("base failed")


def test_a_failing_base_leaves_the_weights():
    model = make_net()
    optimizer = SAM(model.parameters(), _FailingBase, lr=0.1)
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="base failed"):
        step_by_hand(optimizer, model, batches(1)[0])
    assert_same(weights_of(model), before)
    assert not optimizer.is_step_begun


def test_a_gradient_that_no_kernel_takes_leaves_the_weights():
    embedding = nn.Embedding(5, 3, sparse=True)
    dense = nn.Linear(3, 1)
    model = nn.Sequential(embedding, dense)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before = weights_of(model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.first_step()
    assert_same(weights_of(model), before)
    # Sparse in the second pass only.
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.first_step(zero_grad=True)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.second_step()
    assert_same(weights_of(model), before)


def test_a_loop_that_was_left_does_not_disturb_a_later_step():
    model, optimizer = make_sam()
    batch = batches(1)[0]
    left = optimizer.each_pass()
    next(left)
    optimizer.restore()
    loss_of(model, batch).backward()
    optimizer.first_step()
    perturbed = weights_of(model)
    left.close()
    assert optimizer.is_step_begun
    assert_same(weights_of(model), perturbed)
    with pytest.raises(StepOrderError, match="each_pass\\(\\) was called although"):
        next(optimizer.each_pass())


def test_passes_closed_early_run_their_clean_up():
    closed = []

    class Method(SharpnessAwareOptimizer):
        def passes(self):
            try:
                yield Pass()
                yield Pass(perturbed=True)
            finally:
                closed.append(True)

    parameter = nn.Parameter(torch.ones(1))
    optimizer = Method([parameter], torch.optim.SGD, {}, lr=0.1)
    parameter.grad = torch.ones(1)
    optimizer.advance()
    optimizer.restore()
    assert closed == [True]


@pytest.mark.parametrize("backend", [None, "foreach", "reference"])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_model_that_is_converted_in_the_middle_of_a_step(backend, swap, adaptive):
    model = make_net(torch.float32)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, adaptive=adaptive, backend=backend)
    batch, wide = batches(1, torch.float32)[0], batches(1)[0]
    step_by_hand(optimizer, model, batch)
    before = [w.double() for w in weights_of(model)]
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    loss_of(model, wide).backward()
    with pytest.raises(RuntimeError, match="convert or move the model between steps"):
        optimizer.second_step()
    assert not optimizer.is_step_begun
    assert_same(weights_of(model), before)
    step_by_hand(optimizer, model, wide)
    assert not torch.equal(weights_of(model)[0], before[0])
