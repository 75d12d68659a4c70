"""TrainStep(capture=True): everything but CUDA's graphs themselves, which a stand-in replays by calling again."""

from __future__ import annotations

import copy
import weakref
from collections import UserDict
from contextlib import nullcontext

import pytest
import torch

from sam_kernels import graphs
from sam_optim import SAM, InvalidSettingError, TrainStep
from sam_optim.training.capture import _MAX_GRAPHS, WARMUP_STEPS, Recorder
from sam_optim.training.streams import OneLane

from .bases import SGD, Base
from .cases import assert_same, batches, loss_of, make_net, weights_of
from .drivers import data_of_steps
from .methods import ALL_SETTINGS, methods_with, named
from .stand_ins import Replayed

CAPTURABLE = methods_with(ALL_SETTINGS, is_capturable=True)
SAMPA = named("SAMPa")


@pytest.fixture
def recorder(monkeypatch):
    recorder = Replayed()
    monkeypatch.setattr(TrainStep, "_make_recorder", lambda self: recorder)
    return recorder


def train(method, base=SGD, steps=8, data=None, **options):
    model = make_net()
    optimizer = method.make(model, base)
    step = TrainStep(model, optimizer, loss_of, **options)
    losses = [step(d["train"], d["validation"], memory_batch=d["memory"]) for d in data or data_of_steps(steps)]
    return [*weights_of(model), *(loss for loss in losses if loss is not None)], optimizer, step


@pytest.mark.parametrize("method", CAPTURABLE, ids=str)
@pytest.mark.parametrize("options", [{}, {"micro_batches": 2}, {"max_grad_norm": 0.1}], ids=str)
def test_same_steps(recorder, method, options):
    """State stays where it was: a replay finds it there."""
    wanted, *_ = train(method, **options)
    got, *_ = train(method, capture=True, **options)
    assert (recorder.warm, recorder.recorded) == (WARMUP_STEPS, 1)
    assert_same(got, wanted)


def test_streams_and_capture(recorder, monkeypatch):
    monkeypatch.setattr(TrainStep, "_make_lanes", lambda self: OneLane())
    wanted, *_ = train(SAMPA)
    got, _, step = train(SAMPA, capture=True, passes="streams")
    assert step.passes == "streams"
    assert_same(got, wanted)


def test_the_methods_state_stays_in_place(recorder):
    model = make_net()
    optimizer = SAMPA.make(model, SGD)
    step = TrainStep(model, optimizer, loss_of, capture=True)
    places = []
    for batch in batches(5):
        step(batch)
        places.append([t.data_ptr() for t in optimizer.method_state("y_gradient")])
    assert all(own == places[0] for own in places)


def test_each_shape_of_batches_has_a_graph(recorder):
    sizes = [12] * (WARMUP_STEPS + 2) + [7, 12, 7]
    data = [{"train": batches(1, size=size)[0], "validation": None, "memory": None} for size in sizes]
    wanted, *_ = train(named("SAM"), data=data)
    got, _, step = train(named("SAM"), data=data, capture=True)
    assert recorder.recorded == step._captured.count == 2
    assert_same(got, wanted)


def test_results_are_not_overwritten_by_the_next_replay(recorder):
    losses = train(named("SAM"), capture=True)[0][-8:]
    assert len({float(loss) for loss in losses}) == 8


def test_numbers_that_change_are_recorded_anew_and_tensors_are_not(recorder):
    model = make_net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=torch.tensor(0.1), momentum=0.9)
    step = TrainStep(model, optimizer, loss_of, capture=True)
    group = optimizer.param_groups[0]
    for number, batch in enumerate(batches(6)):
        group["lr"].fill_(0.1 / (number + 1))
        step(batch)
    assert recorder.recorded == 1
    with pytest.warns(UserWarning, match="more than eight kinds"):
        for number, batch in enumerate(batches(_MAX_GRAPHS)):
            group["rho"] = 0.2 + number
            step(batch)
    assert recorder.recorded == 1 + _MAX_GRAPHS
    assert step._captured.count == _MAX_GRAPHS


@pytest.mark.parametrize("method", CAPTURABLE, ids=str)
def test_loaded_state_is_recorded_anew(recorder, method):
    """The state then lies elsewhere; a graph of before would go on with what was thrown away."""
    model = make_net()
    optimizer = method.make(model, SGD)
    step = TrainStep(model, optimizer, loss_of, capture=True)
    for number, d in enumerate(data_of_steps(7)):
        if number == 5:
            assert recorder.recorded == 1
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step(d["train"], d["validation"], memory_batch=d["memory"])
    assert (recorder.warm, recorder.recorded, step._captured.count) == (WARMUP_STEPS + 1, 2, 1)


def test_a_step_that_raises(recorder):
    model = make_net(batch_norm=True)
    optimizer = named("SAM").make(model, SGD)
    fails = []

    def loss_fn(model, batch):
        loss = loss_of(model, batch)
        if fails and fails.pop():
            raise RuntimeError("out of luck")
        return loss

    step = TrainStep(model, optimizer, loss_fn, capture=True)
    data = batches(WARMUP_STEPS + 2)
    for batch in data[:WARMUP_STEPS]:
        step(batch)
    before = weights_of(model)
    fails += [True, False]
    with pytest.raises(RuntimeError, match="out of luck"):
        step(data[-2])
    assert_same(weights_of(model), before)
    assert not step._captured.is_recording and not optimizer.is_step_begun
    step(data[-1])
    assert not torch.equal(weights_of(model)[0], before[0])


