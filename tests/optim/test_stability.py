"""The edge of stability, and the monitor that measures where training stands beside it."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from sam_optim import ASAM, GSAM, SAM, IntervalSAM, StabilityMonitor, StepOrderError, edge_of_stability

from .cases import assert_same, batches, loss_of, make_net, weights_of


class Quadratic(nn.Module):
    """1/2 w' H w with a given H, in two parameters."""

    def __init__(self, hessian, start):
        super().__init__()
        self.hessian = torch.tensor(hessian, dtype=torch.float64)
        start = torch.tensor(start, dtype=torch.float64)
        self.a, self.b = nn.Parameter(start[:1].clone()), nn.Parameter(start[1:].clone())

    @property
    def w(self):
        return torch.cat([self.a, self.b])


def quadratic_loss(model, batch):
    return 0.5 * model.w @ model.hessian @ model.w


def test_formula():
    for lr, rho, norm in ((0.1, 0.05, 2.0), (0.5, 0.3, 0.01), (1e-3, 2.0, 100.0)):
        literal = norm / (2 * rho) * (math.sqrt(1 + 8 * rho / (lr * norm)) - 1)
        assert edge_of_stability(lr, rho, norm) == pytest.approx(literal, rel=1e-12)
    assert edge_of_stability(0.1, 0.0, 3.0) == 20.0
    assert edge_of_stability(0.1, 1e-18, 3.0) == pytest.approx(20.0)  # where the literal form is 0 / 0
    assert edge_of_stability(0.1, 0.1, 0.0) == 0.0
    for wrong in ((0.0, 0.1, 1.0), (0.1, -0.1, 1.0), (0.1, 0.1, math.nan)):
        with pytest.raises(ValueError, match="Invalid"):
            edge_of_stability(*wrong)


def test_sam_settles_where_the_edge_is_the_curvature():
    """On a quadratic SAM ends in a 2-cycle of radius lr rho h / (2 - lr h); there the edge is h exactly."""
    lr, rho, h = 0.05, 0.1, 12.0
    model = Quadratic([[h, 0.0], [0.0, 1.0]], [1.0, 0.3])
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=lr)
    for _ in range(2000):
        for _ in optimizer.each_pass():
            quadratic_loss(model, None).backward()
    assert abs(model.a.item()) == pytest.approx(lr * rho * h / (2 - lr * h), rel=1e-9)
    assert abs(model.a.item()) == pytest.approx(0.0428571, abs=1e-7)
    found = StabilityMonitor(model, optimizer, quadratic_loss).measure(None)
    assert found.eigenvalue == pytest.approx(h, rel=1e-9)
    assert found.edge == pytest.approx(h, rel=1e-9)
    assert found.relative_sharpness == pytest.approx(1.0, rel=1e-9)
    assert found.gradient_descent_edge == 2 / lr
    assert found.alignment == pytest.approx(1.0)


