"""Step hooks do what they do with torch's own optimizers: they see, and may change, what the update takes."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sam_optim import GSAM, SAM, WSAM, LookSAM, SAMPa, StepOrderError, TrainStep

from .bases import KINDS, PLAIN_SGD, SGD, UNFUSED
from .cases import assert_same, batches, by_every_pass_closure, loss_of, make_net, step_by_hand, weights_of
from .drivers import data_of_steps
from .methods import methods_with, named

CLIP = 0.05
PLACES = ["own", "base", "global"]


def clip_by_hand(params):
    """Clips to a norm by assigning, as many do."""
    params = [p for p in params if p.grad is not None]
    norm = torch.sqrt(sum((p.grad**2).sum() for p in params))
    for p in params:
        p.grad = p.grad * min(1.0, CLIP / norm.item())


def clip(optimizer, args, kwargs):
    clip_by_hand([p for group in optimizer.param_groups for p in group["params"]])


@contextmanager
def hooked(optimizer, where, hook=clip):
    base = getattr(optimizer, "base_optimizer", optimizer)
    register = {
        "own": optimizer.register_step_pre_hook,
        "base": base.register_step_pre_hook,
        "global": register_optimizer_step_pre_hook,
    }[where]
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def make(base, method=SAM, **settings):
    model = make_net()
    return model, method(model.parameters(), base.cls, **{"rho": 0.1, **copy.deepcopy(base.settings), **settings})


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("where", PLACES)
def test_rho_zero_is_the_base_with_the_same_hook(base, where):
    found = []
    for alone in (False, True):
        model = make_net(torch.float32)
        settings = copy.deepcopy(base.settings)
        if alone:
            optimizer = base.cls(model.parameters(), **settings)
        else:
            optimizer = SAM(model.parameters(), base.cls, rho=0.0, **settings)
        with hooked(optimizer, where):
            for batch in batches(4, torch.float32):
                if alone:
                    optimizer.zero_grad()
                    loss_of(model, batch).backward()
                    optimizer.step()
                else:
                    step_by_hand(optimizer, model, batch)
        found.append(weights_of(model))
    assert_same(*found)


def clipped_by_hand(optimizer, model, batch):
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, batch).backward()
    clip_by_hand(model.parameters())
    optimizer.second_step(zero_grad=True)


def by_step(optimizer, model, batch):
    loss_of(model, batch).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def by_second_pass_closure(optimizer, model, batch):
    loss_of(model, batch).backward()
    optimizer.step(lambda: loss_of(model, batch).backward())
    optimizer.zero_grad()


def by_every_pass(optimizer, model, batch):
    optimizer.closure_runs = "every_pass"
    by_every_pass_closure(optimizer, model, batch)
    optimizer.zero_grad()


def by_each_pass(optimizer, model, batch):
    for _ in optimizer.each_pass():
        loss_of(model, batch).backward()


def by_train_step(optimizer, model, batch):
    TrainStep(model, optimizer, loss_of)(batch)


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(
    "drive", [step_by_hand, by_step, by_second_pass_closure, by_every_pass, by_each_pass, by_train_step]
)
def test_the_update_takes_what_a_hook_assigns(base, where, drive):
    model, optimizer = make(base)
    with hooked(optimizer, where):
        for batch in batches(3):
            drive(optimizer, model, batch)
    wanted, by_hand = make(base)
    for batch in batches(3):
        clipped_by_hand(by_hand, wanted, batch)
    assert_same(weights_of(model), weights_of(wanted))


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("base", [SGD, UNFUSED], ids=str)
@pytest.mark.parametrize("method", methods_with(tells_last=True), ids=str)
def test_a_hook_sees_the_combination(method, base, where):
    """Every method: a hook changes what combine_gradients() would have given by hand."""
    found = []
    for by_hook in (True, False):
        model = make_net()
        optimizer = method.make(model, base)
        with hooked(optimizer, where if by_hook else "own", clip if by_hook else lambda *_: None):
            for data in data_of_steps(4):
                for p in optimizer.each_pass():
                    loss_of(model, data[p.data]).backward()
                    if p.last and not by_hook:
                        optimizer.combine_gradients()
                        clip_by_hand(model.parameters())
        found.append(weights_of(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("base", KINDS, ids=str)
def test_none_leaves_a_parameter_out(base):
    """A mask: what has no gradient after the hook is not updated, by weight decay neither."""

    def mask(optimizer, args, kwargs):
        for p in optimizer.param_groups[0]["params"]:
            if p.dim() == 1:
                p.grad = None

    model, optimizer = make(base)
    before = weights_of(model)
    with hooked(optimizer, "own", mask):
        for batch in batches(2):
            step_by_hand(optimizer, model, batch)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old) == (p.dim() == 1)


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("where", PLACES)
def test_hooks_see_and_may_write_the_weights_themselves(base, where):
    """L2 of one's own, and a decay of one's own through p.data, both of the unperturbed weights."""

    def decay(optimizer, args, kwargs):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = p.grad + 0.1 * p.detach()
            p.data.mul_(0.9)

    model, optimizer = make(base)
    with hooked(optimizer, where, decay):
        for batch in batches(3):
            step_by_hand(optimizer, model, batch)
    wanted, by_hand = make(base)
    for batch in batches(3):
        before = weights_of(wanted)
        loss_of(wanted, batch).backward()
        by_hand.first_step(zero_grad=True)
        loss_of(wanted, batch).backward()
        gradients = [p.grad for p in wanted.parameters()]
        by_hand.restore()
        plain = by_hand.base_optimizer
        with torch.no_grad():
            for p, w, g in zip(wanted.parameters(), before, gradients, strict=True):
                assert torch.equal(p, w)
                p.grad = g + 0.1 * w
                p.mul_(0.9)
        plain.step()
        plain.zero_grad()
    for a, b in zip(weights_of(model), weights_of(wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("where", ["own", "base"])
def test_what_a_hook_raises_leaves_the_weights(base, where):
    def fail(optimizer, args, kwargs):
        raise ValueError("no")

    model, optimizer = make(base)
    before = weights_of(model)
    with hooked(optimizer, where, fail), pytest.raises(ValueError, match="no"):
        step_by_hand(optimizer, model, batches(1)[0])
    assert_same(weights_of(model), before)
    optimizer.zero_grad()
    step_by_hand(optimizer, model, batches(1)[0])


@pytest.mark.parametrize("base", KINDS, ids=str)
def test_what_a_method_keeps_is_its_passes_own(base):
    """A hook that writes into p.grad changes the update, and not the directions that LookSAM and WSAM make later."""

    def vanish(optimizer, args, kwargs):
        for p in optimizer.param_groups[0]["params"]:
            p.grad.mul_(0.0)

    model, optimizer = make(base, LookSAM, k=2)
    with hooked(optimizer, "own", vanish):
        step_by_hand(optimizer, model, batches(1)[0])
    assert all(u.abs().sum() > 0 for u in optimizer.method_state("direction"))
    model, optimizer = make(PLAIN_SGD, WSAM)
    before = weights_of(model)
    with hooked(optimizer, "own", vanish):
        step_by_hand(optimizer, model, batches(1)[0])
    assert not any(torch.equal(a, b) for a, b in zip(weights_of(model), before, strict=True))


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("drive", [step_by_hand, by_step, by_second_pass_closure, by_every_pass, by_each_pass])
def test_order_and_number(base, drive):
    """Global hooks around the optimizer's own, and those around the base's; each once a step."""
    model, optimizer = make(base)
    inner, calls = optimizer.base_optimizer, []

    def note(name):
        return lambda o, args, kwargs: calls.append((name, o, args[0] is o))

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        inner.register_step_pre_hook(note("pre")),
        inner.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        for batch in batches(2):
            drive(optimizer, model, batch)
    finally:
        for handle in handles:
            handle.remove()
    wanted = [("global pre", optimizer), ("pre", optimizer), ("pre", inner)]
    wanted += [("post", inner), ("post", optimizer), ("global post", optimizer)]
    assert calls == [(*call, True) for call in wanted] * 2


@pytest.mark.parametrize("base", [SGD, UNFUSED], ids=str)
def test_a_look_ahead_is_no_step(base):
    model = make_net()
    optimizer = SAMPa(model.parameters(), base.cls, rho=0.1, **copy.deepcopy(base.settings))
    calls = []
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.base_optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    for batch in batches(4):
        by_every_pass_closure(optimizer, model, batch)
    assert calls == ["pre", "post"] * 3  # the first step makes no update


def test_post_hooks_see_the_whole_step():
    """Weighted SAM adds to the weights after the base's update, and a checkpoint may be taken there."""
    model, optimizer = make(SGD, WSAM)
    seen = []
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append((weights_of(model), o.state_dict())))
    for drive in (step_by_hand, by_step, by_second_pass_closure):
        drive(optimizer, model, batches(1)[0])
        assert_same(seen[-1][0], weights_of(model))


