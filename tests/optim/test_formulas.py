"""The methods against their papers: numbers by hand, and trajectories of their formulas in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from sam_optim import (
    AESAM,
    ASAM,
    CRSAM,
    GNP,
    GSAM,
    SAM,
    USAM,
    WSAM,
    FriendlySAM,
    IntervalSAM,
    LookSAM,
    MomentumSAM,
    RandomizedSAM,
    StableSAM,
    UnifiedSAM,
    VaSSO,
    freeze_in_perturbed_passes,
)

from .bases import BASES, KINDS, MAXIMIZING_ADAM, SGD, SGD_OF_A_TENSOR
from .cases import assert_same, batches, loss_of, make_net, memory_loss, weights_of
from .drivers import by_each_pass, data_of_steps
from .methods import ALL_SETTINGS, METHODS, named
from .oracle import Oracle

# w after one step of plain SGD (lr 0.1, rho 0.5) on L = 1/2 w' diag(1, 4) w from (3, 1), two one-element tensors.
OF_SAM, OF_SGD = (2.67, 0.44), (2.7, 0.6)
TOY = [
    (SAM, {}, OF_SAM),
    (SAM, {"rho": 0.0}, OF_SGD),
    (SAM, {"adaptive": True}, (2.5629282677, 0.5187723068)),
    (SAM, {"adaptive": "elementwise"}, (2.5629282677, 0.5187723068)),
    (GSAM, {"alpha": 0.5}, (2.6938579882, 0.4259408284)),
    (GSAM, {"alpha": 0.0}, OF_SAM),
    (StableSAM, {}, (2.7461538462, 0.5692307692)),
    (WSAM, {"gamma": 0.8 / 1.8, "decouple": False}, (2.676, 0.472)),  # with a = 0.8 the gradient norm penalty
    (GNP, {}, (2.676, 0.472)),
    (GNP, {"alpha": 1.0}, OF_SAM),
    (GNP, {"alpha": 0.0}, OF_SGD),
    (WSAM, {"gamma": 0.9}, (2.43, -0.84)),
    (WSAM, {"gamma": 0.9, "decouple": False}, (2.43, -0.84)),  # the same for plain SGD
    (WSAM, {"gamma": 0.0}, OF_SGD),
    (FriendlySAM, {}, OF_SAM),
    (LookSAM, {}, OF_SAM),
    (UnifiedSAM, {"k": 0.5}, (2.61, 0.12)),
    (UnifiedSAM, {"k": 0.0, "rho": 0.1}, OF_SAM),
    (UnifiedSAM, {"k": 1.0}, OF_SAM),
    (USAM, {"rho": 0.1}, OF_SAM),
    (VaSSO, {}, OF_SAM),
    (CRSAM, {}, (2.6694, 0.4368)),
    (CRSAM, {"gamma": 0.0, "beta": 0.0}, OF_SAM),
    (IntervalSAM, {}, OF_SAM),
    (IntervalSAM, {"start": 1}, OF_SGD),
    (RandomizedSAM, {"probability": 1.0}, OF_SAM),
    (RandomizedSAM, {"probability": 0.0}, OF_SGD),
    (AESAM, {}, OF_SAM),
]


def toy_steps(make, names=("a", "b"), steps=1):
    weights = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (3.0, 1.0)]
    optimizer = make(list(zip(names, weights, strict=True)))
    for _ in range(steps):
        for _ in optimizer.each_pass():
            (0.5 * (weights[0] ** 2 + 4 * weights[1] ** 2)).sum().backward()
    return [w.item() for w in weights]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("method", "settings", "wanted"), TOY)
def test_toy_problem(method, settings, wanted, backend):
    settings = {"rho": 0.5, "backend": backend, **settings}
    got = toy_steps(lambda params: method(params, torch.optim.SGD, lr=0.1, **settings))
    assert got == pytest.approx(wanted, abs=2e-10)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [(("a.weight", "b.weight"), (2.5626223455, 0.5175055785)), (("a.weight", "b.bias"), (2.5623960594, 0.5189978385))],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_toy_problem_of_the_authors_asam(names, wanted, backend):
    def make(params):
        return SAM(params, torch.optim.SGD, rho=0.5, adaptive="weights", lr=0.1, backend=backend)

    assert toy_steps(make, names) == pytest.approx(wanted, abs=2e-10)


def test_asam_has_its_authors_defaults():
    got = toy_steps(lambda params: ASAM(params, torch.optim.SGD, lr=0.1), ("a.weight", "b.bias"))
    assert got == pytest.approx((2.5623960594, 0.5189978385), abs=2e-10)


def test_unperturbed_groups_stay_out_of_the_norm():
    # Only the second tensor is perturbed, by rho along its own gradient (SAM-ON).
    def make(named):
        groups = [{"params": [named[0][1]], "perturb": False}, {"params": [named[1][1]]}]
        return SAM(groups, torch.optim.SGD, lr=0.1, rho=0.5)

    assert toy_steps(make) == pytest.approx((2.7, 0.4), abs=1e-12)


def test_rho_of_each_group_scales_one_common_direction():
    def make(named):
        groups = [{"params": [named[0][1]], "rho": 1.0}, {"params": [named[1][1]]}]
        return SAM(groups, torch.optim.SGD, lr=0.1, rho=0.5)

    # g = (3, 4), |g| = 5: e = (1.0 * 3, 0.5 * 4) / 5.
    assert toy_steps(make) == pytest.approx((3 - 0.1 * 3.6, 1 - 0.1 * 4 * 1.4), abs=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_vasso_as_its_authors_code_runs(backend):
    """Two steps on the toy problem: numbers of their code, whose average starts at the first gradient."""

    def make(params):
        return VaSSO(params, torch.optim.SGD, rho=0.5, theta=0.4, lr=0.1, backend=backend)

    assert toy_steps(make, steps=2) == pytest.approx((2.3690683088, 0.1171046450), abs=2e-10)


def test_momentum_sam_on_the_toy_problem():
    """From (3, 1) with momentum 0.5: v = (3, 4), then w~ = w - 0.5 (0.6, 0.8)."""
    weight = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = MomentumSAM([weight], torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.5)
    seen = []
    for _ in range(2):
        for _ in optimizer.each_pass():
            seen.append(weight.detach().clone())
            (0.5 * torch.tensor([1.0, 4.0]) * weight**2).sum().backward()
    assert seen[0].tolist() == [3.0, 1.0]
    assert seen[1].tolist() == pytest.approx([2.7 - 0.3, 0.6 - 0.4], abs=1e-12)
    # v = 0.5 (3, 4) + (2.4, 0.8)
    assert weight.tolist() == pytest.approx([2.7 - 0.39, 0.6 - 0.28], abs=1e-12)


# What a method asks of its base is in the one, which update that is in the other: each method with some bases, and
# each base with methods that take its plain update, that with a rule, that with a momentum, and its look-ahead.
PAIRS = [(m, b) for m in ALL_SETTINGS for b in (*KINDS, MAXIMIZING_ADAM, SGD_OF_A_TENSOR)]
PAIRS += [(named(m), b) for m in ("SAM", "GSAM", "MomentumSAM", "SAMPa") for b in BASES if (named(m), b) not in PAIRS]


def follow_the_formula(method, base, steps=8, **settings):
    """Trains by the optimizer and by its formula, and compares weights after each step, and the base's state."""
    model, wanted = make_net(), make_net()
    more = settings.pop("backend", "cpu")
    optimizer = method.make(model, base, backend=more, **settings)
    oracle = Oracle(method, base, wanted, {"train": loss_of, "memory": memory_loss}, **settings)
    for data in data_of_steps(steps):
        by_each_pass(optimizer, model, [data], memory_loss=memory_loss)
        oracle.step(data)
        torch.testing.assert_close(weights_of(model), weights_of(wanted), rtol=1e-9, atol=1e-10)
    for p, q in zip(model.parameters(), wanted.parameters(), strict=True):
        for key, value in oracle.base.optimizer.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key], value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("method", "base"), [pair for pair in PAIRS if pair[0].fits(pair[1])], ids=str)
