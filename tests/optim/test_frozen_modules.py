"""Running statistics are frozen for forward passes alone, whatever is called and whatever happens in between."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sam_optim import (
    SAM,
    InvalidSettingError,
    disable_running_stats,
    enable_running_stats,
    freeze_in_perturbed_passes,
    frozen_batch_norm,
)

from .cases import assert_same, batches


class Net(nn.Module):
    """Statistics of several kinds."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 6)
        self.body = nn.Sequential(
            nn.BatchNorm1d(6),
            nn.Tanh(),
            nn.BatchNorm1d(6, momentum=None),
            nn.Unflatten(1, (3, 2)),
            nn.InstanceNorm1d(3, track_running_stats=True),
            nn.Flatten(),
        )
        self.last = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))

    def forward(self, x):
        return self.last(self.body(self.first(x)))

    def encode(self, x):
        return self.body(self.first(x))


class PlainNet(Net):
    """Without spectral normalisation, whose vectors forward passes use; and its classes cannot be pickled."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 3)


class SmallNet(nn.Module):
    """For torch.compile, which takes no cumulative averages, and its time for the others."""

    def __init__(self):
        super().__init__()
        self.first, self.body, self.last = nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.body(self.first(x)))


class Module(nn.Module):
    """A model around a model, which is never called itself, as Lightning's are not."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, x):
        return self.net(x)


def by_compiled_function(net):
    return torch.compile(lambda x: net(x), backend="eager", fullgraph=True)


def compiled_in_place(net):
    net.compile(backend="eager")
    return net


WAYS = {
    "whole": lambda net: net,
    "method": lambda net: lambda x: net.last(net.encode(x)),
    "parts": lambda net: lambda x: net.last(net.body(net.first(x))),
    "wrapper": lambda net: Module(net).training_step,
    "twice": lambda net: lambda x: net(x[::2]) + net(x[1::2]),
    "data parallel": lambda net: nn.DataParallel(net),
    "checkpoint": lambda net: lambda x: net.last(checkpoint(net.encode, x, use_reentrant=False)),
    "checkpoint, reentrant": lambda net: (
        lambda x: net.last(checkpoint(net.encode, x.detach().requires_grad_(), use_reentrant=True))
    ),
}
COMPILED = {
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled in place": compiled_in_place,
    "compiled function": by_compiled_function,
}
HELPERS = ["freeze", "disable", "block"]


def make_net(cls=Net):
    torch.manual_seed(0)
    return cls().double()


def loss_of(evaluate, x):
    return evaluate(x).square().mean()


def train(way, helper, cls=PlainNet, steps=3, before_compiling=True):
    """The model after steps of SAM with rho = 0, or of SGD alone."""
    torch._dynamo.reset()
    net = make_net(SmallNet if "compiled" in way else cls)
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer = SAM(net.parameters(), base, rho=0.0)
    evaluate = {**WAYS, **COMPILED}[way](net)
    if not before_compiling:
        loss_of(evaluate, batches(1)[0][0]).backward()
        optimizer.zero_grad()
    if helper == "freeze":
        freeze_in_perturbed_passes(net, optimizer)
    for x, _ in batches(steps):
        if helper == "disable":
            enable_running_stats(net)
        loss_of(evaluate, x).backward()
        if helper == "base":
            base.step()
            base.zero_grad()
            continue
        before, originals = [b.clone() for b in net.buffers()], list(net.buffers())
        optimizer.first_step(zero_grad=True)
        if helper == "disable":
            disable_running_stats(net)
        if helper == "block":
            with frozen_batch_norm(net):
                loss_of(evaluate, x).backward()
                assert_same(list(net.buffers()), before)
        else:
            loss_of(evaluate, x).backward()
        assert_same(list(net.buffers()), before)
        assert all(a is b for a, b in zip(net.buffers(), originals, strict=True))
        optimizer.second_step(zero_grad=True)
    return net


def state_of(net):
    return [v.detach().clone() for v in net.state_dict().values()]