@pytest.mark.parametrize("base", KINDS, ids=str)
def test_grad_scaler(base):
    """Hooks see the unscaled gradient, as with torch's optimizers that leave the scale to GradScaler."""
    found = []
    for scale in (1.0, 1024.0):
        model, optimizer = make(base)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=True)
        with hooked(optimizer, "own"):
            for batch in batches(3):
                scaler.scale(loss_of(model, batch)).backward()
                optimizer.first_step(zero_grad=True)
                scaler.scale(loss_of(model, batch)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        found.append(weights_of(model))
    wanted, by_hand = make(base)
    for batch in batches(3):
        clipped_by_hand(by_hand, wanted, batch)
    for a, b in zip([*found[0], *found[1]], weights_of(wanted) * 2, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("base", KINDS, ids=str)
def test_an_overflow_is_skipped_whatever_a_hook_does(base):
    model, optimizer = make(base)
    before = weights_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def mend(o, args, kwargs):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    with hooked(optimizer, "own", mend):
        scaler.scale(loss_of(model, batches(1)[0])).backward()
        optimizer.first_step(zero_grad=True)
        scaler.scale(loss_of(model, batches(1)[0])).backward()
        next(model.parameters()).grad[0, 0] = torch.inf
        scaler.step(optimizer)
    assert_same(weights_of(model), before)
    assert not optimizer.last_step.updated


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("infinite", [0, 1])
def test_an_update_that_is_left_out_shows_nan(base, infinite):
    """Where the combination's Gram matrix is not finite; the weights and the base's state stay."""
    model, optimizer = make(base, GSAM)
    before, seen = weights_of(model), []
    optimizer.register_step_pre_hook(lambda *_: seen.append(all(p.grad.isnan().all() for p in model.parameters())))
    for number in range(2):
        loss_of(model, batches(1)[0]).backward()
        if number == infinite:
            next(model.parameters()).grad[0, 0] = torch.inf
        optimizer.second_step() if number else optimizer.first_step(zero_grad=True)
    assert seen == [True]
    assert_same(weights_of(model), before)
    assert not optimizer.last_step.updated and not optimizer.state


@pytest.mark.parametrize(
    "settings",
    [{}, {"micro_batches": 3}, {"micro_batches": 3, "perturbation": "micro_batch"}, {"scaler": 256.0}],
    ids=str,
)
@pytest.mark.parametrize("method", [named("SAM"), named("GSAM")], ids=str)
@pytest.mark.parametrize("base", [SGD, UNFUSED], ids=str)
def test_train_step(settings, method, base):
    """A hook that clips, and max_grad_norm."""
    found = []
    for by_hook in (True, False):
        settings = dict(settings)
        scale = settings.pop("scaler", None)
        if scale is not None:
            settings["scaler"] = torch.amp.GradScaler("cpu", init_scale=scale)
        model = make_net()
        optimizer = method.make(model, base)
        step = TrainStep(model, optimizer, loss_of, max_grad_norm=None if by_hook else CLIP, **settings)
        with hooked(optimizer, "own", clip if by_hook else lambda *_: None):
            for batch in batches(3):
                step(batch)
        found.append(weights_of(model))
        if scale is not None:
            settings["scaler"] = scale
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", PLACES)
def test_masters_follow_what_hooks_write(where):
    """A projection after each step, and a decay before it, on weights in bfloat16 with masters."""

    def decay(o, args, kwargs):
        for p in o.param_groups[0]["params"]:
            p.data.mul_(0.5)

    def project(o, args, kwargs):
        for p in o.param_groups[0]["params"]:
            p.data.clamp_(-0.25, 0.25)

    model = make_net(torch.bfloat16)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=1e-6, master_weights=True)
    before = weights_of(model)
    with hooked(optimizer, where, decay):
        step_by_hand(optimizer, model, batches(1, torch.bfloat16)[0])
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old * 0.5, rtol=0.0, atol=1e-2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.where(p >= 0, 0.5, -0.5))
    handle = (
        register_optimizer_step_post_hook(project)
        if where == "global"
        else (optimizer if where == "own" else optimizer.base_optimizer).register_step_post_hook(project)
    )
    try:
        step_by_hand(optimizer, model, batches(1, torch.bfloat16)[0])
    finally:
        handle.remove()
    step_by_hand(optimizer, model, batches(1, torch.bfloat16)[0])
    assert all((p.abs() <= 0.2501).all() for p in model.parameters())


