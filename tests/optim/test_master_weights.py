"""Float32 masters of a model in bfloat16: the same steps as a float32 model that is rounded where it is evaluated."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from sam_optim import SAM, InvalidSettingError, TrainStep
from sam_optim.training.streams import OneLane

from .bases import ADAMW, FUSED, SGD
from .cases import assert_same, batches, loss_of, make_net, step_by_hand, weights_of
from .drivers import by_train_step, data_of_steps
from .methods import methods_with, named
from .stand_ins import Replayed


class Rounded(nn.Module):
    """A float32 model, evaluated at its weights' roundings to bfloat16; gradients are those at the roundings."""

    def __init__(self, net):
        super().__init__()
        self.net, self.shape = net, copy.deepcopy(net).to(torch.bfloat16)
        for p in self.shape.parameters():
            p.requires_grad_(False)

    def forward(self, x):
        return torch.func.functional_call(
            self.shape, {name: p.to(torch.bfloat16) for name, p in self.net.named_parameters()}, x
        )

    def named_parameters(self, *args, **kwargs):
        return self.net.named_parameters(*args, **kwargs)


def make_pair():
    """A model in bfloat16, and one in float32 whose weights are the same now."""
    low = make_net(torch.bfloat16)
    return low, Rounded(make_net(torch.bfloat16).float())


def masters_of(optimizer):
    """Wherever a state dict has them: among the base's entries, or by themselves where it has none."""
    saved = optimizer.state_dict()
    count = sum(len(group["params"]) for group in saved["param_groups"])
    alone = saved.get("method_state", {}).get("master_weights", [None] * count)
    return [saved["state"].get(i, {}).get("sam_optim_master_weights", alone[i]) for i in range(count)]


def state_of(optimizer):
    """The base's: masters stand beside it under another name."""
    found = [v for entries in optimizer.state.values() for k, v in entries.items() if not k.startswith("sam_optim_")]
    return [v for v in found if isinstance(v, torch.Tensor)]


def assert_masters_fit(model, optimizer):
    for p, master in zip(model.parameters(), masters_of(optimizer), strict=True):
        assert p.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(p, master.bfloat16())


def both(method, base, steps=6, **options):
    low, wide = make_pair()
    own, wanted = method.make(low, base, master_weights=True), method.make(wide, base)
    data = data_of_steps(steps, torch.bfloat16)
    own_losses = by_train_step(own, low, data, **options)
    torch.testing.assert_close(own_losses, by_train_step(wanted, wide, data), rtol=0.0, atol=0.0)
    assert_masters_fit(low, own)
    assert_same(masters_of(own), weights_of(wide.net))
    assert_same(state_of(own), state_of(wanted))
    return low, own


@pytest.mark.parametrize("base", FUSED, ids=str)
@pytest.mark.parametrize("method", [named("SAM"), named("SAM adaptive")], ids=str)
def test_same_bits_as_a_rounded_float32_model(method, base):
    both(method, base)


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=str)
# torch's own kernels make the plain steps of a model without masters, and round otherwise.
@pytest.mark.parametrize("method", methods_with(has_plain_steps=False), ids=str)
def test_every_method(method, base):
    both(method, base)