@pytest.mark.parametrize("helper", HELPERS)
@pytest.mark.parametrize("way", [*WAYS, *COMPILED])
def test_statistics_of_one_pass_a_step_whatever_is_called(way, helper):
    assert_same(state_of(train(way, helper)), state_of(train(way, "base")))


@pytest.mark.parametrize("way", WAYS)
def test_vectors_of_spectral_norm_too(way):
    assert_same(state_of(train(way, "freeze", Net)), state_of(train(way, "base", Net)))


def test_compiled_with_autograd(monkeypatch):
    monkeypatch.setitem(COMPILED, "compiled", lambda net: torch.compile(net, backend="aot_eager"))
    assert_same(state_of(train("compiled", "freeze")), state_of(train("compiled", "base")))


@pytest.mark.parametrize("helper", HELPERS)
@pytest.mark.parametrize("way", COMPILED)
def test_compiled_before_it_is_frozen(way, helper):
    found, wanted = (train(way, h, before_compiling=False) for h in (helper, "base"))
    assert_same(state_of(found), state_of(wanted))


@pytest.mark.parametrize("helper", HELPERS)
def test_compiled_graphs_are_few_and_whole(helper):
    from torch._dynamo.utils import counters

    counters.clear()
    train("compiled function", helper, steps=4)
    # Without hooks at first, for helpers that come only when it has been compiled; then frozen and not.
    assert counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]


