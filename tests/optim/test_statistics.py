"""What forward passes keep: BatchNorm's running statistics and spectral normalisation's vectors, once a step."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.utils.checkpoint import checkpoint

from sam_optim import (
    CRSAM,
    GSAM,
    SAM,
    TrainStep,
    disable_running_stats,
    enable_running_stats,
    freeze_in_perturbed_passes,
    frozen_batch_norm,
    running_statistics,
)

from .cases import assert_same, batches, by_every_pass_closure, loss_of, step_by_hand


class OwnNorm(nn.Module):
    """A user's norm class: statistics under other names, replaced instead of updated in place."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(features))

    def forward(self, x):
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return x - x.mean(0)


def normed_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Sequential(nn.BatchNorm1d(9, momentum=None), OwnNorm(9)), nn.Linear(9, 3)
    )


def rule(module):
    return ("average", "running_mean", "running_var", "num_batches_tracked")


def buffers_of(model):
    return [b.clone() for b in model.buffers()]


def test_frozen_batch_norm_nests_and_spares_every_buffer():
    model = normed_model()
    x = torch.randn(12, 7)
    model(x)
    before = buffers_of(model)
    originals = list(model.buffers())
    with frozen_batch_norm(model, rule):
        y = model(x)
        with frozen_batch_norm(model, rule):
            model(torch.full((12, 7), float("inf")))
        model(x)
    assert_same(buffers_of(model), before)
    assert all(a is b for a, b in zip(model.buffers(), originals, strict=True))
    y.sum().backward()
    # The same normalisation, whether frozen or not.
    torch.testing.assert_close(model(x), y)
    assert not torch.equal(next(model.buffers()), before[0])


def test_disable_twice_enable_once():
    model = normed_model()
    x = torch.randn(12, 7)
    before = buffers_of(model)
    disable_running_stats(model, rule)
    disable_running_stats(model, rule)
    model(x)
    enable_running_stats(model)
    assert_same(buffers_of(model), before)
    enable_running_stats(model)
    model(x)
    assert not any(torch.equal(a, b) for a, b in zip(buffers_of(model), before, strict=True))


def test_own_norm_classes_need_the_rule():
    model = normed_model()
    before = buffers_of(model)
    with frozen_batch_norm(model):
        model(torch.randn(12, 7))
    changed = [not torch.equal(a, b) for a, b in zip(buffers_of(model), before, strict=True)]
    assert sum(changed) == 1  # OwnNorm's average


@pytest.mark.parametrize("driver", ["hand", "closure"])
def test_statistics_are_updated_once_a_step(driver):
    model = normed_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.5, closure_runs="every_pass")
    handle = freeze_in_perturbed_passes(model, optimizer, rule)
    wanted_model = normed_model()
    for x, y in batches(3, torch.float32):
        wanted_model(x)
        if driver == "hand":
            step_by_hand(optimizer, model, (x, y))
        else:
            optimizer.step(lambda x=x, y=y: loss_of(model, (x, y)).backward())
            optimizer.zero_grad()
    assert_same(buffers_of(model), buffers_of(wanted_model))
    handle.remove()
    step_by_hand(optimizer, model, batches(1, torch.float32)[0])
    assert model[1].num_batches_tracked == 5


def test_an_exception_in_the_perturbed_forward_puts_statistics_back():
    model = normed_model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    freeze_in_perturbed_passes(model, optimizer, rule)
    originals = list(model.buffers())
    batch = batches(1, torch.float32)[0]
    loss_of(model, batch).backward()
    originals = list(model.buffers())
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError):
        model(torch.randn(12, 8))
    assert all(a is b for a, b in zip(model.buffers(), originals, strict=True))