@pytest.mark.parametrize("passes", ["sequential", "streams"])
@pytest.mark.parametrize("capture", [False, True])
def test_every_driver(monkeypatch, passes, capture):
    monkeypatch.setattr(TrainStep, "_make_lanes", lambda self: OneLane())
    monkeypatch.setattr(TrainStep, "_make_recorder", lambda self: Replayed())
    both(named("SAMPa"), SGD, passes=passes, capture=capture)


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=str)
def test_rho_zero_is_the_base_on_the_masters(base):
    low, wide = make_pair()
    own = named("SAM").make(low, base, rho=0.0, master_weights=True)
    plain = base.cls(wide.parameters(), **base.settings)
    for batch in batches(6, torch.bfloat16):
        step_by_hand(own, low, batch)
        loss_of(wide, batch).backward()
        plain.step()
        plain.zero_grad()
    for a, b in zip(masters_of(own), weights_of(wide.net), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert_masters_fit(low, own)


def test_mixed_models():
    """Weights in float32 have copies as ever."""
    low, wide = make_pair()
    for model in (low, wide.net, wide.shape):
        model.layers[3].float()
    wide.forward = lambda x: torch.func.functional_call(
        wide.shape, {n: p if n.startswith("layers.3") else p.bfloat16() for n, p in wide.net.named_parameters()}, x
    )

    class Cast(nn.Module):
        def forward(self, x):
            return x.float()

    low.layers[2] = wide.net.layers[2] = wide.shape.layers[2] = Cast()
    own = SAM(low.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9, master_weights=True)
    wanted = SAM(wide.net.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9)
    for batch in batches(5, torch.bfloat16):
        step_by_hand(own, low, batch)
        step_by_hand(wanted, wide, batch)
    masters = masters_of(own)
    assert [m is None for m in masters] == [False, False, True, True]
    assert_same([*masters[:2], *weights_of(low)[2:]], weights_of(wide.net))


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("method", [named("SAM"), named("FriendlySAM"), named("SAMPa")], ids=str)
def test_resume_is_bit_exact(order, method):
    model = make_net(torch.bfloat16)
    optimizer = method.make(model, ADAMW, master_weights=True)
    data = data_of_steps(6, torch.bfloat16)
    by_train_step(optimizer, model, data[:3])
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    torch.manual_seed(5)
    other = make_net(torch.bfloat16)
    nn.init.normal_(other.layers[0].weight)
    resumed = method.make(other, ADAMW, master_weights=True)
    if order == "model first":
        other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert_same(masters_of(resumed), masters_of(optimizer))
    if order == "optimizer first":
        other.load_state_dict(weights)
    by_train_step(optimizer, model, data[3:])
    by_train_step(resumed, other, data[3:])
    assert_same(masters_of(resumed), masters_of(optimizer))
    assert_same(weights_of(other), weights_of(model))
    assert_same(state_of(resumed), state_of(optimizer))


def test_copies_go_on_alike():
    model = make_net(torch.bfloat16)
    optimizer = named("SAM").make(model, SGD, master_weights=True)
    for batch in batches(3, torch.bfloat16):
        step_by_hand(optimizer, model, batch)
    other, copied = copy.deepcopy((model, optimizer))
    assert_same(masters_of(copied), masters_of(optimizer))
    for batch in batches(5, torch.bfloat16)[3:]:
        step_by_hand(optimizer, model, batch)
        step_by_hand(copied, other, batch)
    assert_same(masters_of(copied), masters_of(optimizer))


def test_to_and_from_plain_torch():
    model = make_net(torch.bfloat16)
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    for batch in batches(2, torch.bfloat16):
        loss_of(model, batch).backward()
        plain.step()
        plain.zero_grad()
    optimizer = named("SAM").make(model, ADAMW, master_weights=True)
    optimizer.load_state_dict(plain.state_dict())
    assert all(v.dtype == torch.float32 for v in state_of(optimizer))
    assert_same([v.bfloat16() for v in state_of(optimizer) if v.dim()], [v for v in state_of(plain) if v.dim()])
    step_by_hand(optimizer, model, batches(1, torch.bfloat16)[0])
    assert_masters_fit(model, optimizer)
    plain.load_state_dict(optimizer.state_dict())
    assert all(v.dtype == torch.bfloat16 for v in state_of(plain) if v.dim())

    instance = SAM(model.parameters(), plain, rho=0.1, master_weights=True)
    assert all(v.dtype == torch.float32 for v in state_of(instance))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hundreds_of_steps_with_lr_zero_keep_every_bit(dtype):
    model = make_net(dtype)
    optimizer = named("SAM adaptive").make(model, SGD, master_weights=True, lr=0.0)
    step_by_hand(optimizer, model, batches(1, dtype)[0])
    for master in masters_of(optimizer):
        master.mul_(1 + 2.0**-15)  # low bits that the weights do not have
    optimizer.catch_up(unseen=True)
    weights, masters = weights_of(model), [m.clone() for m in masters_of(optimizer)]
    assert any(not torch.equal(m, p.float()) for m, p in zip(masters, weights, strict=True))
    for batch in batches(10, dtype) * 30:
        step_by_hand(optimizer, model, batch)
    assert_same(weights_of(model), weights)
    assert_same(masters_of(optimizer), masters)


@pytest.mark.parametrize("failing", [1, 2])
def test_exceptions_leave_weights_and_masters(failing):
    model = make_net(torch.bfloat16)
    optimizer = named("SAM").make(model, SGD, master_weights=True, closure_runs="every_pass")
    batch = batches(1, torch.bfloat16)[0]
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        if calls == failing:
            raise KeyboardInterrupt
        return 0.0

    weights = weights_of(model)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert_same(weights_of(model), weights)
    assert_same(masters_of(optimizer), [w.float() for w in weights])


def test_weights_that_somebody_else_writes():
    """load_state_dict, init, manual edits: the masters follow, and only where something was written."""
    model = make_net(torch.bfloat16)
    optimizer = named("SAM").make(model, SGD, master_weights=True)
    for batch in batches(3, torch.bfloat16):
        step_by_hand(optimizer, model, batch)
    before = [m.clone() for m in masters_of(optimizer)]
    with torch.no_grad():
        model.layers[0].weight[0].zero_()
    masters = masters_of(optimizer)
    assert (masters[0][0] == 0).all() and torch.equal(masters[0][1:], before[0][1:])
    assert_same(masters[1:], before[1:])

    model.layers[3].bias.data.fill_(0.5)
    assert torch.equal(masters_of(optimizer)[3], before[3]), "autograd cannot see this"
    optimizer.catch_up(unseen=True)
    assert (masters_of(optimizer)[3] == 0.5).all()

    model.layers[3].weight.data = torch.ones(3, 33, dtype=torch.bfloat16)
    step_by_hand(optimizer, model, batches(1, torch.bfloat16)[0])
    assert (model.layers[3].weight - 1).abs().max() < 0.1
    assert_masters_fit(model, optimizer)


def test_abandoned_steps_do_not_hide_writes():
    model = make_net(torch.bfloat16)
    optimizer = named("SAM").make(model, SGD, master_weights=True)
    step_by_hand(optimizer, model, batches(1, torch.bfloat16)[0])
    with torch.no_grad():
        model.layers[3].bias.fill_(0.5)
    optimizer.restore()  # nothing is begun
    step_by_hand(optimizer, model, batches(1, torch.bfloat16)[0])
    assert (model.layers[3].bias - 0.5).abs().max() < 0.1


def test_added_groups_and_changed_types():
    model = make_net(torch.bfloat16)
    optimizer = SAM(model.layers[0].parameters(), torch.optim.SGD, rho=0.1, lr=0.05, master_weights=True)
    batch = batches(1, torch.bfloat16)[0]
    step_by_hand(optimizer, model, batch)
    before = [m.clone() for m in masters_of(optimizer)]
    optimizer.add_param_group({"params": list(model.layers[3].parameters())})
    masters = masters_of(optimizer)
    assert_same(masters[:2], before)
    step_by_hand(optimizer, model, batch)
    assert_masters_fit(model, optimizer)
    model.float()
    step_by_hand(optimizer, model, batches(1, torch.float32)[0])
    assert masters_of(optimizer) == [None] * 4


def test_grad_scaler_with_float16():
    """An overflow leaves weights and masters; later steps are made."""
    model = make_net(torch.float16)
    optimizer = named("SAM").make(model, SGD, master_weights=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    updates = 0
    for batch in batches(12, torch.float16):
        before = weights_of(model)
        scaler.scale(loss_of(model, batch)).backward()
        optimizer.first_step(zero_grad=True)
        scaler.scale(loss_of(model, batch)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if optimizer.last_step.updated:
            updates += 1
        else:
            assert_same(weights_of(model), before)
        for p, master in zip(model.parameters(), masters_of(optimizer), strict=True):
            assert torch.equal(p, master.half())
    assert 0 < updates < 12


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_perturbation_is_not_lost(backend):
    """Weights in bfloat16 near 1 take no perturbation of 2^-9 on average; their masters do."""
    torch.manual_seed(0)
    masters = 1.0 + torch.rand(20_000) * 0.5
    kept = []
    for has_masters in (False, True):
        weight = nn.Parameter(masters.bfloat16())
        optimizer = SAM([weight], torch.optim.SGD, rho=0.1, lr=0.1, master_weights=has_masters, backend=backend)
        if has_masters:
            state = optimizer.state_dict()
            state["method_state"] = {"master_weights": [masters]}
            optimizer.load_state_dict(state)
        before = weight.detach().float()
        gradient = torch.ones_like(weight)
        weight.grad = gradient
        optimizer.first_step()
        wanted = 0.1 / 20_000**0.5
        kept.append((weight.detach().float() - before).mean().item() / wanted)
        optimizer.restore()
    assert kept[0] == 0.0
    assert abs(kept[1] - 1.0) < 0.2


def test_what_cannot_have_masters():
    model = make_net(torch.bfloat16)
    for base in (torch.optim.RAdam, torch.optim.Adagrad):
        with pytest.raises(InvalidSettingError, match=r"that the kernels know \(SGD, Adam, "):
            SAM(model.parameters(), base, rho=0.1, lr=0.1, master_weights=True)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, master_weights=True)
    optimizer.param_groups[0]["differentiable"] = True
    before = weights_of(model)
    loss_of(model, batches(1, torch.bfloat16)[0]).backward()
    optimizer.first_step()
    with pytest.raises(InvalidSettingError):
        optimizer.step()
    assert_same(weights_of(model), before)
