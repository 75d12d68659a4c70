"""What training loops do around the optimizer: GradScaler, accumulation, resume, clipping, low precision."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from sam_optim import (
    SAM,
    FriendlySAM,
    StepOrderError,
)

from .bases import ADAMW, AMSGRAD, BASES, KINDS, PLAIN_SGD, SGD, UNFUSED
from .cases import assert_same, batches, loss_of, make_net, step_by_hand, weights_of

FUSED_AND_NOT = [SGD, AMSGRAD, ADAMW, UNFUSED]


def make(base, dtype=torch.float64, **settings):
    model = make_net(dtype)
    return model, SAM(model.parameters(), base.cls, **{"rho": 0.1, **copy.deepcopy(base.settings), **settings})


# ---------------------------------------------------------------- GradScaler


def scaled_step(optimizer, model, batch, scaler, clip=None, autocast=True):
    def backward():
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
            loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        return loss.item()

    loss = backward()
    optimizer.first_step(zero_grad=True)
    backward()
    if clip is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss


@pytest.mark.parametrize("base", FUSED_AND_NOT, ids=str)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_grad_scaler(base, clip):
    """A power of two as the scale changes nothing, so the run equals the one without a scaler."""
    results = []
    for enabled in (True, False):
        model, optimizer = make(base, torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3, enabled=enabled)
        for batch in batches(8, torch.float32):
            scaled_step(optimizer, model, batch, scaler, clip, autocast=False)
            assert optimizer.last_step.updated
        results.append(weights_of(model))
        assert not hasattr(optimizer, "grad_scale")
        if enabled:
            assert scaler.get_scale() == 2.0**10
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", FUSED_AND_NOT, ids=str)
def test_float16_autocast_trains(base):
    model, optimizer = make(base, torch.float32, maximize=False)
    scaler = torch.amp.GradScaler("cpu")
    batch = batches(1, torch.float32)[0]
    losses = [scaled_step(optimizer, model, batch, scaler) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("base", FUSED_AND_NOT, ids=str)
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("overflow_in", ["second", "both"])
def test_overflow_skips_the_update_and_restores(base, clip, overflow_in):
    model, optimizer = make(base, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    data = batches(3, torch.float32)
    scaled_step(optimizer, model, data[0], scaler)
    before, state = weights_of(model), copy.deepcopy(optimizer.state_dict()["state"])

    def backward(overflow):
        scaler.scale(loss_of(model, data[1])).backward()
        if overflow:
            next(iter(model.parameters())).grad[0, 0] = float("inf")

    backward(overflow_in == "both")
    optimizer.first_step(zero_grad=True)
    assert optimizer.last_step.ascent.finite == (overflow_in == "second")
    backward(True)
    if clip is not None:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert_same(weights_of(model), before)
    assert not optimizer.last_step.updated
    assert scaler.get_scale() == 2.0**7
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            assert value is None or not isinstance(value, torch.Tensor) or torch.equal(value, state[index][key])
    optimizer.zero_grad()
    scaled_step(optimizer, model, data[2], scaler)
    assert optimizer.last_step.updated


def test_grad_scaler_refuses_closures():
    model, optimizer = make(SGD, torch.float32)
    before = weights_of(model)
    scaler = torch.amp.GradScaler("cpu")
    batch = batches(1, torch.float32)[0]
    scaler.scale(loss_of(model, batch)).backward()
    with pytest.raises(StepOrderError, match="closure cannot be used with GradScaler"):
        scaler.step(optimizer, lambda: scaler.scale(loss_of(model, batch)).backward())
    assert_same(weights_of(model), before)
    # Nothing of the scaler's is left behind for the next step.
    optimizer.zero_grad()
    step_by_hand(optimizer, model, batch)
    assert optimizer.last_step.updated


def test_grad_scaler_without_a_begun_step():
    model, optimizer = make(SGD, torch.float32)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, batches(1, torch.float32)[0])).backward()
    with pytest.raises(StepOrderError, match="none is begun"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "found_inf")


# ---------------------------------------------------------------- accumulation and clipping


@pytest.mark.parametrize("closure", [False, True])
def test_accumulated_micro_batches_equal_the_whole_batch(closure):
    results = []
    for parts in (1, 4):
        model, optimizer = make(SGD)
        for x, y in batches(5):

            def run(x=x, y=y, model=model, parts=parts):
                for micro in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    (loss_of(model, micro) / parts).backward()

            if closure:
                optimizer.step(run, closure_runs="every_pass")
                optimizer.zero_grad()
            else:
                run()
                optimizer.first_step(zero_grad=True)
                run()
                optimizer.second_step(zero_grad=True)
        results.append(weights_of(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def in_autocast(base, rho, drive, outer):
    """Losses of all passes, and the weights, with one autocast around everything or one around each forward pass."""
    model = make_net(torch.float32)
    optimizer = SAM(model.parameters(), base.cls, rho=rho, **copy.deepcopy(base.settings))
    losses = []

    def step(batch):
        def backward():
            with nullcontext() if outer else torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, batch)
            loss.backward()
            losses.append(loss.item())

        def cleared():
            optimizer.zero_grad()
            backward()

        if drive == "two calls":
            for move in (optimizer.first_step, optimizer.second_step):
                cleared()
                move()
        elif drive == "second_pass":
            cleared()
            optimizer.step(backward)
        elif drive == "every_pass":
            optimizer.step(cleared, closure_runs=drive)
        else:
            for number, _ in enumerate(optimizer.each_pass()):
                cleared()
                if drive == "abandoned" and number == 1:
                    optimizer.restore()
                    break
        cleared()

    with torch.autocast("cpu", torch.bfloat16) if outer else nullcontext():
        for batch in batches(4, torch.float32):
            step(batch)
    return losses, weights_of(model)


@pytest.mark.parametrize("base", KINDS, ids=str)
@pytest.mark.parametrize("rho", [0.0, 2.0])
@pytest.mark.parametrize("drive", ["two calls", "each_pass", "every_pass", "second_pass", "abandoned"])
def test_one_autocast_around_all_passes(base, rho, drive):
    """torch keeps the weights' 16-bit copies until the outermost autocast ends; later passes must not see them."""
    losses, weights = in_autocast(base, rho, drive, outer=True)
    wanted_losses, wanted = in_autocast(base, rho, drive, outer=False)
    assert losses == wanted_losses
    assert_same(weights, wanted)