class Checkpointed(nn.Module):
    """Whose backward pass runs the normalisation's forward pass once more."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.normalised, self.last = nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)
        self.reentrant = reentrant

    def forward(self, x):
        return self.last(checkpoint(self.normalised, self.first(x), use_reentrant=self.reentrant))


def spectral_model(spectral_norm):
    return nn.Sequential(spectral_norm(nn.Linear(7, 9)), nn.Tanh(), spectral_norm(nn.Linear(9, 3)))


MODELS_WITH_STATISTICS = {
    "checkpointed": lambda: Checkpointed(False),
    "checkpointed, reentrant": lambda: Checkpointed(True),
    "spectral norm": lambda: spectral_model(nn.utils.parametrizations.spectral_norm),
    "spectral norm by a hook": lambda: spectral_model(nn.utils.spectral_norm),
}


def state_after_steps(name, driver, rho=0.0, **options):
    torch.manual_seed(0)
    model = MODELS_WITH_STATISTICS[name]().double()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SAM(model.parameters(), base, rho=rho)
    step = TrainStep(model, optimizer, loss_of, **options)
    if driver in ("hand", "closure"):
        freeze_in_perturbed_passes(model, optimizer)
    for batch in batches(4):
        if driver == "base":
            base.zero_grad()
            for part in zip(*(t.chunk(options.get("micro_batches", 1)) for t in batch), strict=True):
                (loss_of(model, part) / options.get("micro_batches", 1)).backward()
            base.step()
        elif driver == "hand":
            step_by_hand(optimizer, model, batch)
        elif driver == "closure":
            optimizer.closure_runs = "every_pass"
            by_every_pass_closure(optimizer, model, batch)
        else:
            step(batch)
    return [value.detach().clone() for value in model.state_dict().values()]


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated")
@pytest.mark.parametrize("driver", ["hand", "closure", "TrainStep"])
@pytest.mark.parametrize("name", MODELS_WITH_STATISTICS)
def test_what_forward_passes_keep_is_as_without_sam(name, driver):
    assert_same(state_after_steps(name, driver), state_after_steps(name, "base"))
    assert_same(state_after_steps(name, driver, rho=0.2), state_after_steps(name, "hand", rho=0.2))


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated")
@pytest.mark.parametrize("perturbation", ["batch", "micro_batch"])
@pytest.mark.parametrize("name", MODELS_WITH_STATISTICS)
def test_what_forward_passes_keep_with_micro_batches(name, perturbation):
    options = {"micro_batches": 2, "perturbation": perturbation}
    found, wanted = (state_after_steps(name, driver, **options) for driver in ("TrainStep", "base"))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rho", [0.0, 0.2])
def test_frozen_by_a_hook_within_train_step(rho):
    """Statistics that both put aside come back, and they are the same tensors."""
    torch.manual_seed(0)
    model = Checkpointed(False).double()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=0.1, momentum=0.9)
    for _ in range(2):
        freeze_in_perturbed_passes(model, optimizer)
    step = TrainStep(model, optimizer, loss_of)
    originals = list(model.buffers())
    for batch in batches(4):
        step(batch)
        assert all(a is b for a, b in zip(model.buffers(), originals, strict=True))
    wanted = state_after_steps("checkpointed", "TrainStep", rho=rho)
    assert_same([v.detach() for v in model.state_dict().values()], wanted)


def test_an_abandoned_step_ends_its_pass():
    """After a perturbed forward pass; combine_gradients() ends a pass, too."""
    model = normed_model()
    optimizer = GSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    freeze_in_perturbed_passes(model, optimizer, rule)
    batch = batches(1, torch.float32)[0]
    for count, ends_by in enumerate((optimizer.restore, optimizer.combine_gradients)):
        loss_of(model, batch).backward()
        before, originals = buffers_of(model), list(model.buffers())
        optimizer.first_step(zero_grad=True)
        loss_of(model, batch).backward()
        assert_same(buffers_of(model), before)
        assert all(a is b for a, b in zip(model.buffers(), originals, strict=True))
        assert model[1].num_batches_tracked == 2 * count + 1
        ends_by()
        model(batch[0])
        assert model[1].num_batches_tracked == 2 * count + 2
        optimizer.zero_grad()


def test_statistics_come_back_when_passes_are_run_in_groups():
    model = normed_model()
    optimizer = CRSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)  # two perturbed passes, one after the other
    freeze_in_perturbed_passes(model, optimizer, rule)
    batch = batches(1, torch.float32)[0]
    counts = []
    for group in optimizer.stepper.each_group():
        counts.append(model[1].num_batches_tracked.item())
        loss_of(model, batch).backward()
        group.gradients = [[p.grad for p in model.parameters()]]
        optimizer.zero_grad()
    assert counts == [0, 1, 1]
    assert model[1].num_batches_tracked == 1


class Codebook(nn.Module):
    """Vector quantisation whose codes follow what is assigned to them, in place or by another tensor."""

    def __init__(self, in_place):
        super().__init__()
        self.encoder, self.in_place = nn.Linear(7, 3), in_place
        self.register_buffer("codes", torch.randn(5, 3))

    def forward(self, x):
        z = self.encoder(x)
        nearest = torch.cdist(z.detach(), self.codes).argmin(1)
        quantised = self.codes[nearest].clone()
        moved = self.codes.lerp(torch.zeros_like(self.codes).index_add(0, nearest, z.detach()), 0.2)
        if self.in_place:
            self.codes.copy_(moved)
        else:
            self.codes = moved
        return z + (z - quantised).square()


class BatchRenorm(nn.BatchNorm1d):
    """Normalises by the running statistics, which it updates then."""

    def forward(self, x):
        out = (x - self.running_mean) / (self.running_var + self.eps).sqrt()
        with torch.no_grad():
            self.running_mean.lerp_(x.mean(0), 0.3)
            self.running_var.lerp_(x.var(0), 0.3)
        return out


class MomentumEncoder(nn.Module):
    """As in self-supervised learning: a slow copy and a queue of what it has made, both updated by forward()."""

    def __init__(self):
        super().__init__()
        self.fast, self.slow = nn.Linear(7, 3), nn.Linear(7, 3).requires_grad_(False)
        self.register_buffer("queue", torch.randn(24, 3))

    def forward(self, x):
        for slow, fast in zip(self.slow.parameters(), self.fast.parameters(), strict=True):
            slow.data = slow.data * 0.9 + fast.data * 0.1
        out = self.fast(x) - self.slow(x) @ self.queue.clone().mean(0).diag()
        self.queue = torch.cat([self.queue[len(x) :], self.slow(x)])
        return out


USED_AND_UPDATED = {
    "codes in place": lambda: Codebook(True),
    "codes replaced": lambda: Codebook(False),
    "batch renormalisation": lambda: nn.Sequential(nn.Linear(7, 3), BatchRenorm(3)),
}


def losses_and_warnings(model, driver, rule, micro_batches=1):
    """Of passes at a radius so small that the second is the first once more."""
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=1e-13, lr=0.1)
    losses = []

    def loss_and_note(model, batch):
        losses.append(loss_of(model, batch))
        return losses[-1]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if driver == "TrainStep":
            step = TrainStep(model, optimizer, loss_and_note, statistics=rule, micro_batches=micro_batches)
            for batch in batches(3):
                step(batch)
        else:
            freeze_in_perturbed_passes(model, optimizer, rule)
            for batch in batches(3):
                for _ in optimizer.each_pass():
                    for part in zip(*(t.chunk(micro_batches) for t in batch), strict=True):
                        loss_and_note(model, part).backward()
    found = torch.stack(losses).detach().unflatten(0, (3, 2, micro_batches))
    return found[:, 0], found[:, 1], [str(w.message) for w in caught]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("driver", ["hooks", "TrainStep"])
@pytest.mark.parametrize("name", USED_AND_UPDATED)
def test_both_passes_use_what_forward_passes_update_as_it_was(name, driver, micro_batches):
    torch.manual_seed(0)
    model = USED_AND_UPDATED[name]().double()
    rule_of_codes = lambda module: (*running_statistics(module), "codes")  # noqa: E731
    first, second, told = losses_and_warnings(model, driver, rule_of_codes, micro_batches)
    torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-9)
    assert not told


@pytest.mark.parametrize("driver", ["hooks", "TrainStep"])
def test_what_perturbed_passes_write_unnamed_is_told_once(driver):
    torch.manual_seed(0)
    names = []
    for model in (
        Codebook(True),
        Codebook(False),
        MomentumEncoder(),
        nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3)),
    ):
        *_, told = losses_and_warnings(model.double(), driver, running_statistics)
        names.append(
            [message.split(". Every")[0].removeprefix("a perturbed pass has written into ") for message in told]
        )
    assert names == [["Codebook.codes"], ["Codebook.codes"], ["MomentumEncoder.queue, Linear.weight, Linear.bias"], []]


@pytest.mark.parametrize("in_place", [True, False])
def test_an_exception_puts_back_what_a_forward_pass_has_replaced(in_place):
    torch.manual_seed(0)
    model = Codebook(in_place).double()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    before = [value.clone() for value in model.state_dict().values()]
    passes = []

    def fails_in_the_second(model, batch):
        passes.append(loss_of(model, batch))
        return passes[-1] if len(passes) == 1 else passes[-1].nowhere

    with pytest.raises(AttributeError):
        TrainStep(model, optimizer, fails_in_the_second, statistics=lambda module: ("codes",))(batches(1)[0])
    assert_same(list(model.state_dict().values()), before)


def quantised_model():
    """As ``prepare_qat`` makes them; one of the kinds never calls its observer."""
    torch.manual_seed(0)
    observer = quantization.MovingAverageMinMaxObserver
    return nn.Sequential(
        nn.Linear(7, 9),
        quantization.FakeQuantize(observer),
        nn.Linear(9, 3),
        quantization.FusedMovingAvgObsFakeQuantize(observer, averaging_constant=0.1),
    )


def by_train_step(optimizer, model, batch):
    TrainStep(model, optimizer, loss_of)(batch)


@pytest.mark.parametrize("drive", [step_by_hand, by_every_pass_closure, by_train_step])
def test_observers_of_fake_quantisation_learn_once_a_step(drive):
    """At the weights themselves, so that rho = 0 is the base bit for bit."""
    for rho in (0.0, 2.0):
        model, plain = quantised_model(), quantised_model()
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=0.1, closure_runs="every_pass")
        if drive is not by_train_step:
            freeze_in_perturbed_passes(model, optimizer)
        base = torch.optim.SGD(plain.parameters(), lr=0.1)
        for batch in batches(3, torch.float32):
            with torch.no_grad():
                for theirs, own in zip(plain.parameters(), model.parameters(), strict=True):
                    theirs.copy_(own)
            base.zero_grad()
            loss_of(plain, batch).backward()
            base.step()
            drive(optimizer, model, batch)
            assert_same(buffers_of(model), buffers_of(plain))
            if rho == 0.0:
                assert_same(list(model.parameters()), list(plain.parameters()))
    assert all(module.observer_enabled for module in (model[1], model[3]))


@pytest.mark.parametrize("other", ["frozen too", "plain"])
def test_a_pass_begins_where_that_of_another_optimizer_has_ended(other):
    """Generator and discriminator, by hand: with rho = 0 both steps are the bases', bit for bit."""

    def make(method):
        torch.manual_seed(0)
        critic = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 1))
        generator = nn.Linear(2, 3)
        return critic, generator, *(method(net.parameters()) for net in (critic, generator))

    def base(params):
        return torch.optim.SGD(params, lr=0.1)

    z, x = torch.randn(4, 2), torch.randn(4, 3)
    ours = make(lambda params: SAM(params, torch.optim.SGD, rho=0.0, lr=0.1))
    plain = make(base)
    critic, generator, critic_optimizer, generator_optimizer = ours
    freeze_in_perturbed_passes(critic, critic_optimizer)
    if other == "plain":
        generator_optimizer = base(generator.parameters())
    else:
        freeze_in_perturbed_passes(critic, generator_optimizer)

    def critic_loss(critic, generator):
        return critic(generator(z).detach()).mean() - critic(x).mean()

    def generator_loss(critic, generator):
        return -critic(generator(z)).mean()

    def step(optimizer, loss, critic, generator):
        optimizer.zero_grad()
        loss(critic, generator).backward()
        if isinstance(optimizer, SAM):
            optimizer.first_step(zero_grad=True)
            loss(critic, generator).backward()
        optimizer.step()

    for _ in range(3):
        step(critic_optimizer, critic_loss, critic, generator)
        step(generator_optimizer, generator_loss, critic, generator)
        step(plain[2], critic_loss, *plain[:2])
        step(plain[3], generator_loss, *plain[:2])
        assert_same(list(critic.state_dict().values()), list(plain[0].state_dict().values()))
        assert_same(list(generator.state_dict().values()), list(plain[1].state_dict().values()))
