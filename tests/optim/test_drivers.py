"""Ways of driving a step, their order, closures, parameters, hooks and schedulers."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from sam_optim import SAM, InvalidSettingError, LambdaRho, Pass, RhoFollowsLR, StepOrderError

from .bases import ADAM, ADAMW, KINDS, SGD
from .cases import assert_same, batches, by_every_pass_closure, loss_of, make_net, step_by_hand, weights_of
from .methods import make_sam


def trajectory(drive, base=SGD, **settings):
    model, optimizer = make_sam(base, **settings)
    losses = [drive(optimizer, model, batch) for batch in batches(6)]
    return losses, weights_of(model)


def by_second_pass_closure(optimizer, model, batch):
    loss_of(model, batch).backward()

    def closure():
        loss = loss_of(model, batch)
        loss.backward()
        return loss.item()

    loss = optimizer.step(closure)
    optimizer.zero_grad()
    return loss


@pytest.mark.parametrize("base", KINDS, ids=str)
def test_all_drivers_give_the_same_bits(base):
    losses, weights = trajectory(step_by_hand, base)
    _, by_closure = trajectory(by_second_pass_closure, base)
    every_losses, by_every = trajectory(by_every_pass_closure, base, closure_runs="every_pass")

    def per_call(optimizer, model, batch):
        def closure():
            loss_of(model, batch).backward()

        return optimizer.step(closure, closure_runs="every_pass"), optimizer.zero_grad()

    losses_of_none, by_call = trajectory(per_call, base)
    assert_same(weights, by_closure)
    assert_same(weights, by_every)
    assert_same(weights, by_call)
    assert losses == every_losses
    assert all(loss is None for loss, _ in losses_of_none)


def test_second_pass_closure_returns_its_loss():
    model, optimizer = make_sam()
    batch = batches(1)[0]
    loss_of(model, batch).backward()
    perturbed_losses = []

    def closure():
        assert torch.is_grad_enabled()
        loss = loss_of(model, batch)
        loss.backward()
        perturbed_losses.append(loss)
        return loss

    first = loss_of(model, batch).item()
    assert optimizer.step(closure) is perturbed_losses[0]
    assert perturbed_losses[0].item() > first


def test_every_pass_uses_the_same_dropout_draw():
    model, optimizer = make_sam(model=make_net(dropout=0.5), closure_runs="every_pass")
    draws = []
    model.layers[2].register_forward_hook(lambda module, args, output: draws.append((output == 0).clone()))
    for batch in batches(2):
        by_every_pass_closure(optimizer, model, batch)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[2], draws[3])
    assert not torch.equal(draws[0], draws[2])


def test_step_without_closure_completes_a_begun_step():
    _, weights = trajectory(step_by_hand)

    def drive(optimizer, model, batch):
        loss_of(model, batch).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(model, batch).backward()
        assert optimizer.step() is None
        optimizer.zero_grad()

    assert_same(trajectory(drive)[1], weights)


def test_a_begun_step_can_be_completed_by_a_closure():
    _, weights = trajectory(step_by_hand)

    def drive(optimizer, model, batch):
        loss_of(model, batch).backward()
        optimizer.first_step(zero_grad=True)
        optimizer.step(lambda: loss_of(model, batch).backward())
        optimizer.zero_grad()

    assert_same(trajectory(drive)[1], weights)


def test_a_step_that_is_not_made_by_whoever_was_to_make_it():
    model, optimizer = make_sam()
    before = weights_of(model)
    with pytest.raises(StepOrderError, match="did not call this optimizer's step"):
        for _ in optimizer.each_pass(step=lambda: None):
            loss_of(model, batches(1)[0]).backward()
    assert_same(weights_of(model), before)
    assert not optimizer.is_step_begun
    step_by_hand(optimizer, model, batches(1)[0])


def test_advance_tells_the_next_pass():
    model, optimizer = make_sam()
    batch = batches(1)[0]
    loss_of(model, batch).backward()
    assert optimizer.waiting is None
    assert optimizer.advance(zero_grad=True) == Pass(perturbed=True, last=True) == optimizer.waiting
    loss_of(model, batch).backward()
    assert optimizer.advance() is None
    assert not optimizer.is_step_begun


# ---------------------------------------------------------------- order of calls


def test_calls_out_of_order():
    model, optimizer = make_sam()
    before = weights_of(model)
    batch = batches(1)[0]
    with pytest.raises(StepOrderError, match="none is begun"):
        optimizer.step()
    with pytest.raises(StepOrderError, match="without first_step"):
        optimizer.second_step()
    with pytest.raises(StepOrderError, match="no parameter has a gradient"):
        optimizer.first_step()
    with pytest.raises(StepOrderError, match="every_pass"):
        optimizer.step(lambda: loss_of(model, batch).backward())
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(StepOrderError, match="first_step\\(\\) was called although"):
        optimizer.first_step()
    assert_same(weights_of(model), before)
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(StepOrderError, match="no parameter has a gradient for pass 2"):
        optimizer.second_step()
    assert_same(weights_of(model), before)


def test_mid_step_state_is_refused():
    model, optimizer = make_sam()
    before = weights_of(model)
    saved = optimizer.state_dict()
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step()
    for action in (
        optimizer.state_dict,
        lambda: optimizer.load_state_dict(saved),
        lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
        lambda: copy.deepcopy(optimizer),
    ):
        with pytest.raises(StepOrderError, match="in the middle of a step"):
            action()
    optimizer.restore()
    assert_same(weights_of(model), before)
    optimizer.state_dict()


def test_a_closure_that_reuses_the_graph_is_told_so():
    model, optimizer = make_sam()
    before = weights_of(model)
    loss = loss_of(model, batches(1)[0])
    loss.backward()
    with pytest.raises(StepOrderError, match="run the forward pass again"):
        optimizer.step(loss.backward)
    assert_same(weights_of(model), before)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_closure_that_keeps_its_graph_is_told_so(layers):
    """Through one layer torch sees nothing wrong: the second gradient would be the first once more."""
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(layers)])
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, closure_runs="every_pass")
    before = weights_of(model)
    loss = model(torch.randn(4, 3)).square().mean()

    def closure():
        loss.backward(retain_graph=True)
        return loss

    with pytest.raises(RuntimeError) as raised:
        optimizer.step(closure)
    assert "run the forward pass again" in " ".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert_same(weights_of(model), before)


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("base", [*KINDS, ADAM], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_parameters_without_a_gradient_in_one_pass(base, backend):
    weights = [nn.Parameter(torch.full((3,), 2.0)) for _ in range(4)]
    optimizer = SAM(weights, base.cls, rho=1.0, backend=backend, **copy.deepcopy(base.settings))
    both, only_first, only_second, neither = weights
    for _ in range(2):
        start = [w.detach().clone() for w in weights]
        both.grad, only_first.grad = torch.ones(3), torch.ones(3)
        optimizer.first_step(zero_grad=True)
        assert not torch.equal(only_first, start[1])
        assert torch.equal(only_second, start[2])
        both.grad, only_second.grad = torch.ones(3), torch.ones(3)
        optimizer.second_step(zero_grad=True)
        assert torch.equal(only_first, start[1])
        assert torch.equal(neither, start[3])
        assert not torch.equal(only_second, start[2])
        assert not torch.equal(both, start[0])
        # Momentum and moments start with each parameter's first update.
        assert torch.allclose(both, only_second)
    assert only_first not in optimizer.state or not optimizer.state[only_first]


def test_empty_and_added_groups():
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = SAM([{"params": [a]}, {"params": []}], torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.5)
    for group in ({"params": [b], "rho": 0.1, "lr": 0.2}, {"params": c, "perturb": False}):
        for p in (a, b, c):
            p.grad = torch.ones(2)
        optimizer.first_step()
        optimizer.second_step()
        optimizer.add_param_group(group)
    assert [group["rho"] for group in optimizer.param_groups] == [0.5, 0.5, 0.1, 0.5]
    assert optimizer.param_groups[2]["momentum"] == 0.9
    c_before = c.detach().clone()
    optimizer.first_step()
    assert torch.equal(c, c_before)
    optimizer.second_step()
    with pytest.raises(InvalidSettingError, match="rho"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": -1.0})


def test_groups_are_the_base_optimizers_own():
    _, optimizer = make_sam()
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.state is optimizer.base_optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    optimizer.param_groups[0]["lr"] = 0.7
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.7
    assert optimizer.defaults["momentum"] == 0.9
    assert optimizer.defaults["rho"] == 0.1
    assert "rho: 0.1" in repr(optimizer)


def test_base_as_instance_and_as_factory():
    _, wanted = trajectory(step_by_hand)
    import functools

    for build in (
        lambda params: torch.optim.SGD(params, **SGD.settings),
        functools.partial(torch.optim.SGD, **SGD.settings),
    ):
        model = make_net()
        base = build(list(model.parameters())) if not isinstance(build, functools.partial) else build
        optimizer = SAM(model.parameters(), base, rho=0.1)
        for batch in batches(6):
            step_by_hand(optimizer, model, batch)
        assert_same(weights_of(model), wanted)


def test_base_instance_keeps_its_state():
    model = make_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss_of(model, batches(1)[0]).backward()
    base.step()
    buffers = [base.state[p]["momentum_buffer"] for p in model.parameters()]
    optimizer = SAM(model.named_parameters(), base, rho=0.1)
    assert all(optimizer.state[p]["momentum_buffer"] is b for p, b in zip(model.parameters(), buffers, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, "Invalid rho: -0.1"),
        ({"rho": -0.1}, AssertionError, "Invalid rho: -0.1"),
        ({"rho": float("nan")}, ValueError, "Invalid rho: nan"),
        ({"adaptive": "sometimes"}, ValueError, "Invalid adaptive"),
        ({"adaptive": "weights"}, ValueError, "named_parameters"),
        ({"eta": -1.0}, ValueError, "Invalid eta"),
        ({"perturb_eps": -1.0}, ValueError, "Invalid perturb_eps"),
        ({"closure_runs": "never"}, ValueError, "Invalid closure_runs"),
        ({"base_optimizer": torch.optim.LBFGS}, TypeError, "LBFGS"),
        ({"base_optimizer": 3}, TypeError, "class or instance"),
        ({"base_optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), "lr": None}, TypeError, "lr"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate"),
    ],
)
def test_settings_out_of_range(arguments, error, message):
    arguments = {"base_optimizer": torch.optim.SGD, "lr": 0.1, **arguments}
    with pytest.raises(error, match=message):
        SAM([nn.Parameter(torch.ones(2))], **arguments)


def test_instances_that_do_not_fit():
    mine, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="other parameters"):
        SAM([mine], torch.optim.SGD([other], lr=0.1))
    with pytest.raises(ValueError, match="0 that are not among params, and 1 of these are missing"):
        SAM(iter([mine, other]), torch.optim.SGD([mine], lr=0.1))
    other.requires_grad_(False)
    optimizer = SAM(iter([mine, other]), torch.optim.SGD([mine], lr=0.1), rho=0.1)  # as under LoRA
    assert [p for group in optimizer.param_groups for p in group["params"]] == [mine]
    with pytest.raises(TypeError, match="wraps another"):
        SAM([mine], SAM([mine], torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match="empty parameter list"):
        SAM([], torch.optim.SGD, lr=0.1)


def test_rho_set_out_of_range_later():
    model, optimizer = make_sam()
    before = weights_of(model)
    optimizer.param_groups[0]["rho"] = -1.0
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(InvalidSettingError, match="Invalid rho"):
        optimizer.first_step()
    assert_same(weights_of(model), before)
    assert not optimizer.is_step_begun


# ---------------------------------------------------------------- hooks and schedulers


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("on_base", [False, True])
def test_schedulers_give_no_spurious_warning(base, on_base):
    model, optimizer = make_sam(base)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base_optimizer if on_base else optimizer, 1, gamma=0.5)
    start = float(optimizer.param_groups[0]["lr"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(3):
            step_by_hand(optimizer, model, batch)
            scheduler.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(start / 8)


def test_one_cycle_scheduler_finds_the_momentum():
    model, optimizer = make_sam()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    step_by_hand(optimizer, model, batches(1)[0])
    scheduler.step()
    assert optimizer.param_groups[0]["momentum"] != 0.9


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("drive", [step_by_hand, by_second_pass_closure])
def test_step_hooks_fire_once_a_step(base, drive):
    model, optimizer = make_sam(base)
    calls = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", o)))
    optimizer.base_optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o)))
    optimizer.base_optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", o)))
    for batch in batches(2):
        drive(optimizer, model, batch)
    own, inner = optimizer, optimizer.base_optimizer
    assert calls == [("pre", own), ("pre", inner), ("post", inner), ("post", own)] * 2


def test_rho_follows_a_schedule():
    model, optimizer = make_sam()
    schedule = LambdaRho(optimizer, lambda step: min(1.0, step / 4))
    seen = []
    for batch in batches(6):
        seen.append(schedule.get_last_rho()[0])
        start = weights_of(model)
        loss_of(model, batch).backward()
        optimizer.first_step(zero_grad=True)
        moved = torch.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(weights_of(model), start, strict=True)))
        assert moved.item() == pytest.approx(seen[-1], abs=1e-12)
        loss_of(model, batch).backward()
        optimizer.second_step(zero_grad=True)
        schedule.step()
    assert seen == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1, 0.1])
    _, resumed = make_sam()
    resumed.load_state_dict(optimizer.state_dict())
    other = LambdaRho(resumed, lambda step: min(1.0, step / 4))
    other.load_state_dict(schedule.state_dict())
    assert resumed.param_groups[0]["rho"] == optimizer.param_groups[0]["rho"]


def test_rho_follows_the_learning_rate():
    model, optimizer = make_sam(lr=0.4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    schedule = RhoFollowsLR(optimizer, rho_min=0.02)
    seen = []
    for batch in batches(4):
        seen.append(optimizer.param_groups[0]["rho"])
        step_by_hand(optimizer, model, batch)
        scheduler.step()
        schedule.step()
    assert seen == pytest.approx([0.1, 0.08, 0.06, 0.04])
    with pytest.raises(InvalidSettingError, match="lr_max"):
        RhoFollowsLR(optimizer, lr_max=0.0)


@pytest.mark.parametrize("schedule", [lambda o: LambdaRho(o, lambda step: 0.5**step), RhoFollowsLR])
def test_a_group_that_is_added_later_follows_the_schedule(schedule):
    weights = list(make_net().parameters())
    optimizer = SAM(weights[:1], torch.optim.SGD, rho=0.1, lr=0.4)
    schedule = schedule(optimizer)
    optimizer.add_param_group({"params": weights[1:], "rho": 0.2, "lr": 0.2})
    schedule.step()
    expected = [0.05, 0.1] if isinstance(schedule, LambdaRho) else [0.1, 0.2]
    assert [group["rho"] for group in optimizer.param_groups] == pytest.approx(expected)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    schedule.step()
    assert [group["rho"] for group in optimizer.param_groups] == pytest.approx([v / 2 for v in expected])


def test_one_function_for_each_group_needs_one_for_a_new_group_too():
    weights = list(make_net().parameters())
    optimizer = SAM(weights[:1], torch.optim.SGD, rho=0.1, lr=0.4)
    schedule = LambdaRho(optimizer, [lambda step: 0.5**step])
    optimizer.add_param_group({"params": weights[1:]})
    with pytest.raises(InvalidSettingError, match=r"1 functions for 2 groups.*rho_lambdas"):
        schedule.step()
    schedule.rho_lambdas.append(lambda step: 1.0)
    schedule.step()
    assert [group["rho"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.1])


def test_a_rho_that_is_a_tensor_is_written_into():
    """A CUDA graph goes on reading the tensor that it was recorded with. Groups that share a default part."""
    first, second = next(make_net().parameters()), nn.Parameter(torch.ones(3))
    rho = torch.tensor(0.2)
    optimizer = SAM([{"params": [first]}, {"params": [second], "lr": 0.4}], torch.optim.SGD, rho=rho, lr=0.1)
    by_step = LambdaRho(optimizer, [lambda step: 0.5**step, lambda step: 0.25**step])
    by_step.step()
    by_step.step()
    assert optimizer.param_groups[0]["rho"] is rho
    assert by_step.get_last_rho() == pytest.approx([0.05, 0.0125])
    by_lr = RhoFollowsLR(optimizer)
    for lr, expected in ((0.05, 0.1), (0.1, 0.2)):
        optimizer.param_groups[0]["lr"] = lr
        by_lr.step()
        assert optimizer.param_groups[0]["rho"] is rho and rho.item() == pytest.approx(expected)


def warm_up_and_cosine(optimizer):
    schedulers = torch.optim.lr_scheduler
    warm_up = schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    return schedulers.SequentialLR(optimizer, [warm_up, schedulers.CosineAnnealingLR(optimizer, 8)], [4])


LR_SCHEDULES = {
    "linear warm-up and cosine": warm_up_and_cosine,
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[0.8, 0.2], total_steps=20),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: min((t + 1) / 4, 1.0) * 0.8 ** max(t - 3, 0)),
    "falling": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
}


@pytest.mark.parametrize("name", LR_SCHEDULES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_rho_follows_torchs_schedulers(name, as_tensor):
    """Made before or after them: rho is to rho_max as lr to its maximum, in every step and in each group."""
    model = make_net()
    lrs = [torch.tensor(v, dtype=torch.float64) if as_tensor else v for v in (0.4, 0.1)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(list(model.parameters())[:2], lrs, strict=True)]
    optimizer = SAM(groups, torch.optim.SGD, rho=0.3, lr=0.4, momentum=0.9)
    scheduler = LR_SCHEDULES[name](optimizer)
    follower = RhoFollowsLR(optimizer)
    history = []
    for batch in batches(12):
        history.append([(float(g["lr"]), g["rho"]) for g in optimizer.param_groups])
        step_by_hand(optimizer, model, batch)
        scheduler.step()
        follower.step()
    peaks = [0.8, 0.2] if name == "one cycle" else [0.4, 0.1]
    for column, peak in zip(zip(*history, strict=True), peaks, strict=True):
        largest = max(lr for lr, _ in column)
        assert largest == pytest.approx(peak)
        for lr, rho in column:
            assert rho == pytest.approx(0.3 * lr / largest, rel=1e-9)
        assert min(rho for _, rho in column) < 0.1


def test_copies_and_pickles_go_on_alike():
    model, optimizer = make_sam(ADAMW)
    data = batches(4)
    step_by_hand(optimizer, model, data[0])
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for batch in data[1:]:
        step_by_hand(optimizer, model, batch)
    for other_model, other in pairs:
        for batch in data[1:]:
            step_by_hand(other, other_model, batch)
        assert_same(weights_of(model), weights_of(other_model))
