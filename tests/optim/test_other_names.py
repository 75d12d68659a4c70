"""Methods that are special cases of others, or of TrainStep, under the names by which they are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam_optim import (
    ASAM,
    GNP,
    SAM,
    USAM,
    WSAM,
    AgnosticSAM,
    AlignSAM,
    InvalidSettingError,
    TrainStep,
    UnifiedSAM,
    m_sam,
    perturb_normalization_only,
    sam_on,
)

from .bases import SGD as MOMENTUM
from .cases import assert_same, batches, loss_of, make_net, weights_of
from .methods import Method

SGD = torch.optim.SGD


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_align_sam(backend):
    """The closed form, with rho 0.2 up-hill and half of it down-hill."""
    A, B, a, b = (torch.tensor(v, dtype=torch.float64) for v in ([2.0, 1.0], [1.0, 3.0], [1.0, 0.0], [0.0, 1.0]))  # noqa: N806
    w = torch.tensor([0.5, -0.5], dtype=torch.float64, requires_grad=True)
    optimizer = AlignSAM([w], SGD, rho=0.2, lr=0.1, backend=backend)
    for p in optimizer.each_pass():
        loss = (A * (w - a) ** 2).sum() / 2 if p.data == "train" else (B * (w - b) ** 2).sum() / 2
        loss.backward()
    assert w.tolist() == pytest.approx((0.637985718161494, -0.450994565436737), abs=1e-12)


SAME = [
    (Method(AlignSAM, {"rho": 0.1}), Method(AgnosticSAM, {"rho": 0.1, "variant": "align"})),
    (
        Method(AlignSAM, {"rho": 0.1, "smoothing": 0.5, "rho_val": 0.03}),
        Method(AgnosticSAM, {"rho": 0.1, "rho_val": 0.03, "variant": "align", "smoothing": 0.5}),
    ),
    (Method(USAM, {"rho": 0.1, "adaptive": True}), Method(UnifiedSAM, {"rho": 0.1, "k": 0.0, "adaptive": True})),
    (Method(GNP, {"rho": 0.1, "alpha": 0.5}), Method(WSAM, {"rho": 0.1, "gamma": 1 / 3, "decouple": False})),
]


@pytest.mark.parametrize(("named", "general"), SAME, ids=str)
def test_the_same_steps(named, general):
    results = []
    for method in (named, general):
        model = make_net()
        step = TrainStep(model, method.make(model, MOMENTUM), loss_of)
        for batch, other in zip(batches(4), batches(4, size=5), strict=True):
            step(batch, other)
        results.append(weights_of(model))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14 if named.cls is GNP else 0.0, atol=0.0)


@pytest.mark.parametrize("cls", [AlignSAM, USAM])
def test_what_is_refused_where_the_general_method_refuses_it(cls):
    model = make_net(torch.float32)
    optimizer = cls(model.parameters(), SGD, lr=0.1, **({"smoothing": 0.5} if cls is AlignSAM else {}))
    with pytest.raises(InvalidSettingError, match=f"{cls.__name__} cannot be used with GradScaler"):
        TrainStep(model, optimizer, loss_of, scaler=torch.amp.GradScaler("cpu"))


def test_m_sam():
    """Two samples, each with a loss of its own, perturbed each along its own gradient."""
    model = nn.ParameterList([nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in (3.0, 1.0)])

    def loss_fn(model, batch):
        w = torch.cat(list(model))
        losses = torch.stack(
            [0.5 * (torch.tensor([1.0, 4.0]) * w**2).sum(), 0.5 * (w - torch.tensor([-2.0, -11.0])).square().sum()]
        )
        return losses[batch].mean()

    step = m_sam(model, SAM(model.parameters(), SGD, rho=0.5, lr=0.1), loss_fn, m=2)
    assert isinstance(step, TrainStep)
    step(torch.arange(2))
    assert [w.item() for w in model] == pytest.approx([2.5753846154, 0.0969230769], abs=1e-10)


def test_m_sam_takes_options_and_refuses_what_it_cannot_be():
    model, other = make_net(), make_net()
    optimizers = [SAM(m.parameters(), SGD, rho=0.1, lr=0.1) for m in (model, other)]
    steps = [
        m_sam(model, optimizers[0], loss_of, 3, max_grad_norm=0.1),
        TrainStep(other, optimizers[1], loss_of, micro_batches=3, perturbation="micro_batch", max_grad_norm=0.1),
    ]
    for batch in batches(3):
        for step in steps:
            step(batch)
    assert_same(weights_of(model), weights_of(other))
    with pytest.raises(InvalidSettingError, match="micro-batch"):
        m_sam(model, WSAM(model.parameters(), SGD, lr=0.1), loss_of, m=2)


class Scaled(nn.Module):
    """A normalisation of somebody's own."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        return x * self.gain


def test_sam_on():
    """The second weight alone is perturbed, by all of rho."""
    model = nn.Module()
    model.a = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    model.norm = nn.LayerNorm(1, bias=False, dtype=torch.float64)
    optimizer = sam_on(model, SGD, lr=0.1)
    assert type(optimizer) is SAM and optimizer.rho == 0.5
    for move in (optimizer.first_step, optimizer.second_step):
        optimizer.zero_grad()
        (0.5 * (model.a**2 + 4 * model.norm.weight**2)).sum().backward()
        move()
    assert [model.a.item(), model.norm.weight.item()] == pytest.approx([2.7, 0.4], abs=2e-10)


def test_sam_on_takes_settings_and_modules():
    results = []
    for by_function in (True, False):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(7, 3), Scaled(), nn.BatchNorm1d(3)).double()
        settings = {"lr": 0.1, "momentum": 0.9, "adaptive": True, "eta": 0.01}
        if by_function:
            optimizer = sam_on(model, SGD, 2.0, normalizations=[Scaled], **settings)
        else:
            optimizer = SAM(perturb_normalization_only(model, Scaled), SGD, 2.0, **settings)
        for batch in batches(3):
            for _ in optimizer.each_pass():
                loss_of(model, batch).backward()
        results.append(weights_of(model))
    assert_same(*results)
    with pytest.raises(ValueError, match="no parameter"):
        sam_on(nn.Linear(2, 2), SGD, lr=0.1)
    assert ASAM(perturb_normalization_only(model), SGD, lr=0.1).rho == 0.5
