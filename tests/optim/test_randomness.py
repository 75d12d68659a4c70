"""Random draws of a step's passes, by whatever generator: alike in the passes of one batch, and gone on after once."""

from __future__ import annotations

import io
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from sam_optim import CRSAM, SAM, RandomState, TrainStep
from sam_optim.trainers.micro_batches import MicroBatch, MicroBatchPasses

from .cases import assert_same, batches

OWN = {
    "torch.Generator": lambda: torch.Generator().manual_seed(1),
    "numpy Generator": lambda: np.random.default_rng(1),
    "numpy RandomState": lambda: np.random.RandomState(1),
    "numpy PCG64DXSM": lambda: np.random.Generator(np.random.PCG64DXSM(1)),
    "numpy Philox": lambda: np.random.Generator(np.random.Philox(1)),
    "random.Random": lambda: random.Random(1),
}


def draw_of_own(generator):
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator))
    if isinstance(generator, random.Random):
        return generator.gauss(0.5, 0.1)
    return float(generator.normal(0.5, 0.1))


# Single draws of normal numbers: numpy and Python make them in pairs, and keep the second.
GLOBAL = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.beta(0.5, 0.5)),
    "numpy, normal": lambda: float(np.random.normal(0.5, 0.1)),
    "random": random.random,
    "random, normal": lambda: random.gauss(0.5, 0.1),
}


@pytest.fixture(autouse=True)
def others_draw_as_before():
    before = RandomState()
    yield
    before.restore()


def seed_all():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def make_source(kind):
    """A function that draws, and the generators to be handed over."""
    if kind in GLOBAL:
        return GLOBAL[kind], []
    generator = OWN[kind]()
    return lambda: draw_of_own(generator), [generator]


class Windows(MicroBatchPasses):
    def train_step(self, optimizer, loss, batch):
        return self._take(optimizer, MicroBatch(batch), lambda m: loss(m.inputs).backward(), lambda: True)


def train(kind, driver, rho=0.0, method=SAM):
    """Weights, the draws of all passes, and what is drawn after the training."""
    seed_all()
    model = nn.Linear(7, 3).double()
    draw, generators = make_source(kind)
    draw()  # so that a second normal number is waiting when the first step begins
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = method(model.parameters(), base, rho=rho)
    optimizer.generators = generators
    draws = []

    def loss(batch):
        share = draw()
        draws.append(share)
        x = share * batch[0] + (1 - share) * batch[0].flip(0)  # Mixup
        return (model(x) - batch[1][:, None]).square().mean()

    step, windows = TrainStep(model, optimizer, lambda _, batch: loss(batch)), Windows()
    for batch in batches(4):
        if driver == "closure":
            optimizer.step(lambda batch=batch: loss(batch).backward(), closure_runs="every_pass")
        elif driver == "TrainStep":
            step(batch)
        elif driver == "windows":
            windows.train_step(optimizer, loss, batch)
            optimizer.step()
        else:
            loss(batch).backward()
            base.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()], draws, draw()


@pytest.mark.parametrize("driver", ["closure", "TrainStep", "windows"])
@pytest.mark.parametrize("kind", [*GLOBAL, *OWN])
def test_passes_draw_alike_and_go_on_once(kind, driver):
    wanted, wanted_draws, wanted_next = train(kind, "base")
    got, _, after = train(kind, driver)
    assert_same(got, wanted)
    assert after == wanted_next
    for method, passes in ((SAM, 2), (CRSAM, 3)):
        _, draws, after = train(kind, driver, rho=0.1, method=method)
        assert draws == [draw for draw in wanted_draws for _ in range(passes)]
        assert after == wanted_next


@pytest.mark.parametrize("driver", ["closure", "TrainStep", "windows"])
@pytest.mark.parametrize("kind", GLOBAL)
def test_an_exception_in_the_second_pass_goes_on_after_the_first(kind, driver):
    draw = GLOBAL[kind]
    model = nn.Linear(2, 1)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.1)
    draws = []

    def loss(batch):
        draws.append(draw())
        if len(draws) == 2:
            raise ValueError("in the second pass")
        return model(batch).sum()

    def make_step(batch):
        if driver == "closure":
            optimizer.step(lambda: loss(batch).backward(), closure_runs="every_pass")
        elif driver == "TrainStep":
            TrainStep(model, optimizer, lambda _, batch: loss(batch))(batch)
        else:
            Windows().train_step(optimizer, loss, batch)

    start = RandomState()
    wanted = [draw(), draw()]
    start.restore()
    with pytest.raises(ValueError, match="second pass"):
        make_step(torch.ones(3, 2))
    assert [draws[1], draw()] == wanted


def everything():
    return [draw() for draw in GLOBAL.values()]


@pytest.mark.parametrize("kind", OWN)
def test_state_dict_goes_through_a_safe_checkpoint(kind):
    own = OWN[kind]()
    everything(), draw_of_own(own)
    state = RandomState([torch.device("cpu")], generators=[own])
    wanted = [everything(), draw_of_own(own)]
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    other = OWN[kind]()
    RandomState.from_state_dict(torch.load(file, weights_only=True), generators=[other]).restore()
    assert [everything(), draw_of_own(other)] == wanted


def test_a_state_of_generators_needs_as_many():
    state = RandomState(generators=[np.random.default_rng(0)]).state_dict()
    with pytest.raises(ValueError, match="0 generators were given for the saved states of 1"):
        RandomState.from_state_dict(state)
    with pytest.raises(TypeError, match="Invalid generator: int; it must be a"):
        RandomState(generators=[3])


def test_an_accelerator_that_is_not_there_is_left_out():
    state = RandomState().state_dict()
    state["devices"] = {"cuda:99" if torch.cuda.is_available() is False else "xpu:0": torch.zeros(16)}
    RandomState.from_state_dict(state).restore()


def test_numpys_generator_is_read_anew_whatever_was_done_to_it():
    """What is known of it from before is used only where nothing has changed."""
    seed_all()
    choose = random.Random(0)
    original = np.random.get_bit_generator()
    bit_generators = [original, np.random.MT19937(3), np.random.PCG64(5)]
    changes = [
        lambda: np.random.rand(choose.randrange(3)),
        lambda: np.random.randn(choose.randrange(3)),
        lambda: np.random.seed(choose.randrange(2)),
        lambda: np.random.set_bit_generator(choose.choice(bit_generators)),
        lambda: None,
    ]
    try:
        for _ in range(200):
            if isinstance(np.random.get_bit_generator(), np.random.PCG64):
                np.random.set_bit_generator(choose.choice(bit_generators))
            else:
                choose.choice(changes)()
            state = RandomState()
            wanted = [np.random.randn(choose.randrange(3)).tolist() for _ in range(2)] + [np.random.rand()]
            drawn = [len(w) for w in wanted[:2]]
            if choose.random() < 0.5:
                RandomState()
            state.restore()
            assert [np.random.randn(n).tolist() for n in drawn] + [np.random.rand()] == wanted
            if choose.random() < 0.5:
                state.restore()
    finally:
        np.random.set_bit_generator(original)


def test_numpy_is_not_imported():
    program = (
        "import sys; sys.modules['numpy'] = None; import torch; from sam_optim import RandomState\n"
        "RandomState().restore(); RandomState.from_state_dict(RandomState().state_dict()).restore()\n"
        "assert not any(name.startswith('numpy.') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
