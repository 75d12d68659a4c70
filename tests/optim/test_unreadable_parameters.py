"""Parameters that no kernel can read, frozen in the list: torch's optimizers pass over what has no gradient."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import sam_kernels as sk
from sam_optim import SAM, SAMPa, TrainStep

from ..targets import target_named
from .bases import AMSGRAD, SGD, UNFUSED
from .cases import assert_same, batches, loss_of, make_net, weights_of
from .drivers import take_steps
from .methods import METHODS, named


class Wrapped(torch.Tensor):
    """A subclass that computes elsewhere, as those of quantised weights do."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        result = func(*(a.values if isinstance(a, cls) else a for a in args), **(kwargs or {}))
        return cls(result) if func is torch.ops.aten.detach.default else result


FROZEN = {
    "uint8": lambda: torch.randint(0, 9, (3, 4), dtype=torch.uint8),
    "int8": lambda: torch.zeros(5, dtype=torch.int8),
    "bool": lambda: torch.tensor(True),
    "float8": lambda: torch.ones(2, 2).to(torch.float8_e4m3fn),
    "meta": lambda: torch.ones(3, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "subclass": lambda: Wrapped(torch.ones(3)),
    "expanded": lambda: torch.ones(1, dtype=torch.float64).expand(4),
    "empty": lambda: torch.empty(0, dtype=torch.int32),
}


def frozen(name):
    return nn.Parameter(FROZEN[name](), requires_grad=False)


def lazy():
    return nn.LazyLinear(3).weight


def take(optimizer_of, backend="cpu", steps=3):
    net = make_net()
    optimizer = optimizer_of(net)
    take_steps(TrainStep(net, optimizer, loss_of), batches(steps), batches(steps, size=5))
    return weights_of(net), optimizer


def groups_with(params, others):
    """Before, among and behind the others, and in a group of their own."""
    params = list(params)
    return [{"params": [others[0], *params[:1], *others[1:3], *params[1:]]}, {"params": others[3:]}]


@pytest.mark.parametrize("base", [SGD, AMSGRAD, UNFUSED], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference", "foreach", "triton interpreter", "cuda shim"])
def test_steps_are_those_without_them(base, backend, request, monkeypatch):
    if " " in backend:
        backend = target_named(backend, request, monkeypatch).name
    with_others = [*map(frozen, FROZEN), lazy()]
    weights = []
    for others in ([], with_others):
        net = make_net()
        params = groups_with(net.parameters(), others) if others else [{"params": list(net.parameters())}]
        optimizer = SAM(params, base.cls, rho=0.1, backend=backend, **copy.deepcopy(base.settings))
        step = TrainStep(net, optimizer, loss_of)
        for number, batch in enumerate(batches(3)):
            step(batch)
            if number == 1:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        weights.append(weights_of(net))
        assert not any(p in optimizer.state for p in others)
    assert_same(*weights)


class NetWithFrozen(nn.Module):
    def __init__(self, others):
        super().__init__()
        for number, other in enumerate(others):
            self.register_parameter(f"weight_before_{number}", other)
        self.net = make_net()

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_makes_the_steps_without_them(method):
    weights = []
    for names in ([], FROZEN):
        net = NetWithFrozen([frozen(name) for name in names])
        take_steps(TrainStep(net, method.make(net, SGD), loss_of), batches(4), batches(4, size=5))
        weights.append(weights_of(net.net))
    assert_same(*weights)


@pytest.mark.parametrize("warm_start", ["gradient", "zero"])
def test_sampa_starts_without_them(warm_start):
    weights = []
    for names in ([], ["uint8", "float8", "meta"]):
        net = NetWithFrozen([frozen(name) for name in names])
        optimizer = SAMPa(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, warm_start=warm_start)
        take_steps(TrainStep(net, optimizer, loss_of), batches(4), batches(4))
        weights.append(weights_of(net.net))
    assert_same(*weights)


def test_masters_beside_them():
    weights = []
    for names in ([], ["uint8", "float8", "meta"]):
        net = NetWithFrozen([frozen(name) for name in names])
        net.net.to(torch.bfloat16)
        optimizer = named("SAM").make(net, SGD, master_weights=True)
        for batch in batches(3, torch.bfloat16):
            TrainStep(net, optimizer, loss_of)(batch)
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        weights.append(weights_of(net.net))
    assert_same(*weights)


@pytest.mark.parametrize("name", ["uint8", "meta", "sparse", "subclass"])
@pytest.mark.parametrize("backend", ["cpu", "reference", "foreach"])
def test_one_with_a_gradient_is_refused_by_name(name, backend):
    net = make_net()
    other = nn.Parameter(FROZEN[name](), requires_grad=False)
    named = [("quantised", other), *net.named_parameters()]
    optimizer = SAM(named, torch.optim.SGD, lr=0.1, backend=backend)
    loss_of(net, batches(1)[0]).backward()
    before = weights_of(net)
    plan = optimizer._params() and optimizer._plans.plan
    gradients = [torch.ones(other.shape), *(p.grad for p in net.parameters())]
    with pytest.raises(sk.UnsupportedTensorError, match="quantised"):
        sk.ascent_(plan, [gradients], snapshot=sk.Snapshot(plan), backend=backend)
    assert_same(weights_of(net), before)


def test_a_sparse_parameter_with_a_gradient():
    other = nn.Parameter(torch.eye(3).to_sparse())
    net = make_net()
    optimizer = SAM([*net.named_parameters(), ("table", other)], torch.optim.SGD, lr=0.1)
    (loss_of(net, batches(1)[0]) + torch.sparse.sum(other)).backward()
    before = weights_of(net)
    with pytest.raises(sk.UnsupportedTensorError, match="table is sparse"):
        optimizer.first_step()
    assert_same(weights_of(net), before)


@pytest.mark.parametrize("backend", ["cpu", "reference", "foreach"])
def test_parameters_that_become_readable_and_unreadable(backend):
    """A lazy module's run for the first time; a weight quantised after it was frozen, and back again."""
    module = nn.LazyLinear(3, dtype=torch.float64)
    other = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = SAM([*module.parameters(), other], torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)

    def expected(params):
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in params))
        return [p.detach() + 0.5 * p.grad / norm for p in params]

    def perturbs(params, compute):
        optimizer.zero_grad()
        compute().backward()
        wanted = expected(params)
        optimizer.first_step()
        for p, w in zip(params, wanted, strict=True):
            torch.testing.assert_close(p.detach(), w)
        optimizer.restore()

    perturbs([other], lambda: other.square().sum())
    x = torch.randn(4, 5, dtype=torch.float64)
    perturbs([*module.parameters(), other], lambda: module(x).square().sum() + other.sum())
    other.requires_grad_(False)
    other.data = torch.ones(2, dtype=torch.uint8)
    perturbs(list(module.parameters()), lambda: module(x).square().sum())
    other.data = torch.ones(3, dtype=torch.float64)
    other.requires_grad_(True)
    perturbs([*module.parameters(), other], lambda: module(x).square().sum() + other.sum())


def test_no_memory_is_kept_for_them():
    plan = sk.Plan([torch.zeros(1000, dtype=torch.uint8), torch.zeros(3)])
    assert list(plan.unreadable) == [0]
    assert sum(t.numel() for t in sk.Snapshot(plan).tensors) == 3


def test_a_sum_into_one_is_refused():
    with pytest.raises(sk.UnsupportedTensorError, match="int64"):
        sk.combine_([torch.zeros(2, dtype=torch.int64)], [[None]], [1.0])


def test_all_frozen():
    """Nothing happens, as with torch's optimizers."""
    other = frozen("uint8")
    before = other.detach().clone()
    for base in (torch.optim.SGD, torch.optim.AdamW):
        optimizer = SAM([other], base, rho=0.1, lr=0.1)
        optimizer.first_step()
        optimizer.second_step()
        assert torch.equal(other, before) and not optimizer.state