def test_clipping():
    """Clipping the first gradient changes nothing; clipping the second clips the update."""
    batch = batches(1)[0]
    results = {}
    for first, second in ((None, None), (1e-3, None), (None, 1e-3)):
        model, optimizer = make(PLAIN_SGD)
        start = weights_of(model)
        for limit, move in ((first, optimizer.first_step), (second, optimizer.second_step)):
            loss_of(model, batch).backward()
            if limit is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
            move(zero_grad=True)
        results[first, second] = [a - b for a, b in zip(weights_of(model), start, strict=True)]
    for a, b in zip(results[None, None], results[1e-3, None], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    update = torch.sqrt(sum((d**2).sum() for d in results[None, 1e-3])).item()
    assert update == pytest.approx(0.05 * 1e-3, rel=1e-4)


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_resume_is_bit_exact(base, dtype, tmp_path):
    data = batches(8, dtype)
    model, optimizer = make(base, dtype)
    for batch in data[:4]:
        step_by_hand(optimizer, model, batch)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    for batch in data[4:]:
        step_by_hand(optimizer, model, batch)
    other, resumed = make(base, dtype, rho=0.9)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["rho"] == 0.1
    for batch in data[4:]:
        step_by_hand(resumed, other, batch)
    assert_same(weights_of(model), weights_of(other))


@pytest.mark.parametrize("base", BASES, ids=str)
def test_state_moves_to_and_from_the_plain_base(base):
    data = batches(6)
    plain_model = make_net()
    plain = base.cls(plain_model.parameters(), **copy.deepcopy(base.settings))

    def plain_step(optimizer, model, batch):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()

    for batch in data[:2]:
        plain_step(plain, plain_model, batch)
    model, optimizer = make(base, rho=0.3)
    model.load_state_dict(plain_model.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["rho"] == 0.3
    for a, b in zip(model.parameters(), plain_model.parameters(), strict=True):
        assert optimizer.state[a].keys() == plain.state[b].keys()
    for batch in data[2:4]:
        step_by_hand(optimizer, model, batch)
    # Back again: the plain optimizer goes on from our state.
    back_model = make_net()
    back = base.cls(back_model.parameters(), **copy.deepcopy(base.settings))
    back_model.load_state_dict(model.state_dict())
    back.load_state_dict(optimizer.state_dict())
    for a, b in zip(model.parameters(), back_model.parameters(), strict=True):
        for key, value in optimizer.state[a].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, back.state[b][key])
    for batch in data[4:]:
        plain_step(back, back_model, batch)


def test_state_replaced_between_steps_is_noticed():
    model, optimizer = make(SGD)
    data = batches(3)
    step_by_hand(optimizer, model, data[0])
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    step_by_hand(optimizer, model, data[1])
    other, plain = make(SGD)
    other.load_state_dict(make_net().state_dict())
    step_by_hand(plain, other, data[0])
    for p in other.parameters():
        plain.state[p]["momentum_buffer"].zero_()
    step_by_hand(plain, other, data[1])
    assert_same(weights_of(model), weights_of(other))
    # And whole entries.
    for p in model.parameters():
        optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}
    for p in other.parameters():
        plain.state[p]["momentum_buffer"].zero_()
    step_by_hand(optimizer, model, data[2])
    step_by_hand(plain, other, data[2])
    assert_same(weights_of(model), weights_of(other))


