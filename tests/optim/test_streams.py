"""Passes that run side by side: the same steps as one after the other. Here without streams, in several orders."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sam_optim import AgnosticSAM, InvalidSettingError, Pass, SAMPa, SharpnessAwareOptimizer, TrainStep, Update
from sam_optim.training.streams import OneLane

from .bases import ADAMW, FUSED, SGD, UNFUSED
from .cases import assert_same, batches, loss_of, make_net, weights_of
from .drivers import data_of_steps
from .methods import ALL_SETTINGS, methods_with, named
from .stand_ins import Reversed

IN_PARALLEL = methods_with(ALL_SETTINGS, yields_passes_together=True)
AGNOSTIC, SAMPA = named("AgnosticSAM"), named("SAMPa")


@pytest.fixture(params=[OneLane, Reversed], ids=["in order", "reversed"])
def lanes(request, monkeypatch):
    """TrainStep(passes="streams") on the CPU."""
    monkeypatch.setattr(TrainStep, "_make_lanes", lambda self: request.param())
    return request.param


def train(method, base, passes, model=None, steps=5, loss_fn=loss_of, **options):
    model = make_net() if model is None else model
    optimizer = method.make(model, base)
    step = TrainStep(model, optimizer, loss_fn, passes=passes, **options)
    assert step.passes == passes
    losses = [step(d["train"], d["validation"], memory_batch=d["memory"]) for d in data_of_steps(steps)]
    buffers = [b.clone() for b in model.buffers()]
    state = [v.clone() for entries in optimizer.state.values() for v in entries.values() if isinstance(v, torch.Tensor)]
    assert all(p.grad is None for p in model.parameters())
    return [*weights_of(model), *(loss for loss in losses if loss is not None), *buffers, *state]


# A base has a part in it where it looks ahead.
PAIRS = [*((method, base) for method in IN_PARALLEL for base in (SGD, ADAMW)), *((SAMPA, base) for base in FUSED)]


@pytest.mark.parametrize(("method", "base"), list(dict.fromkeys(PAIRS)), ids=str)
def test_same_steps(lanes, method, base):
    assert_same(train(method, base, "streams"), train(method, base, "sequential"))


@pytest.mark.parametrize("perturbed", [True, False])
@pytest.mark.parametrize("base", [SGD, ADAMW], ids=str)
def test_sampa_with_groups(lanes, base, perturbed):
    """A group that stays out of the perturbation does not stay out of the look-ahead."""
    results = []
    for passes in ("streams", "sequential"):
        model = make_net()
        weights, others = list(model.parameters())[:2], list(model.parameters())[2:]
        groups = [{"params": weights}, {"params": others, "perturb": perturbed, "rho": 0.2}]
        step = TrainStep(model, SAMPa(groups, base.cls, **base.settings), loss_of, passes=passes)
        for batch in batches(4):
            step(batch)
        results.append(weights_of(model))
    assert_same(*results)


def test_sampa_with_a_gradient_that_is_not_finite(lanes):
    """With lam 0 it enters no update; both points are the weights then, and the next step is an ordinary one."""
    results = []
    for passes in ("streams", "sequential"):
        model = make_net()
        optimizer = SAMPa(model.parameters(), torch.optim.SGD, lam=0.0, lr=0.1, momentum=0.9)
        step = TrainStep(model, optimizer, loss_of, passes=passes)
        for number, (x, y) in enumerate(batches(5)):
            if number == 2:
                gradient = optimizer.method_state("y_gradient")[0]
                gradient[0] = float("inf")
            step((x, y))
            assert optimizer.last_step.ascent is None or optimizer.last_step.ascent.finite == (number != 2)
        results.append(weights_of(model))
        assert all(w.isfinite().all() for w in results[-1])
    assert_same(*results)


@pytest.mark.parametrize("method", IN_PARALLEL, ids=str)
@pytest.mark.parametrize("options", [{"micro_batches": 3}, {"max_grad_norm": 0.1}], ids=str)
def test_options(lanes, method, options):
    assert_same(train(method, SGD, "streams", **options), train(method, SGD, "sequential", **options))


@pytest.mark.parametrize("method", IN_PARALLEL, ids=str)
def test_batch_norm_and_dropout(monkeypatch, method):
    """Statistics are updated by the training pass alone; the same masks as one after the other."""
    monkeypatch.setattr(TrainStep, "_make_lanes", lambda self: OneLane())
    results = []
    for passes in ("streams", "sequential"):
        model = make_net(dropout=0.5, batch_norm=True)
        torch.manual_seed(3)
        results.append(train(method, SGD, passes, model))
    assert_same(*results)


class Odd(nn.Module):
    """Tied weights, a frozen layer, a parameter that the optimizer does not hold, a view, checkpointing."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 7)
        self.second = nn.Linear(7, 7)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.strange = nn.Parameter(torch.ones(7))
        self.head = nn.Linear(7, 3)
        self.head.weight = nn.Parameter(torch.randn(3, 14)[:, ::2])

    def forward(self, x):
        x = checkpoint(lambda x: torch.tanh(self.second(torch.tanh(self.first(x)))), x, use_reentrant=False)
        return self.head(self.frozen(x) * self.strange)


