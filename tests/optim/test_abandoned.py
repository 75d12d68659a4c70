"""A step after one that was abandoned is a fresh one: nothing of the given-up passes is in its gradients."""

from __future__ import annotations

import warnings
from contextlib import suppress

import pytest
import torch

from sam_optim import TrainStep
from sam_optim.trainers.micro_batches import MicroBatch, MicroBatchPasses

from .bases import SGD
from .cases import assert_same, batches, loss_of, make_net, weights_of
from .methods import METHODS, named


class Stop(BaseException):
    """Not an Exception, as KeyboardInterrupt."""


class Passes:
    """Makes the backward passes of steps, and raises after one of them."""

    def __init__(self, model):
        self.model, self.left = model, None
        self.others = batches(4, size=5)

    def backward(self, batch, p=None):
        data = "train" if p is None else p.data
        own = {"train": batch, "previous": batches(1)[0], "validation": self.others[0], "memory": self.others[1]}
        loss_of(self.model, own[data]).backward()
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.left = None
                raise Stop


def each_pass(optimizer, passes, batch):
    for p in optimizer.each_pass():
        passes.backward(batch, p)


def each_pass_left_by_break(optimizer, passes, batch):
    for p in optimizer.each_pass():
        try:
            passes.backward(batch, p)
        except Stop:
            break


def every_pass_closure(optimizer, passes, batch):
    def closure_of(data):
        p = type("P", (), {"data": data})
        return lambda: passes.backward(batch, p)

    closures = [closure_of(data) for data in ("train", "validation", "previous")]
    optimizer.step(*closures, memory_closure=closure_of("memory"), closure_runs="every_pass")


def second_pass_closure(optimizer, passes, batch):
    passes.backward(batch)
    optimizer.step(lambda: passes.backward(batch), closure_runs="second_pass")
    optimizer.zero_grad()


def by_hand_and_restored(optimizer, passes, batch):
    passes.backward(batch)
    optimizer.first_step(zero_grad=True)
    try:
        passes.backward(batch)
    except Stop:
        optimizer.restore()
        raise
    optimizer.second_step(zero_grad=True)


def by_hand_within_restore_on_error(optimizer, passes, batch):
    with optimizer.restore_on_error():
        passes.backward(batch)
        optimizer.first_step(zero_grad=True)
        passes.backward(batch)
        optimizer.second_step(zero_grad=True)


def begun_and_advanced(optimizer, passes, batch):
    waiting = optimizer.begin()
    while waiting is not None:
        try:
            passes.backward(batch, waiting)
        except Stop:
            optimizer.restore()
            raise
        waiting = optimizer.advance(zero_grad=True)


class Windows(MicroBatchPasses):
    """A trainer of windows of two micro-batches."""

    def step(self, optimizer, passes, batch):
        parts = list(zip(*(column.chunk(2) for column in batch), strict=True))
        for number, part in enumerate(parts):
            self._take(optimizer, MicroBatch(part), lambda m: passes.backward(m.inputs), lambda n=number: n == 1)
        optimizer.step()
        optimizer.zero_grad()


_windows = Windows()


def windows(optimizer, passes, batch):
    _windows.step(optimizer, passes, batch)


def train_step(optimizer, passes, batch):
    """A hook raises when the last gradient of the backward pass has been accumulated."""
    first = next(passes.model.parameters())

    def count(param):
        if passes.left is not None:
            passes.left -= 1
            if passes.left == 0:
                passes.left = None
                raise Stop

    handle = first.register_post_accumulate_grad_hook(count)
    try:
        step = TrainStep(passes.model, optimizer, loss_of)
        step(batch, passes.others[0], previous_batch=batches(1)[0], memory_batch=passes.others[1])
    finally:
        handle.remove()


ALL = [each_pass, each_pass_left_by_break, every_pass_closure, begun_and_advanced, train_step]
BY_HAND = [second_pass_closure, by_hand_and_restored, by_hand_within_restore_on_error, windows]


def train(method, drive, abandoned):
    """Three steps; before the second and the third one that is abandoned after so many backward passes."""
    model = make_net()
    optimizer, passes = method.make(model, SGD), Passes(model)
    for number, batch in enumerate(batches(3)):
        if abandoned and number > 0:
            before = weights_of(model)
            passes.left = abandoned
            with suppress(Stop), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "each_pass\\(\\) was left")
                drive(optimizer, passes, batches(5)[4])
            assert passes.left is None
            assert_same(weights_of(model), before)
            assert not optimizer.is_step_begun
        drive(optimizer, passes, batch)
    return weights_of(model)


@pytest.mark.parametrize("drive", ALL)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_in_the_first_pass(method, drive):
    assert_same(train(method, drive, 1), train(method, drive, 0))


@pytest.mark.parametrize("drive", [*ALL, *BY_HAND])
@pytest.mark.parametrize("method", [named("SAM"), named("GSAM")], ids=str)
def test_in_the_second_pass(method, drive):
    assert_same(train(method, drive, 2), train(method, drive, 0))


@pytest.mark.parametrize("abandoned", [2, 3, 4])
@pytest.mark.parametrize("name", ["CRSAM", "SAMPa", "MGSERSAM", "AgnosticSAM"])
def test_in_a_later_pass(name, abandoned):
    if abandoned <= {"CRSAM": 3, "SAMPa": 2}.get(name, 4):
        assert_same(train(named(name), each_pass, abandoned), train(named(name), each_pass, 0))


@pytest.mark.parametrize("drive", [by_hand_within_restore_on_error, windows])
def test_in_the_first_pass_by_hand(drive):
    assert_same(train(named("SAM"), drive, 1), train(named("SAM"), drive, 0))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_closures_that_clear_nothing(method):
    """Nor does anybody else: the last gradient of a step must not be in the next one."""

    def clearing(optimizer, passes, batch):
        optimizer.zero_grad()
        every_pass_closure(optimizer, passes, batch)
        optimizer.zero_grad()

    assert_same(train(method, every_pass_closure, 0), train(method, clearing, 0))
    assert_same(train(method, every_pass_closure, 0), train(method, each_pass, 0))


def test_steps_that_make_no_pass_and_batches_that_are_missing_leave_nothing_behind():
    """A memory that is empty leaves its pass without a gradient, whatever the pass before has left."""
    results = []
    for clears in (False, True):
        model = make_net()
        optimizer = named("MGSERSAM").make(model, SGD)
        for batch in batches(3):
            optimizer.step(lambda model=model, batch=batch: loss_of(model, batch).backward())
            if clears:
                optimizer.zero_grad()
        results.append(weights_of(model))
    assert_same(*results)


def test_gradients_of_other_parameters_stay():
    model, other = make_net(), torch.nn.Parameter(torch.ones(2))
    optimizer = named("MomentumSAM").make(model, SGD)
    other.grad = torch.ones(2)
    optimizer.step(lambda: loss_of(model, batches(1)[0]).backward())
    assert torch.equal(other.grad, torch.ones(2))


def test_a_gradient_that_is_there_before_the_passes_is_cleared():
    """It would be in the first pass alone, which no method means."""
    model, fresh = make_net(), make_net()
    for net, left in ((model, True), (fresh, False)):
        optimizer = named("AgnosticSAM").make(net, SGD)
        if left:
            loss_of(net, batches(2)[1]).backward()
        each_pass(optimizer, Passes(net), batches(1)[0])
    assert_same(weights_of(model), weights_of(fresh))