@pytest.mark.parametrize("diagonal", [[3.0, 1.0, -2.0], [2.0, 1.0, -5.0], [0.1, 0.2, 0.3]])
def test_eigenvalue_with_its_sign(diagonal):
    """In a rotated basis; the one of the largest magnitude, negative or not."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    hessian = basis @ torch.diag(torch.tensor(diagonal, dtype=torch.float64)) @ basis.T
    model = Quadratic(hessian.tolist(), [1.0, 2.0, -1.0])
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    found = StabilityMonitor(model, optimizer, quadratic_loss).measure(None)
    index = max(range(3), key=lambda i: abs(diagonal[i]))
    assert found.eigenvalue == pytest.approx(diagonal[index], rel=1e-6)
    assert found.hessian_norm == pytest.approx(abs(diagonal[index]), rel=1e-6)
    top, w = basis[:, index], model.w.detach()
    assert abs(torch.cat(found.eigenvector) @ top).item() == pytest.approx(1.0, rel=1e-6)
    g = hessian @ w
    g_plus = hessian @ (w + 0.5 * g / g.norm())
    assert found.loss == pytest.approx(0.5 * (w @ g).item())
    assert found.gradient_norm == pytest.approx(g.norm().item())
    assert found.alignment == pytest.approx(abs(g @ top).item() / g.norm().item(), rel=1e-5)
    assert found.perturbed_alignment == pytest.approx(abs(g_plus @ top).item() / g_plus.norm().item(), rel=1e-5)


def test_a_network_against_its_whole_hessian():
    model = make_net()
    [batch] = batches(1)
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1)
    found = StabilityMonitor(model, optimizer, lambda m, b: (loss_of(m, b), "more"), tolerance=1e-8).measure(batch)
    gradients = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(loss_of(model, batch), params, create_graph=True)]
    )
    rows = [torch.autograd.grad(entry, params, retain_graph=True) for entry in gradients]
    hessian = torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert found.eigenvalue == pytest.approx(max(eigenvalues.tolist(), key=abs), rel=1e-6)
    assert found.edge == found.gradient_descent_edge == 20.0  # an optimizer without rho
    assert found.alignment == pytest.approx(found.perturbed_alignment)


def test_nothing_is_changed():
    model = make_net(torch.float32, dropout=0.5, batch_norm=True)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    [batch] = batches(1, torch.float32)
    loss_of(model, batch).backward()
    kept = [p.grad for p in model.parameters()]
    before = [*weights_of(model), *(g.clone() for g in kept), *(b.clone() for b in model.buffers())]
    random = torch.get_rng_state()
    monitor = StabilityMonitor(model, optimizer, loss_of)
    with torch.no_grad():
        found = [monitor.measure(batch) for _ in range(2)]
    assert_same([*weights_of(model), *(p.grad for p in model.parameters()), *model.buffers()], before)
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    # The same draws, from another start of the solver.
    assert found[0].loss == found[1].loss
    assert found[0].eigenvalue == pytest.approx(found[1].eigenvalue, rel=1e-3)


def test_an_exception_restores_the_weights():
    model = make_net()
    calls = []

    def loss(model, batch):
        calls.append(None)
        if len(calls) == 2:
            raise KeyError("at the perturbed weights")
        return loss_of(model, batch)

    before = weights_of(model)
    monitor = StabilityMonitor(model, SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1), loss)
    with pytest.raises(KeyError):
        monitor.measure(batches(1)[0])
    assert_same(weights_of(model), before)


def test_parameters_that_take_no_part():
    """Frozen ones, unused ones, and a loss that is linear in the weights."""
    model = make_net()
    model.layers[0].bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([*model.parameters(), unused], lr=0.1)
    found = StabilityMonitor(model, optimizer, loss_of).measure(batches(1)[0])
    assert math.isfinite(found.eigenvalue) and not found.eigenvector[-1].any()
    found = StabilityMonitor(model, optimizer, lambda m, b: sum(p.sum() for p in m.parameters())).measure(None)
    assert found.eigenvalue == 0.0
    single = Quadratic([[3.0]], [2.0])
    only = torch.optim.SGD([single.a], lr=0.1)
    assert StabilityMonitor(single, only, quadratic_loss).measure(None).eigenvalue == pytest.approx(3.0)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_stands_twice_is_one():
    model = Quadratic([[3.0, 1.0], [1.0, 2.0]], [0.5, 0.3])
    once = torch.optim.SGD([model.a, model.b], lr=0.1)
    twice = torch.optim.SGD([model.a, model.b, model.a], lr=0.1)
    expected, found = (StabilityMonitor(model, o, quadratic_loss).measure(None) for o in (once, twice))
    assert found.eigenvalue == pytest.approx(expected.eigenvalue, rel=1e-6) == pytest.approx(2.5 + math.sqrt(1.25))
    assert found.gradient_norm == pytest.approx(expected.gradient_norm)
    assert found.perturbed_alignment == pytest.approx(expected.perturbed_alignment)


def test_without_curvature_and_with_an_infinite_one():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = StabilityMonitor(model, optimizer, lambda model, batch: model(batch).relu().sum())
    for _ in range(2):
        found = monitor.measure(torch.randn(4, 3))
        assert found.eigenvalue == 0.0
        assert sum((v**2).sum().item() for v in found.eigenvector) == pytest.approx(1.0)
    # The start of the next search is of no use to it.
    monitor.loss_fn = lambda model, batch: 0.5 * model(batch).square().sum()
    assert monitor.measure(torch.eye(3)).eigenvalue > 1.0
    nn.init.zeros_(model.weight)
    monitor.loss_fn = lambda model, batch: (model.weight.abs() ** 1.5).sum()
    with pytest.raises(ValueError, match="second derivatives of the loss are not finite"):
        monitor.measure(None)


@pytest.mark.parametrize("output", [{"loss": torch.ones(())}, torch.ones(3), None])
def test_what_is_no_loss_is_refused(output):
    model = make_net()
    monitor = StabilityMonitor(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda model, batch: output)
    with pytest.raises(TypeError, match="loss_fn must return the loss first"):
        monitor.measure(None)


def test_what_is_refused(monkeypatch):
    model = make_net()
    weights = list(model.parameters())
    [batch] = batches(1)
    groups = [{"params": weights[:2], "rho": 0.1}, {"params": weights[2:]}]
    optimizer = SAM(groups, torch.optim.SGD, rho=0.2, lr=0.1)
    with pytest.raises(ValueError, match=r"differ in rho: \[0.1, 0.2\]"):
        StabilityMonitor(model, optimizer, loss_of).measure(batch)
    optimizer = SAM(weights, torch.optim.SGD, rho=0.2, lr=0.1)
    loss_of(model, batch).backward()
    optimizer.first_step()
    with pytest.raises(StepOrderError, match="middle of a step"):
        StabilityMonitor(model, optimizer, loss_of).measure(batch)
    optimizer.restore()
    with pytest.raises(ValueError, match="not finite"):
        StabilityMonitor(model, optimizer, lambda m, b: loss_of(m, b) * float("inf")).measure(batch)
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="stability"):
        StabilityMonitor(model, optimizer, loss_of)


# ------------------------------------------------------------------ where an edge is known

SGD = torch.optim.SGD
BOWL = [[4.0, 0.0], [0.0, 1.0]]


def measured(cls, *args, **settings):
    model = Quadratic(BOWL, [0.5, 0.3])
    return StabilityMonitor(model, cls(model.parameters(), *args, **settings), quadratic_loss).measure(None)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.6, "dampening": 0.3},
        {"dampening": 0.3},
    ],
)
@pytest.mark.parametrize("rho", [None, 0.0])
def test_gradient_descent_diverges_behind_its_edge_and_not_before(settings, rho):
    """As SGD itself does it on a quadratic whose largest eigenvalue is 4."""
    ends = []
    for lr in (0.1, 0.3, 0.7, 0.9):
        edge = measured(*((SGD,) if rho is None else (SAM, SGD, rho)), lr=lr, **settings).edge
        ends.append(edge * lr)
    assert ends == pytest.approx([ends[0]] * 4)
    for share, converges in ((0.95, True), (1.05, False)):
        model = Quadratic(BOWL, [0.5, 0.3])
        optimizer = SGD(model.parameters(), lr=share * ends[0] / 4.0, **settings)
        for _ in range(600):
            optimizer.zero_grad()
            quadratic_loss(model, None).backward()
            optimizer.step()
        assert (model.a.abs() < 0.01) == converges


@pytest.mark.parametrize(
    ("arguments", "settings", "word"),
    [
        ((SAM, SGD), {"momentum": 0.9}, "momentum"),
        ((SAM, SGD), {"weight_decay": 0.1}, "weight decay"),
        ((SGD,), {"weight_decay": 0.1}, "weight decay"),
        ((SAM, SGD), {"maximize": True}, "maximize"),
        ((SGD,), {"maximize": True}, "maximize"),
        ((SAM, torch.optim.AdamW), {}, "AdamW"),
        ((torch.optim.Adam,), {}, "Adam"),
        ((torch.optim.Adadelta,), {}, "Adadelta"),
        ((SAM, SGD), {"adaptive": True}, "ASAM"),
        ((ASAM, SGD), {"adaptive": True}, "ASAM"),
        ((GSAM, SGD), {}, "GSAM"),
        ((IntervalSAM, SGD), {}, "IntervalSAM"),
    ],
)
def test_no_edge_is_given_where_none_is_known(arguments, settings, word):
    found = measured(*arguments, lr=0.1, **settings)
    assert math.isnan(found.edge) and math.isnan(found.relative_sharpness)
    assert word in found.edge_reason
    assert found.eigenvalue == pytest.approx(4.0)
    has_descent_edge = word in ("momentum", "ASAM", "GSAM", "IntervalSAM")
    assert math.isnan(found.gradient_descent_edge) != has_descent_edge
    if word == "momentum":
        assert found.gradient_descent_edge == pytest.approx(38.0)
    if not issubclass(arguments[0], SAM):
        assert found.alignment == found.perturbed_alignment


def test_groups_that_are_not_perturbed():
    model = Quadratic(BOWL, [0.5, 0.3])
    for flags, word in (((True, False), "perturb=False"), ((False, False), "")):
        groups = [{"params": [p], "perturb": flag} for p, flag in zip(model.parameters(), flags, strict=True)]
        found = StabilityMonitor(model, SAM(groups, SGD, lr=0.1), quadratic_loss).measure(None)
        assert word in found.edge_reason and math.isnan(found.edge) == bool(word)
        assert found.gradient_descent_edge == 20.0
    assert found.edge == 20.0
    groups = [{"params": [p], "momentum": m} for p, m in zip(model.parameters(), (0.0, 0.9), strict=True)]
    assert "momentum" in StabilityMonitor(model, SGD(groups, lr=0.1), quadratic_loss).measure(None).edge_reason


def test_a_known_edge_has_no_reason():
    found = measured(SAM, SGD, rho=0.1, lr=0.1)
    assert found.edge_reason == "" and found.edge < found.gradient_descent_edge == 20.0
    assert measured(SGD, lr=0.0).edge == math.inf  # before a warm-up's first step


# ------------------------------------------------------------------ models that are hard to differentiate twice


@pytest.mark.parametrize("input_has_gradient", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused(input_has_gradient):
    model, x = make_net(), batches(1)[0][0].requires_grad_(input_has_gradient)
    optimizer = SAM(model.parameters(), SGD, rho=0.1, lr=0.1)

    def loss(use_reentrant):
        def of(model, x):
            hidden = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant)
            return hidden.pow(2).mean()

        return of

    wanted = StabilityMonitor(model, optimizer, lambda m, x: m(x).pow(2).mean()).measure(x)
    found = StabilityMonitor(model, optimizer, loss(False)).measure(x)
    assert (found.eigenvalue, found.gradient_norm) == pytest.approx((wanted.eigenvalue, wanted.gradient_norm))
    before = weights_of(model)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        StabilityMonitor(model, optimizer, loss(True)).measure(x)
    assert_same(weights_of(model), before)


def test_complex_parameters_are_pairs_of_real_ones():
    """The same loss of a complex vector and of its parts."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    start = torch.randn(3, 2, generator=generator, dtype=torch.float64)

    def loss(model, batch):
        parts = torch.view_as_real(model.w) if model.w.is_complex() else model.w
        v = parts.reshape(-1)
        return (matrix @ v).square().sum() + (0.3 * v).sin().sum()

    found = []
    for value in (torch.view_as_complex(start), start):
        model = nn.Module()
        model.w = nn.Parameter(value.clone())
        optimizer = SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
        found.append(StabilityMonitor(model, optimizer, loss, tolerance=1e-10).measure(None))
    own, wanted = found
    assert list(own[1:7]) == pytest.approx(list(wanted[1:7]), rel=1e-6)
    own_vector = torch.view_as_real(own.eigenvector[0]).reshape(-1)
    assert abs(own_vector @ wanted.eigenvector[0].reshape(-1)).item() == pytest.approx(1.0, rel=1e-6)
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(1, dtype=torch.complex128))
    optimizer = SGD(model.parameters(), lr=0.1)
    bowl = StabilityMonitor(model, optimizer, lambda m, b: 3.0 * m.w.real.square().sum() + m.w.imag.square().sum())
    assert bowl.measure(None).eigenvalue == pytest.approx(6.0)
    plane = StabilityMonitor(model, optimizer, lambda m, b: m.w.real.sum()).measure(None)
    assert plane.eigenvalue == 0.0 and plane.eigenvector[0].abs().item() == pytest.approx(1.0)


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_is_differentiated_twice(is_causal):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = (t.view(2, 5, 2, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.attend(q, k, v).pow(2).mean()

        def attend(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    class ByHand(Attention):
        def attend(self, q, k, v):
            scores = q @ k.mT / 2.0
            if is_causal:
                scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
            return scores.softmax(-1) @ v

    own, by_hand = Attention(), ByHand()
    by_hand.load_state_dict(own.state_dict())
    found = [
        StabilityMonitor(m, SAM(m.parameters(), SGD, rho=0.1, lr=0.1), lambda m, x: m(x)).measure(x)
        for m in (own, by_hand)
    ]
    assert list(found[0][:7]) == pytest.approx(list(found[1][:7]), rel=1e-3)