class KeepsMore(torch.optim.SGD):
    """A base with something to keep that is not in its state, as wrappers of optimizers have."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.steps = 0
        self.groups_added = 0

    def add_param_group(self, group):
        super().add_param_group(group)
        self.groups_added = getattr(self, "groups_added", 0) + 1

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)

    def state_dict(self):
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.steps = state_dict["steps"]


class OwnForm(KeepsMore):
    """And whose state dict has another form than torch's."""

    def state_dict(self):
        return {"inner": super().state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict["inner"])


@pytest.mark.parametrize("base", [KeepsMore, OwnForm])
@pytest.mark.parametrize("method", [SAM, FriendlySAM])
def test_bases_with_a_state_dict_of_their_own(method, base):
    def make():
        model = make_net()
        return model, method(model.parameters(), base, rho=0.1, lr=0.05, momentum=0.9)

    model, optimizer = make()
    assert optimizer.base_optimizer.groups_added == 0  # none but those that it was made with
    seen = []
    optimizer.register_state_dict_pre_hook(lambda own: seen.append(own))
    optimizer.register_state_dict_post_hook(lambda own, state_dict: {**state_dict, "mine": 1})
    for number, batch in enumerate(batches(6)):
        if number == 3:
            saved = copy.deepcopy(optimizer.state_dict())
            assert saved["mine"] == 1 and seen == [optimizer]
            other, resumed = make()
            other.load_state_dict(model.state_dict())
            resumed.load_state_dict(saved)
            assert resumed.base_optimizer.steps == optimizer.base_optimizer.steps == 3
        step_by_hand(optimizer, model, batch)
        if number >= 3:
            step_by_hand(resumed, other, batch)
    assert_same(weights_of(other), weights_of(model))


# ---------------------------------------------------------------- long runs and low precision


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("base", "adaptive"), [(SGD, False), (ADAMW, True)], ids=str)
def test_thousands_of_steps_with_lr_zero_keep_every_bit(base, dtype, adaptive):
    weights = [nn.Parameter(torch.randn(n).to(dtype)) for n in (1, 17, 600)]
    with torch.no_grad():
        weights[1][:2] = torch.tensor([-0.0, 0.0])
    before = [w.detach().clone() for w in weights]
    optimizer = SAM(weights, base.cls, rho=0.5, adaptive=adaptive, **{**base.settings, "lr": 0.0})
    gradients = [[torch.randn_like(w) for w in weights] for _ in range(10)]
    for step in range(10_000 if dtype is torch.bfloat16 else 1_000):
        for move, offset in ((optimizer.first_step, 0), (optimizer.second_step, 3)):
            for w, g in zip(weights, gradients[(step + offset) % 10], strict=True):
                w.grad = g
            move()
    for w, b in zip(weights, before, strict=True):
        assert torch.equal(w, b)
        assert torch.equal(torch.signbit(w), torch.signbit(b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_train(dtype):
    model, optimizer = make(SGD, dtype, rho=0.5)
    data = batches(1, dtype, size=24)
    losses = [step_by_hand(optimizer, model, data[0]) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]


def test_float32_weights_with_bfloat16_gradients():
    weight = nn.Parameter(torch.ones(1000))
    weight.grad_dtype = torch.bfloat16
    optimizer = SAM([weight], torch.optim.SGD, lr=0.5, momentum=0.9, rho=1.0)
    for move in (optimizer.first_step, optimizer.second_step):
        weight.grad = torch.full((1000,), 2.0, dtype=torch.bfloat16)
        move()
    torch.testing.assert_close(weight.detach(), torch.zeros(1000))
    assert optimizer.state[weight]["momentum_buffer"].dtype == torch.float32


def test_scaled_gradients_give_the_same_perturbation():
    results = []
    for scale in (1.0, 2.0**16):
        model, optimizer = make(PLAIN_SGD)
        (scale * loss_of(model, batches(1)[0])).backward()
        optimizer.first_step()
        results.append(weights_of(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