@pytest.mark.parametrize("method", IN_PARALLEL, ids=str)
def test_odd_models(lanes, method):
    results = []
    for passes in ("streams", "sequential"):
        torch.manual_seed(0)
        model = Odd().double()
        held = [(name, p) for name, p in model.named_parameters() if name != "strange"]
        optimizer = method.cls(held, torch.optim.SGD, **method.settings, **SGD.settings)
        step = TrainStep(model, optimizer, loss_of, passes=passes)
        losses = [step(d["train"], d["validation"], memory_batch=d["memory"]) for d in data_of_steps(4)]
        results.append([*weights_of(model), *(loss for loss in losses if loss is not None)])
    assert_same(*results)


class TwoPoints(SharpnessAwareOptimizer):
    """A method from elsewhere: the mean of the gradients at w + rho g/|g| and at w, side by side."""

    yields_passes_together = True

    def passes(self):
        from sam_kernels import Normalized

        g = yield Pass(kept=True)
        scale = [[group["rho"]] for group in self.param_groups]
        if self.runs_in_parallel:
            there = self.ascent_point(g, rule=Normalized(), scale=scale)
            one, two = yield [Pass(perturbed=True, weights=there), Pass(kept=True)]
        else:
            self.ascend(g, rule=Normalized(), scale=scale)
            one = yield Pass(perturbed=True, kept=True)
            self.return_to_copies()
            two = yield Pass(kept=True)
        yield Update(one, two, scale=0.5)


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated")
@pytest.mark.parametrize("normalised", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("method", IN_PARALLEL, ids=str)
def test_passes_that_read_what_another_one_writes(lanes, method, normalised):
    """Spectral normalisation's vectors, which the pass at the weights updates: the others wait for it."""

    def make():
        torch.manual_seed(3)
        return nn.Sequential(normalised(nn.Linear(7, 9)), nn.Tanh(), nn.Linear(9, 3)).double()

    assert_same(train(method, SGD, "streams", make()), train(method, SGD, "sequential", make()))


def test_a_method_from_elsewhere(lanes):
    results = []
    for passes in ("streams", "sequential"):
        model = make_net()
        optimizer = TwoPoints(model.parameters(), torch.optim.SGD, {"rho": 0.1}, **SGD.settings)
        step = TrainStep(model, optimizer, loss_of, passes=passes)
        losses = [step(batch) for batch in batches(4)]
        results.append([*weights_of(model), *losses])
    assert_same(*results)


def test_resuming_between_drivers(lanes):
    """Half of the steps side by side, the others one after the other."""
    wanted = train(SAMPA, SGD, "sequential", steps=6)
    model = make_net()
    optimizer = SAMPA.make(model, SGD)
    data, step = batches(6), TrainStep(model, optimizer, loss_of, passes="streams")
    for batch in data[:3]:
        step(batch)
    saved = optimizer.state_dict()
    other = SAMPA.make(model, SGD)
    other.load_state_dict(saved)
    step = TrainStep(model, other, loss_of)
    step(data[3], previous_batch=data[2])
    for batch in data[4:]:
        step(batch)
    assert_same(weights_of(model), wanted[: len(weights_of(model))])


@pytest.mark.parametrize("method", [AGNOSTIC, SAMPA], ids=str)
@pytest.mark.parametrize("fails_at", [1, 2])
def test_exceptions(lanes, method, fails_at):
    """In either of the two passes: weights, statistics and state as before, and the next step works."""
    model = make_net(batch_norm=True)
    optimizer = method.make(model, SGD)
    until_failure = [-1]

    def loss_fn(model, batch):
        loss = loss_of(model, batch)
        until_failure[0] -= 1
        if until_failure[0] == 0:
            raise RuntimeError("out of luck")
        return loss

    step = TrainStep(model, optimizer, loss_fn, passes="streams")
    data, other = batches(4), batches(4, size=5)
    for number in range(2):
        step(data[number], other[number])
    before = [*weights_of(model), *(b.clone() for b in model.buffers())]
    until_failure[0] = fails_at
    with pytest.raises(RuntimeError, match="out of luck"):
        step(data[2], other[2])
    assert_same([*weights_of(model), *model.buffers()], before)
    assert not optimizer.is_step_begun and not optimizer.runs_in_parallel
    step(data[3], other[3])
    assert not torch.equal(weights_of(model)[0], before[0])


def test_missing_gradients(lanes):
    model = make_net()
    optimizer = SAMPA.make(model, SGD)
    step = TrainStep(model, optimizer, loss_of, passes="streams")
    data = batches(3)
    step(data[0])
    for group in optimizer.stepper.each_group():
        group.gradients = [[None] * 4] * 2
        break
    assert not optimizer.is_step_begun
    with pytest.raises(Exception, match="no parameter has a gradient"):
        for group in optimizer.stepper.each_group():
            group.gradients = [[None] * 4] * len(group.passes)
    with pytest.raises(Exception, match="0 gradients were given for 2 passes"):
        for _ in optimizer.stepper.each_group():
            pass
    assert not optimizer.is_step_begun


def test_what_cannot_run_side_by_side_says_so(monkeypatch):
    model = make_net()

    def step_of(method, base=SGD, passes="streams", model=model, **options):
        return TrainStep(model, method.make(model, base), loss_of, passes=passes, **options)

    with pytest.raises(InvalidSettingError, match="Invalid passes"):
        step_of(SAMPA, passes="parallel")
    with pytest.raises(InvalidSettingError, match="SAM has no passes"):
        step_of(named("SAM"))
    with pytest.raises(InvalidSettingError, match="one CUDA device; they are on cpu"):
        step_of(SAMPA)
    with pytest.raises(InvalidSettingError, match="RAdam"):
        step_of(SAMPA, UNFUSED)
    with pytest.raises(InvalidSettingError, match="perturbation of their own"):
        step_of(AGNOSTIC, micro_batches=2, perturbation="micro_batch")
    elsewhere = nn.Parameter(torch.zeros(3))
    optimizer = AgnosticSAM([*model.parameters(), elsewhere], torch.optim.SGD, lr=0.1)
    with pytest.raises(InvalidSettingError, match="not the model's"):
        TrainStep(model, optimizer, loss_of, passes="streams")
    wrapped = make_net()
    wrapped.no_sync = lambda: None
    with pytest.raises(InvalidSettingError, match="passes='sequential'"):
        step_of(AGNOSTIC, model=wrapped)
    for method in (SAMPA, named("SAM")):
        assert step_of(method, passes="auto").passes == "sequential"
    monkeypatch.setattr(TrainStep, "_make_lanes", lambda self: OneLane())
    assert step_of(SAMPA, passes="auto").passes == "streams"


def test_streams_fork_and_join(monkeypatch):
    """The order in which streams are told to wait, on a stand-in for CUDA's."""
    from sam_optim.training import streams

    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class On:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            log.append(f"on {self.stream.name}")

        def __exit__(self, *_):
            return None

    names = iter("ab")
    fake = SimpleNamespace(
        current_stream=lambda device: Stream("main"), Stream=lambda device: Stream(next(names)), stream=On
    )
    monkeypatch.setattr(streams.torch, "cuda", fake)
    lanes = streams.StreamLanes(torch.device("cpu"))
    assert lanes.run([lambda: 1, lambda: 2]) == [1, 2]
    wanted = ["a waits for main", "b waits for main", "on a", "on b", "main waits for a", "main waits for b"]
    assert log == wanted
    log.clear()
    with pytest.raises(ZeroDivisionError):
        lanes.run([lambda: 1 / 0, lambda: 2])
    assert log == [*wanted[:3], *wanted[4:]]