def test_what_hooks_return():
    model, optimizer = make(SGD)
    before = weights_of(model)
    batch = batches(1)[0]
    with hooked(optimizer, "own", lambda o, args, kwargs: (args, kwargs)):
        step_by_hand(optimizer, model, batch)
    for result, error, message in (
        (3, RuntimeError, "must return None or a tuple"),
        (((optimizer, lambda: None), {}), StepOrderError, "gave step\\(\\) other arguments"),
    ):
        before = weights_of(model)
        hook = lambda o, args, kwargs, result=result: result  # noqa: E731
        with hooked(optimizer, "own", hook), pytest.raises(error, match=message):
            step_by_hand(optimizer, model, batch)
        assert_same(weights_of(model), before)
        optimizer.zero_grad()


def test_a_step_of_a_subclass_runs_hooks_once():
    class Counting(SAM):
        def step(self, closure=None, **more):
            return super().step(closure, **more)

    model = make_net()
    optimizer = Counting(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    for drive in (step_by_hand, by_step, by_second_pass_closure):
        drive(optimizer, model, batches(1)[0])
    assert calls == ["pre", "post"] * 3


def test_a_hook_may_remove_itself_and_change_settings():
    model, optimizer = make(PLAIN_SGD)
    before = weights_of(model)

    def once(o, args, kwargs):
        handle.remove()
        o.param_groups[0]["lr"] = 0.0

    handle = optimizer.register_step_pre_hook(once)
    step_by_hand(optimizer, model, batches(1)[0])
    assert_same(weights_of(model), before)
    optimizer.param_groups[0]["lr"] = 0.1
    step_by_hand(optimizer, model, batches(1)[0])
    assert not torch.equal(next(model.parameters()), before[0])


def test_hooks_of_parameters_act_in_their_passes():
    """Autograd's: they change the gradient of each pass, the first one too."""
    model, optimizer = make(SGD, WSAM)
    weight = next(model.parameters())
    weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    before = weight.detach().clone()
    model_of_sam, sam = make(PLAIN_SGD)
    first = next(model_of_sam.parameters())
    first.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", torch.zeros_like(p)))
    for batch in batches(2):
        by_each_pass(optimizer, model, batch)
        step_by_hand(sam, model_of_sam, batch)
    assert torch.equal(weight, before)
    assert torch.equal(first, before)


def test_no_hooks_no_cost():
    """Without pre-hooks the gradients are not gathered into p.grad."""
    model, optimizer = make(SGD, WSAM, decouple=False)
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, batches(1)[0]).backward()
    gradients = [p.grad for p in model.parameters()]
    copies = [g.clone() for g in gradients]
    optimizer.second_step()
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert_same(gradients, copies)


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("where", PLACES)
def test_a_learning_rate_that_a_pre_hook_sets_is_that_updates(where, base):
    """Schedulers that live in a hook; the same as setting it before the update."""

    def halve(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * group["lr"]

    (model, optimizer), (wanted, plain) = make(base), make(base)
    for batch in batches(3):
        with hooked(optimizer, where, halve):
            step_by_hand(optimizer, model, batch)
        loss_of(wanted, batch).backward()
        plain.first_step(zero_grad=True)
        loss_of(wanted, batch).backward()
        halve(plain, (), {})
        plain.second_step(zero_grad=True)
        assert_same(weights_of(model), weights_of(wanted))
