"""Parameters that share memory: the same one twice, two in one place, views that overlap. Torch takes such lists."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import sam_kernels as sk
from sam_kernels.backends import reference
from sam_optim import SAM, SAMPa, TrainStep
from sam_optim.training.streams import OneLane

from .bases import ADAMW_AMSGRAD, AMSGRAD, NESTEROV, PLAIN_SGD, UNFUSED, Base
from .cases import assert_same, batches, loss_of, make_net, step_by_hand, weights_of
from .drivers import take_steps
from .methods import METHODS

DAMPENED = Base(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3})
BASES = [PLAIN_SGD, NESTEROV, DAMPENED, AMSGRAD, ADAMW_AMSGRAD, UNFUSED]


def twice():
    a, b = leaves((3, 4), (5,))
    return [a, b, a]


def one_place():
    a, b, c = leaves((3, 4), (5,), (3, 4))
    c.data = a.data
    return [a, b, c]


def overlapping_views():
    (whole,) = leaves((20,))
    b = nn.Parameter(whole.data[3:9])
    return [nn.Parameter(whole.data[:6]), whole, b]


def overlapping_columns():
    (whole,) = leaves((4, 6))
    return [nn.Parameter(whole.data[:, :4]), nn.Parameter(whole.data[:, 2:])]


def transposed():
    a, b = leaves((4, 6), (3,))
    return [a, b, nn.Parameter(a.data.t())]


def in_two_groups():
    a, b, c = one_place()
    return [{"params": [a, b]}, {"params": [c], "lr": 0.02}]


LISTS = [twice, one_place, overlapping_views, overlapping_columns, transposed, in_two_groups]
TARGETS = ["cpu", "cuda shim", "triton interpreter", "foreach"]


def leaves(*shapes):
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]


def entries(groups):
    return [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]


def loss(params):
    """Uses every entry, and each in a way of its own."""
    return sum(((number + 1) * p).sin().sum() * (1 + p.square().mean()) for number, p in enumerate(params))


def backward(params):
    for p in params:
        p.grad = None
    loss(params).backward()


def oracle_step(params, base, rho):
    """Of the formula: copies of all, the perturbation in the order of the list, and torch's own update."""
    backward(params)
    copies = [p.detach().clone() for p in params]
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    with torch.no_grad():
        for p, w in zip(params, copies, strict=True):
            p.copy_(w + rho * p.grad / norm)
    backward(params)
    with torch.no_grad():
        for p, w in zip(params, copies, strict=True):
            p.copy_(w)
    base.step()