def test_trajectory(method, base):
    follow_the_formula(method, base)


@pytest.mark.parametrize("method", ALL_SETTINGS, ids=str)
def test_trajectory_of_the_reference(method):
    follow_the_formula(method, SGD, backend="reference")


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_trajectory_in_the_geometry_of_asam(method):
    follow_the_formula(method, SGD, adaptive=True)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_trajectory_at_radius_zero(method):
    follow_the_formula(method, SGD, **method.rho_zero)


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rho_zero_is_the_base_bit_for_bit(base, dtype):
    # With dropout and BatchNorm in the model, whose draws and statistics must count once.
    results = []
    for sharpness_aware in (True, False):
        model = make_net(dtype, dropout=0.3, batch_norm=True)
        torch.manual_seed(3)
        settings = copy.deepcopy(base.settings)
        if sharpness_aware:
            optimizer = SAM(model.parameters(), base.cls, rho=0.0, closure_runs="every_pass", **settings)
            freeze_in_perturbed_passes(model, optimizer)
        else:
            optimizer = base.cls(model.parameters(), **settings)
        losses = []
        for batch in batches(8, dtype):

            def closure(batch=batch, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).detach())
        results.append([*losses, *weights_of(model), *model.buffers(), torch.get_rng_state()])
    assert_same(*results)


def test_the_norm_runs_over_all_groups_and_dtypes():
    weights = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    optimizer = SAM([{"params": [w]} for w in weights], torch.optim.SGD, lr=0.1, rho=1.0)
    for w in weights:
        w.grad = torch.full_like(w, 2.0)
    optimizer.first_step()
    assert optimizer.last_step.ascent.norms.item() == pytest.approx(24**0.5)
    for w in weights:
        torch.testing.assert_close(w.detach(), torch.full_like(w, 1 + 2 / 24**0.5), rtol=1e-6, atol=0)