@pytest.mark.parametrize("way", ["whole", "method", "checkpoint"])
def test_statistics_are_those_of_the_unperturbed_passes(way):
    torch.manual_seed(0)
    net = Net().double()
    optimizer = SAM(net.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    freeze_in_perturbed_passes(net, optimizer)
    evaluate = WAYS[way](net)
    forwards = 2 if way == "checkpoint" else 1  # torch runs a checkpointed pass, and what it updates, again
    mean, var = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    for x, _ in batches(4):
        with torch.no_grad():
            h = x @ net.first.weight.T + net.first.bias
        for _ in range(forwards):
            mean, var = 0.9 * mean + 0.1 * h.mean(0), 0.9 * var + 0.1 * h.var(0)
        loss_of(evaluate, x).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(evaluate, x).backward()
        optimizer.second_step(zero_grad=True)
    assert net.body[0].num_batches_tracked == net.body[2].num_batches_tracked == 4 * forwards
    torch.testing.assert_close(net.body[0].running_mean, mean)
    torch.testing.assert_close(net.body[0].running_var, var)


def frozen_net(helper):
    """A model whose perturbed forward pass has been made, and what ends this."""
    net = make_net()
    optimizer = SAM(net.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    x = batches(1)[0][0]
    if helper == "freeze":
        freeze_in_perturbed_passes(net, optimizer)
    loss_of(net, x).backward()
    optimizer.first_step(zero_grad=True)
    if helper == "freeze":
        end = optimizer.restore
    elif helper == "disable":
        disable_running_stats(net)

        def end():
            enable_running_stats(net)
    else:
        block = frozen_batch_norm(net)
        block.__enter__()

        def end():
            block.__exit__(None, None, None)

    loss_of(net, x).backward()
    return net, optimizer, end


@pytest.mark.parametrize("helper", HELPERS)
def test_what_is_loaded_while_frozen_stays(helper):
    net, _, end = frozen_net(helper)
    wanted = {name: torch.full_like(b, 3) for name, b in net.named_buffers()}
    net.load_state_dict(wanted, strict=False)
    net(batches(1)[0][0])
    end()
    assert_same(list(net.buffers()), list(wanted.values()))


@pytest.mark.parametrize("helper", ["disable", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_conversion_while_frozen_stays(helper, dtype):
    net, _, end = frozen_net(helper)
    net.to(dtype)
    net(batches(1)[0][0].to(dtype))
    end()
    assert {b.dtype for b in net.buffers() if b.is_floating_point()} == {dtype}
    assert net(batches(1)[0][0].to(dtype)).dtype == dtype


@pytest.mark.parametrize("helper", HELPERS)
def test_evaluation_and_checkpoints_while_frozen_are_of_the_real_statistics(helper):
    net, _, end = frozen_net(helper)
    wanted = make_net()
    x = batches(1)[0][0]
    wanted(x)
    names = [name for name, _ in wanted.named_buffers()]
    assert_same([net.state_dict()[name] for name in names], list(wanted.buffers()))
    wanted.load_state_dict(dict(net.named_parameters()), strict=False)  # the perturbed weights
    assert torch.equal(net.eval()(x), wanted.eval()(x))
    net.train()
    net(x)
    assert_same(list(net.buffers()), list(wanted.buffers()))
    end()
    assert_same(list(net.buffers()), list(wanted.buffers()))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "save": by_torch_save}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("moment", ["between steps", "between passes", "disabled", "in a block"])
def test_a_copy_is_not_frozen_and_the_original_is(how, moment):
    torch.manual_seed(0)
    net = PlainNet().double()
    optimizer = SAM(net.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    x = batches(1)[0][0]
    freeze_in_perturbed_passes(net, optimizer)
    loss_of(net, x).backward()
    if moment == "between passes":
        optimizer.first_step(zero_grad=True)
    elif moment == "disabled":
        disable_running_stats(net)
    if moment == "in a block":
        with frozen_batch_norm(net):
            net(x)
            other = COPIES[how](net)
    else:
        net(x) if moment != "between steps" else None
        other = COPIES[how](net)
    assert other.body[0].num_batches_tracked == net.body[0].num_batches_tracked == 1
    # In whatever state the original is: the copy learns, and is frozen by an optimizer of its own.
    other(x)
    assert other.body[0].num_batches_tracked == 2
    others = SAM(other.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    freeze_in_perturbed_passes(other, others)
    optimizer.restore()
    enable_running_stats(net)
    for model, own in ((other, others), (net, optimizer)):
        own.zero_grad()
        before = int(model.body[0].num_batches_tracked)
        for _ in range(3):
            loss_of(model, x).backward()
            own.first_step(zero_grad=True)
            loss_of(model, x).backward()
            own.second_step(zero_grad=True)
        assert model.body[0].num_batches_tracked == before + 3


class Failing(nn.BatchNorm1d):
    """Writes its statistics, and then raises what it is told to."""

    error: BaseException | None = None

    def forward(self, x):
        y = super().forward(x)
        if self.error is not None:
            raise self.error
        return y


@pytest.mark.parametrize("helper", HELPERS)
@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_whatever_a_forward_pass_raises(helper, error):
    net = nn.Sequential(nn.Linear(7, 3), Failing(3))
    optimizer = SAM(net.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    x = torch.randn(4, 7)
    if helper == "freeze":
        freeze_in_perturbed_passes(net, optimizer)
    loss_of(net, x).backward()
    originals, before = list(net.buffers()), [b.clone() for b in net.buffers()]
    optimizer.first_step(zero_grad=True)
    net[1].error = error
    with pytest.raises(type(error)):
        if helper == "block":
            with frozen_batch_norm(net):
                net(x)
        else:
            if helper == "disable":
                disable_running_stats(net)
            net(x)
    if isinstance(error, KeyboardInterrupt):  # torch's hooks do not run then
        optimizer.restore()
        enable_running_stats(net)
    assert all(a is b for a, b in zip(net.buffers(), originals, strict=True))
    assert_same(list(net.buffers()), before)
    optimizer.restore()
    enable_running_stats(net)
    net[1].error = None
    net(x)
    assert net[1].num_batches_tracked == 2


def test_two_threads_and_replicas():
    """Which share a model's hooks, as DataParallel's do; the real statistics are not written, and are there after."""
    net = nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3))
    originals, before = list(net.buffers()), [b.clone() for b in net.buffers()]
    barrier = threading.Barrier(4)

    class Meeting(nn.Module):
        def forward(self, x):
            barrier.wait()
            return x

    replica = net[1]._replicate_for_data_parallel()
    replica._buffers, replica._parameters = dict(net[1]._buffers), dict(net[1]._parameters)
    norms = [net[1], net[1], replica, replica]
    with frozen_batch_norm(net):
        for norm in norms:
            assert norm._forward_pre_hooks
        meeting = Meeting()
        handle = net[1].register_forward_pre_hook(lambda module, args: (meeting(*args),))  # all are within, now
        threads = [threading.Thread(target=norm, args=(torch.randn(5, 3),)) for norm in norms]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        handle.remove()
    for module in (net[1], replica):
        assert all(a is b for a, b in zip(module._buffers.values(), originals, strict=True))
    assert_same(list(net.buffers()), before)


def test_functional_calls_keep_the_buffers_they_are_given():
    net = nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3))
    given = {name: b.clone() for name, b in net.named_buffers()}
    before = [b.clone() for b in given.values()]
    with frozen_batch_norm(net):
        torch.func.functional_call(net, given, (torch.randn(5, 7),))
    assert_same(list(given.values()), before)
    torch.func.functional_call(net, given, (torch.randn(5, 7),))
    assert given["1.num_batches_tracked"] == 1
    assert net[1].num_batches_tracked == 0


def test_lazy_modules():
    net = nn.Sequential(nn.Linear(7, 3), nn.LazyBatchNorm1d())
    with frozen_batch_norm(net):
        net(torch.randn(5, 7))
    assert net[1].num_batches_tracked == 0
    assert net[1].running_mean.tolist() == [0.0, 0.0, 0.0]
    net(torch.randn(5, 7))
    assert net[1].num_batches_tracked == 1


def test_modules_that_join_later():
    net = nn.Sequential(nn.Linear(7, 3), nn.Identity())
    optimizer = SAM(net.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    freeze_in_perturbed_passes(net, optimizer)
    net.add_module("2", nn.BatchNorm1d(3, affine=False))
    net[1] = nn.BatchNorm1d(3, affine=False)
    for _ in range(3):
        net(torch.randn(5, 7)).square().sum().backward()
        optimizer.first_step(zero_grad=True)
        net(torch.randn(5, 7)).square().sum().backward()
        optimizer.second_step(zero_grad=True)
    assert net[1].num_batches_tracked == net[2].num_batches_tracked == 3


def hooks_of(model):
    return [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated")
def test_nothing_is_left_behind_and_nothing_registered_without_statistics():
    torch._dynamo.reset()
    plain = nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3, track_running_stats=False))
    net = nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3))
    for model in (plain, net):
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
        handle = freeze_in_perturbed_passes(model, optimizer)
        disable_running_stats(model)
        with frozen_batch_norm(model):
            assert bool(hooks_of(model)) == (model is net)
        enable_running_stats(model)
        handle.remove()
        handle.remove()
        assert hooks_of(model) == []
    torch.jit.script(net)  # refuses hooks


def test_everything_is_freed():
    net = PlainNet()
    optimizer = SAM(net.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    gc.collect()
    gc.disable()
    try:
        freeze_in_perturbed_passes(net, optimizer)
        disable_running_stats(net)
        held = [weakref.ref(net), weakref.ref(optimizer)]
        del net
        assert held[0]() is None
        del optimizer
        assert held[1]() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated")
def test_torchscript_is_refused_where_it_has_statistics():
    net = nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3))
    scripted = torch.jit.script(copy.deepcopy(net))
    optimizer = SAM(scripted.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    with pytest.raises(InvalidSettingError, match="of a TorchScript module cannot be kept from perturbed passes"):
        freeze_in_perturbed_passes(scripted, optimizer)
    with pytest.raises(InvalidSettingError, match="use the module that it was made from"):
        disable_running_stats(nn.ModuleList([net, scripted]))
    assert hooks_of(net) == []
    freeze_in_perturbed_passes(torch.jit.script(nn.Linear(3, 3)), optimizer)
