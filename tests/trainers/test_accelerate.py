"""Hugging Face's accelerate, whose wrapper shows nothing of an optimizer but step() and zero_grad()."""

from __future__ import annotations

import pytest
import torch

from sam_optim import StepOrderError

from ..optim.bases import SGD
from ..optim.cases import assert_same, batches, loss_of, make_net, weights_of
from ..optim.methods import named

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
METHODS = [named("SAM"), named("GSAM"), named("AgnosticSAM")]


@pytest.fixture
def make_accelerator():
    """Accelerators of one process on the CPU; each forgets what the one before has made of the process."""
    from accelerate.state import AcceleratorState, GradientState

    def make(**options):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return accelerate.Accelerator(cpu=True, **options)

    yield make
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def by_hand(method, clip=None):
    model = make_net()
    optimizer = method.make(model, SGD)
    for batch, other in zip(batches(5), batches(5, size=5), strict=True):
        for p in optimizer.each_pass():
            loss_of(model, batch if p.data == "train" else other).backward()
            if p.last and clip:
                optimizer.combine_gradients()
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    return weights_of(model)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_each_pass_through_the_wrapper(make_accelerator, method, clip):
    accelerator = make_accelerator()
    model = make_net()
    model, optimizer = accelerator.prepare(model, method.make(model, SGD))
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    for batch, other in zip(batches(5), batches(5, size=5), strict=True):
        for p in optimizer.optimizer.each_pass(step=optimizer.step):
            accelerator.backward(loss_of(model, batch if p.data == "train" else other))
            if p.last and clip:
                optimizer.optimizer.combine_gradients()
                accelerator.clip_grad_norm_(model.parameters(), clip)
        scheduler.step()
    assert_same(weights_of(model), by_hand(method, clip))


def test_a_step_that_the_wrapper_skips_restores_and_says_so(make_accelerator):
    """Within accumulate() the wrapper makes the last micro-batch's step alone."""
    accelerator = make_accelerator(gradient_accumulation_steps=2)
    model = make_net()
    model, optimizer = accelerator.prepare(model, METHODS[0].make(model, SGD))
    before = weights_of(model)
    with pytest.raises(StepOrderError, match="run all of them in each pass"), accelerator.accumulate(model):
        for _ in optimizer.optimizer.each_pass(step=optimizer.step):
            accelerator.backward(loss_of(model, batches(1)[0]))
    assert_same(weights_of(model), before)


def test_first_step_and_the_wrappers_own_step(make_accelerator):
    accelerator = make_accelerator()
    model = make_net()
    model, optimizer = accelerator.prepare(model, METHODS[0].make(model, SGD))
    for batch in batches(5):
        accelerator.backward(loss_of(model, batch))
        optimizer.optimizer.first_step(zero_grad=True)
        accelerator.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    assert_same(weights_of(model), by_hand(METHODS[0]))


def test_grad_scaler_of_the_wrapper(make_accelerator):
    """float16: the scaler's update goes through the wrapper, which learns of skipped steps."""
    accelerator = make_accelerator()
    model = make_net(torch.float32)
    optimizer = METHODS[0].make(model, SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    accelerator.scaler = scaler
    prepared = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
    skipped = []
    for batch in batches(40, torch.float32):
        before = weights_of(model)
        for _ in optimizer.each_pass(step=prepared.step):
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
        skipped.append(not optimizer.last_step.updated)
        if skipped[-1]:
            assert_same(weights_of(model), before)
    assert skipped[0] and not skipped[-1]


def test_grad_scaler_is_refused_before_the_first_pass(make_accelerator):
    make_accelerator()
    model = make_net(torch.float32)
    optimizer = named("FriendlySAM").make(model, SGD)
    prepared = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(StepOrderError, match="cannot be used with GradScaler"):
        next(optimizer.each_pass(step=prepared.step))
    assert not optimizer.is_step_begun
    prepared = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False))
    for _ in optimizer.each_pass(step=prepared.step):
        loss_of(model, batches(1, torch.float32)[0]).backward()
    assert optimizer.last_step.updated


def test_state_survives_a_checkpoint(make_accelerator, tmp_path):
    results = []
    for stop in (False, True):
        accelerator = make_accelerator()
        model = make_net()
        model, optimizer = accelerator.prepare(model, METHODS[0].make(model, SGD))
        for number, batch in enumerate(batches(6)):
            if number == 3 and stop:
                accelerator.save_state(str(tmp_path), safe_serialization=False)
                accelerator = make_accelerator()
                model = make_net()
                model, optimizer = accelerator.prepare(model, METHODS[0].make(model, SGD))
                accelerator.load_state(str(tmp_path))
            for _ in optimizer.optimizer.each_pass(step=optimizer.step):
                accelerator.backward(loss_of(model, batch))
        results.append(weights_of(model))
    assert_same(*results)
