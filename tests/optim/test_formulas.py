"""The methods against their papers' formulas, in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from sam_optim import ASAM, SAM

from .cases import BASES, METHODS, assert_same, batches, loss_of, make_net, oracle_step, step_by_hand, weights_of

# w after one step of plain SGD (lr 0.1, rho 0.5) on L = 1/2 w' diag(1, 4) w from (3, 1), two one-element tensors.
AUTHORS = {"adaptive": "weights"}
TOY = [
    ({}, ("a", "b"), (2.67, 0.44)),
    ({"adaptive": True}, ("a", "b"), (2.5629282677, 0.5187723068)),
    ({"adaptive": "elementwise"}, ("a", "b"), (2.5629282677, 0.5187723068)),
    (AUTHORS, ("a.weight", "b.weight"), (2.5626223455, 0.5175055785)),
    (AUTHORS, ("a.weight", "b.bias"), (2.5623960594, 0.5189978385)),
    ({"rho": 0.0}, ("a", "b"), (2.7, 0.6)),
]


def toy_step(make, names=("a", "b")):
    weights = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (3.0, 1.0)]
    optimizer = make(list(zip(names, weights, strict=True)))
    for move in (optimizer.first_step, optimizer.second_step):
        optimizer.zero_grad()
        (0.5 * (weights[0] ** 2 + 4 * weights[1] ** 2)).sum().backward()
        move()
    return [w.item() for w in weights]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("settings", "names", "wanted"), TOY, ids=str)
def test_toy_problem(settings, names, wanted, backend):
    settings = {"rho": 0.5, "backend": backend, **settings}
    got = toy_step(lambda params: SAM(params, torch.optim.SGD, lr=0.1, **settings), names)
    assert got == pytest.approx(wanted, abs=2e-10)


def test_asam_has_its_authors_defaults():
    got = toy_step(lambda params: ASAM(params, torch.optim.SGD, lr=0.1), ("a.weight", "b.bias"))
    assert got == pytest.approx((2.5623960594, 0.5189978385), abs=2e-10)


def test_unperturbed_groups_stay_out_of_the_norm():
    # Only the second tensor is perturbed, by rho along its own gradient (SAM-ON).
    def make(named):
        groups = [{"params": [named[0][1]], "perturb": False}, {"params": [named[1][1]]}]
        return SAM(groups, torch.optim.SGD, lr=0.1, rho=0.5)

    assert toy_step(make) == pytest.approx((2.7, 0.4), abs=1e-12)


def test_rho_of_each_group_scales_one_common_direction():
    def make(named):
        groups = [{"params": [named[0][1]], "rho": 1.0}, {"params": [named[1][1]]}]
        return SAM(groups, torch.optim.SGD, lr=0.1, rho=0.5)

    # g = (3, 4), |g| = 5: e = (1.0 * 3, 0.5 * 4) / 5.
    assert toy_step(make) == pytest.approx((3 - 0.1 * 3.6, 1 - 0.1 * 4 * 1.4), abs=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_trajectory(method, base, backend):
    ours, theirs = make_net(), make_net()
    optimizer = method.make(ours, base, backend=backend)
    oracle = base.minimizing(theirs.parameters())
    for batch in batches(12):
        step_by_hand(optimizer, ours, batch)
        oracle_step(theirs, oracle, method.settings["rho"], method.geometry, batch, base.sign)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        for key, value in oracle.state[b].items():
            torch.testing.assert_close(optimizer.state[a][key], value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rho_zero_is_the_base_bit_for_bit(base, dtype):
    # With dropout and BatchNorm in the model, whose draws and statistics must count once.
    from sam_optim import freeze_in_perturbed_passes

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