def test_what_cannot_be_captured_says_so():
    model = make_net()

    def step_of(base=SGD, **options):
        return TrainStep(model, named("SAM").make(model, base), loss_of, capture=True, **options)

    with pytest.raises(InvalidSettingError, match="one CUDA device; they are on cpu"):
        step_of()
    with pytest.raises(InvalidSettingError, match="capturable=True"):
        step_of(Base(torch.optim.AdamW, {"lr": 0.1}))
    with pytest.raises(InvalidSettingError, match="GradScaler"):
        step_of(scaler=torch.amp.GradScaler("cpu"))
    wrapped = make_net()
    wrapped.no_sync = lambda: None
    with pytest.raises(InvalidSettingError, match="capture=True cannot be used with Net"):
        TrainStep(wrapped, named("SAM").make(wrapped, SGD), loss_of, capture=True)


def test_an_autocast_around_replays_sees_new_weights(monkeypatch):
    """A replay writes weights where neither autograd nor autocast looks."""
    model = make_net(torch.float32)

    class Silent(Replayed):
        def record(self, call, generators):
            outputs = call()

            def replay():
                for p in model.parameters():
                    p.data.add_(1.0)
                return outputs

            return replay

    monkeypatch.setattr(TrainStep, "_make_recorder", lambda self: Silent())
    step = TrainStep(model, named("SAM").make(model, SGD), loss_of, capture=True)
    data = batches(WARMUP_STEPS + 2, torch.float32)
    for batch in data[:-1]:
        step(batch)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(data[0][0])
        step(data[-1])
        assert not torch.equal(model(data[0][0]), before)


@pytest.mark.parametrize("batch", [UserDict(x=batches(1)[0]), batches(1)[0][0].numpy()], ids=["UserDict", "array"])
def test_what_a_graph_cannot_read_is_refused(recorder, batch):
    """What lies in it would be that of the recorded step for ever."""
    model = make_net()
    step = TrainStep(model, named("SAM").make(model, SGD), lambda m, b: loss_of(m, batches(1)[0]), capture=True)
    for _ in range(WARMUP_STEPS):
        step(batch)
    with pytest.raises(InvalidSettingError, match="capture=True reads batches of tensors"):
        step(batch)


@pytest.mark.parametrize("perturbation", ["batch", "micro_batch"])
@pytest.mark.parametrize("weight", [None, lambda part: (part[1] != -100).sum()])
def test_labels_are_counted_in_the_graph(monkeypatch, perturbation, weight):
    """Without waiting for them: the shares of micro-batches are tensors then, and made anew by each replay."""
    data = batches(4)
    for number, (_, y) in enumerate(data[1:]):
        y[: 3 + number] = -100
    data[3][1][:4] = -100  # all of a part
    results = []
    for records in (False, True):
        monkeypatch.setattr(TrainStep, "is_recording", records)
        model = make_net()
        more = {"micro_batches": 3, "perturbation": perturbation, "weight": weight}
        step = TrainStep(model, named("SAM").make(model, SGD), loss_of, **more)
        results.append([*[step(batch) for batch in data], *weights_of(model)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


class Stream:
    """Knows for whom it waits."""

    def __init__(self, *_):
        self.awaited = []

    def wait_stream(self, other):
        self.awaited.append(other)


@pytest.fixture
def cuda(monkeypatch):
    """The stream that is current, and with what a graph is captured."""
    current, captures = Stream(), []
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: type("Graph", (), {"pool": lambda self: "its pool"})())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: captures.append(options) or nullcontext())
    return current, captures


def test_work_after_a_warm_up_that_failed_waits_for_it(cuda):
    """Restored weights, for example, are used by whoever catches the exception."""
    current, _ = cuda
    recorder = Recorder(torch.device("cuda"))
    with pytest.raises(KeyError), recorder.warming_up():
        raise KeyError
    assert current.awaited == [recorder._stream]


def test_other_threads_may_do_what_a_capture_does_not_allow(cuda):
    """A DataLoader's thread pins memory at any time."""
    _, captures = cuda
    Recorder(torch.device("cuda")).record(lambda: None, [])
    assert [options["capture_error_mode"] for options in captures] == ["thread_local"]


class Reads:
    """What a graph reads, besides tensors of the optimizer."""


class Keeps(Replayed):
    """Its graphs read something each."""

    def __init__(self):
        super().__init__()
        self.read, self.of_plan = [], []

    def record(self, call, generators):
        own = Reads()
        self.read.append(weakref.ref(own))
        graphs.keep(own, self.of_plan)
        return super().record(call, generators)

    @property
    def alive(self):
        return [own() is not None for own in self.read]


def test_what_a_graph_reads_is_kept_as_long_as_the_graph(monkeypatch):
    recorder = Keeps()
    monkeypatch.setattr(TrainStep, "_make_recorder", lambda self: recorder)
    model = make_net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    step = TrainStep(model, optimizer, loss_of, capture=True)
    data = batches(WARMUP_STEPS + 1)
    for batch in data:
        step(batch)
    assert recorder.alive == [True] and not recorder.of_plan and recorder.waited == 0
    with pytest.warns(UserWarning, match="more than eight"):
        for number in range(_MAX_GRAPHS):
            optimizer.param_groups[0]["lr"] = 0.01 * (number + 1)
            step(data[0])
    assert recorder.alive == [False, *[True] * _MAX_GRAPHS] and recorder.waited == 1
    optimizer.load_state_dict(optimizer.state_dict())
    step(data[0])
    assert not any(recorder.alive) and recorder.waited == 2


def test_elsewhere_it_is_kept_as_long_as_the_plan():
    own, of_plan = Reads(), []
    graphs.keep(own, of_plan)
    assert of_plan == [own]