def make(groups, base, backend, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of duplicates
        return SAM(groups, base.cls, **{"rho": 0.3, "backend": backend, **copy.deepcopy(base.settings), **settings})


def step(optimizer, params):
    backward(params)
    optimizer.first_step()
    backward(params)
    optimizer.second_step()


@pytest.fixture(params=["reference", *TARGETS])
def backend(request, monkeypatch):
    if request.param == "reference":
        return "reference"
    from ..targets import target_named

    return target_named(request.param, request, monkeypatch).name


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("make_list", LISTS)
def test_steps_are_those_of_torch_on_the_same_list(backend, base, make_list):
    groups, wanted = make_list(), make_list()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = base.cls(wanted, **copy.deepcopy(base.settings))
    optimizer = make(groups, base, backend)
    for _ in range(3):
        step(optimizer, entries(groups))
        oracle_step(entries(wanted), plain, 0.3)
    for own, other in zip(entries(groups), entries(wanted), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-12)
        for key, value in plain.state[other].items():
            torch.testing.assert_close(optimizer.state[own][key], value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("make_list", LISTS)
def test_weights_come_back_bit_for_bit(backend, make_list):
    groups = make_list()
    params = entries(groups)
    optimizer = make(groups, Base(torch.optim.SGD, {"lr": 0.0, "momentum": 0.9}), backend)
    optimizer.param_groups[-1]["lr"] = 0.0
    before = [p.detach().clone() for p in params]
    backward(params)
    optimizer.first_step()
    assert not all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    optimizer.restore()
    assert_same([p.detach() for p in params], before)
    for _ in range(3):
        step(optimizer, params)
    assert_same([p.detach() for p in params], before)


def test_memory_that_comes_to_be_shared_and_parts_again(backend):
    """By ``p.data = ...`` between two steps, of which nothing but the addresses tells."""
    base = Base(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
    params, wanted = leaves((3, 4), (5,), (3, 4)), leaves((3, 4), (5,), (3, 4))
    plain = base.cls(wanted, **base.settings)
    optimizer = make(params, base, backend)

    def own_memory(own):
        own[2].data = own[2].data.clone()

    def shared_memory(own):
        own[2].data = own[0].data

    for change in (own_memory, shared_memory, shared_memory, own_memory, own_memory):
        change(params), change(wanted)
        step(optimizer, params)
        oracle_step(wanted, plain, 0.3)
        for own, other in zip(params, wanted, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-12)


def tied_net():
    """With two layers in one place, one of them also in the list by itself."""
    net = make_net()
    net.more = nn.Linear(7, 33, dtype=torch.float64)
    net.more.weight.data = net.layers[0].weight.data
    forward = net.layers.forward
    net.layers.forward = lambda x: forward(x) + 0.1 * net.more(x).tanh().mean(1, keepdim=True)
    return net


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("base", [NESTEROV, ADAMW_AMSGRAD], ids=str)
def test_every_method_on_the_cpu_makes_the_steps_of_the_definition(method, base):
    weights = {}
    for backend in ("cpu", "reference"):
        net = tied_net()
        optimizer = method.make(net, base, backend=backend)
        take_steps(TrainStep(net, optimizer, loss_of), batches(4), batches(4, size=5))
        weights[backend] = weights_of(net)
        assert torch.equal(net.more.weight, net.layers[0].weight)
    for own, other in zip(weights["cpu"], weights["reference"], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_no_method_moves_weights_without_a_learning_rate(method):
    net = tied_net()
    optimizer = method.make(net, Base(torch.optim.SGD, {"lr": 0.0, "momentum": 0.9}))
    before = weights_of(net)
    take_steps(TrainStep(net, optimizer, loss_of), batches(3), batches(3, size=5))
    assert_same(weights_of(net), before)


def test_passes_side_by_side_are_refused(monkeypatch):
    monkeypatch.setattr(TrainStep, "_make_lanes", lambda self: OneLane())
    net = tied_net()
    optimizer = SAMPa(net.parameters(), torch.optim.SGD, lr=0.1)
    step = TrainStep(net, optimizer, loss_of, passes="streams")
    before = weights_of(net)
    step(batches(1)[0])
    with pytest.raises(ValueError, match="share memory"):
        step(batches(1)[0])
    assert_same(weights_of(net), before)


# ------------------------------------------------------------------ gradients


def test_one_gradient_for_two_parameters(backend):
    params, wanted = leaves((4,), (4,), (2,)), leaves((4,), (4,), (2,))
    optimizer = make(params, NESTEROV, backend)
    plain = torch.optim.SGD(wanted, **NESTEROV.settings)
    for own in (params, wanted):
        backward(own)
        own[1].grad = own[0].grad
    optimizer.first_step()
    backward(params)
    for p, q in zip(params, wanted, strict=True):
        q.grad = p.grad.clone()
    params[1].grad = params[0].grad
    wanted[1].grad = wanted[0].grad
    optimizer.second_step()
    plain.step()
    for p, q in zip(params, wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("of", [0, 1])
@pytest.mark.parametrize("in_pass", [1, 2])
@pytest.mark.parametrize("base", [PLAIN_SGD, UNFUSED], ids=str)
def test_a_gradient_in_the_memory_of_a_weight_is_refused(backend, of, in_pass, base):
    params = leaves((4,), (4,), (2,))
    optimizer = make(params, base, backend)
    before = [p.detach().clone() for p in params]
    backward(params)
    if in_pass == 2:
        optimizer.first_step()
    params[0].grad = params[of].data
    with pytest.raises(ValueError, match=f"gradient of parameter 0 of group 0 shares memory with parameter {of}"):
        optimizer.first_step() if in_pass == 1 else optimizer.second_step()
    assert_same([p.detach() for p in params], before)


def test_a_gradient_in_the_memory_of_state_is_refused(backend):
    if backend == "foreach":
        pytest.skip("updates are torch's own there")
    params = leaves((4,), (4,))
    optimizer = make(params, NESTEROV, backend)
    step(optimizer, params)
    backward(params)
    optimizer.first_step()
    params[0].grad = optimizer.state[params[1]]["momentum_buffer"]
    before = optimizer.state[params[1]]["momentum_buffer"].clone()
    with pytest.raises(ValueError, match="the state of parameter 1"):
        optimizer.second_step()
    assert torch.equal(optimizer.state[params[1]]["momentum_buffer"], before)


def test_state_in_one_place(backend):
    """As torch: one update after the other."""
    params, wanted = leaves((4,), (4,)), leaves((4,), (4,))
    optimizer = make(params, DAMPENED, backend)
    plain = torch.optim.SGD(wanted, **DAMPENED.settings)
    for number in range(3):
        step(optimizer, params)
        oracle_step(wanted, plain, 0.3)
        if number == 0:
            for own, state in ((params, optimizer.state), (wanted, plain.state)):
                state[own[1]]["momentum_buffer"] = state[own[0]]["momentum_buffer"]
    for p, q in zip(params, wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


# ------------------------------------------------------------------ what does not count as sharing


def test_a_frozen_view_changes_nothing():
    """It is not written, so kernels do what they do without it."""
    results = []
    for with_view in (False, True):
        params = leaves((40, 40), (5,))
        views = [params[0].data[:3], params[0].data.T[1:], params[0].data[::2, ::3]] if with_view else []
        frozen = [nn.Parameter(view, requires_grad=False) for view in views]
        optimizer = make([*params, *frozen], NESTEROV, "cpu")
        for _ in range(3):
            step(optimizer, params)
        results.append([p.detach() for p in params])
    assert_same(*results)


def test_views_between_each_others_elements_share_nothing(monkeypatch):
    results = []
    for apart in (False, True):
        (whole,) = leaves((8, 6))
        params = [nn.Parameter(whole.data[:, :3]), nn.Parameter(whole.data[:, 3:])]
        if apart:
            params = [nn.Parameter(p.detach().clone()) for p in params]
        else:
            monkeypatch.setattr(reference.backend, "descent", None)
        optimizer = make(params, NESTEROV, "cpu")
        for _ in range(3):
            step(optimizer, params)
        results.append([p.detach().clone() for p in params])
    assert_same(*results)


# ------------------------------------------------------------------ masters


@pytest.mark.parametrize("is_twice", [True, False])
def test_masters_of_one_weight_are_refused(backend, is_twice):
    a, b, c = (nn.Parameter(p.detach().bfloat16()) for p in leaves((4,), (2,), (4,)))
    c.data = a.data
    params = [a, b, a] if is_twice else [a, b, c]
    before = [p.detach().clone() for p in params]
    optimizer = make(params, NESTEROV, backend, master_weights=True)
    backward(params)
    with pytest.raises(ValueError, match="parameter 0 of group 0 and parameter 2 of group 0 share memory"):
        optimizer.first_step()
    assert_same([p.detach() for p in params], before)


# ------------------------------------------------------------------ operations by themselves


def test_sums_into_one_place(backend):
    """One after the other, each reading what the one before has left."""
    total = torch.tensor([1.0, 2.0])
    out = [total, total]
    sk.combine_(out, [out, [torch.ones(2), torch.ones(2)]], [0.5, 1.0], backend=backend)
    assert total.tolist() == [1.75, 2.0]


def test_plain_additions_into_one_place_are_all_made(backend):
    weight = torch.zeros(3)
    sk.perturb_([weight, weight], [[torch.ones(3), torch.full((3,), 2.0)]], [1.0], backend=backend)
    assert weight.tolist() == [3.0] * 3


def test_expanded_parameters_are_refused_as_torch_refuses_them(backend):
    expanded = nn.Parameter(torch.ones(1).expand(3))
    (other,) = leaves((2,))
    optimizer = make([other, expanded], PLAIN_SGD, backend)
    before = other.detach().clone()
    backward([other, expanded])
    with pytest.raises(sk.UnsupportedTensorError, match="expanded"):
        optimizer.first_step()
    assert torch.equal(other, before)
    with pytest.raises(sk.UnsupportedTensorError, match="expanded"):
        sk.combine_([expanded.data], [[torch.ones(3)]], [1.0], backend=backend)
    assert sk.gram([[expanded.data]], backend=backend).item() == pytest.approx(3.0)
    expanded.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="single memory location"):
        torch.optim.SGD([expanded], lr=0.1).step()


def test_a_step_by_hand_with_a_shared_net():
    """Actor and critic over one body, whose parameters stand twice in the list."""
    net = make_net()
    optimizer = make([*net.parameters(), *net.layers[0].parameters()], Base(torch.optim.SGD, {"lr": 0.0}), None)
    before = weights_of(net)
    for batch in batches(3):
        step_by_hand(optimizer, net, batch)
    assert_same(weights_of(net), before)
