"""Any optimizer as the base: all of torch's, and the hundred of pytorch-optimizer."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

from sam_optim import SAM, InvalidSettingError

from .cases import assert_same, batches, loss_of, make_net, oracle_step, step_by_hand, weights_of

TORCHS = ["Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


# They want a closure, a whole model, matrices alone, second derivatives, settings without a default or another package.
NOT_FOR_THIS = [
    "adago",
    "adahessian",
    "adalomo",
    "adammini",
    "adamuon",
    "alig",
    "bsam",
    "demo",
    "distributedmuon",
    "lbfgs",
    "lomo",
    "muon",
    "muonclip",
    "normuon",
    "ranger21",
    "sophiah",
    "spectralsphere",
]
REFUSED = ["adadelta"]  # its setting rho is another one
FLOAT32_ONLY = ["fadam"]
TURNS_OVER = ["soap"]  # between eigenvectors, which the last bit of a gradient chooses


def others() -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pytorch_optimizer
    except ImportError:
        return []
    known = set(pytorch_optimizer.get_supported_optimizers())
    return sorted(known - set(NOT_FOR_THIS) - set(REFUSED))


def made(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name in TORCHS:
        cls = getattr(torch.optim, name)
    else:
        import pytorch_optimizer

        cls = pytorch_optimizer.load_optimizer(name)
    settings = {"lr": 0.01} if "lr" in inspect.signature(cls.__init__).parameters else {}
    return cls(model.parameters(), **settings)


def train(name, make_step, dtype=torch.float32, steps=3):
    """Weights after some steps; some bases draw random numbers."""
    torch.manual_seed(5)
    model = make_net(dtype)
    step = make_step(model, made(name, model))
    torch.manual_seed(6)
    for batch in batches(steps, dtype):
        step(batch)
    return weights_of(model)


def alone(model, base):
    def step(batch):
        base.zero_grad()
        loss_of(model, batch).backward()
        base.step()

    return step


def by_formula(model, base):
    return lambda batch: oracle_step(model, base, 0.1, lambda name, w: 1.0, batch)


def by_sam(rho):
    def make_step(model, base):
        optimizer = SAM(model.parameters(), base, rho=rho)
        return lambda batch: step_by_hand(optimizer, model, batch)

    return make_step


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*TORCHS, *others()])
def test_every_base(name):
    """With rho 0 the base by itself, bit for bit; with rho SAM's formula around it."""
    wanted = train(name, alone)
    assert_same(train(name, by_sam(0.0)), wanted)
    dtype = torch.float32 if name in FLOAT32_ONLY else torch.float64
    found, expected = (train(name, how, dtype) for how in (by_sam(0.1), by_formula))
    for a, b in zip(found, expected, strict=True):
        assert torch.isfinite(a).all()
        # A sign, or a decomposition of a matrix, makes a difference in the last bit of a gradient a larger one.
        assert name in TURNS_OVER or (a - b).abs().mean() < 1e-4 + 1e-3 * b.abs().mean()


def test_a_base_with_settings_of_the_same_name():
    """torch's Adadelta has a rho too, 0.9, which was taken for SAM's."""
    with pytest.raises(InvalidSettingError, match="Adadelta cannot be the base optimizer: it keeps rho in its groups"):
        SAM([nn.Parameter(torch.ones(2))], torch.optim.Adadelta, rho=0.05)


def test_a_base_that_was_anothers_base_before():
    """Its groups have the settings of the SAM before, which go on."""
    model = make_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    SAM(model.parameters(), base, rho=0.3)
    assert SAM(model.parameters(), copy.copy(base)).param_groups[0]["rho"] == 0.3


class Plain:
    """An optimizer that is none of torch's: groups, state and a step."""

    def __init__(self, params, lr):
        self.param_groups = [{"params": list(params), "lr": lr}]
        self.state = {}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad


def test_a_base_that_is_not_torchs():
    found = []
    for base in (Plain, torch.optim.SGD):
        model = make_net()
        optimizer = SAM(model.parameters(), base, rho=0.1, lr=0.05, backend="foreach")
        for batch in batches(3):
            step_by_hand(optimizer, model, batch)
        found.append(weights_of(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
