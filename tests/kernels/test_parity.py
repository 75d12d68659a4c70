"""Every operation of the CPU backend against the reference, for all dtypes, sizes and options."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sam_kernels as sk

from .cases import DTYPE_PAIRS, SIZES, Problem, assert_backends_agree, poisoned_snapshot, same_bits

SCALES = {k: [[0.05 * (g + 1) * (-1) ** i for i in range(k)] for g in range(2)] for k in (1, 2, 3)}

pytestmark = pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)


@pytest.mark.parametrize("lists", [1, 2, 3])
@pytest.mark.parametrize("adaptive", [False, True])
def test_gram(dtypes, lists, adaptive):
    problem = Problem.random(SIZES, *dtypes, adaptive=adaptive, lists=lists)
    matrices = [sk.gram(problem.xs, problem.plan(), backend=backend) for backend in ("cpu", "reference")]
    assert matrices[0].shape == (lists, lists)
    torch.testing.assert_close(*matrices, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("lists", [1, 2, 3])
@pytest.mark.parametrize("adaptive", [False, True])
def test_ascent(dtypes, lists, adaptive):
    def run(problem, backend):
        plan = problem.plan()
        snapshot = poisoned_snapshot(plan)
        before = [p.clone() for p in problem.params]
        report = sk.ascent_(plan, problem.xs, scale=SCALES[lists], snapshot=snapshot, backend=backend)
        assert report.finite
        for copy, original in zip(snapshot.tensors, before, strict=True):
            assert same_bits(copy, original)

    assert_backends_agree(Problem.random(SIZES, *dtypes, adaptive=adaptive, lists=lists), run)


@pytest.mark.parametrize("lists", [1, 2, 3])
def test_perturb_and_combine(dtypes, lists):
    coefficients = [0.5, -2.0, 0.25][:lists]

    def perturb(problem, backend):
        sk.perturb_(problem.plan(), problem.xs, coefficients, scale=SCALES[lists], backend=backend)

    def combine(problem, backend):
        sk.combine_(problem.plan(), problem.xs, torch.tensor(coefficients), scale=SCALES[lists], backend=backend)

    assert_backends_agree(Problem.random(SIZES, *dtypes, adaptive=True, lists=lists), perturb)
    assert_backends_agree(Problem.random(SIZES, *dtypes, lists=lists), combine)


SGD_OPTIONS = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"momentum": 0.9, "dampening": 0.3, "maximize": True},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.9, "lr": 0.0},
]
ADAM_OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled": True, "maximize": True},
    {"amsgrad": True, "beta1": 0.4, "beta2": 0.9},
    {"amsgrad": True, "decoupled": True, "weight_decay": 0.2, "eps": 1e-3},
    {"decoupled": True, "weight_decay": 0.1, "lr": 0.0},
]


def descent(problem, base, backend, **arguments):
    """Perturb with snapshot, then descend; both with the same backend."""
    plan = problem.plan()
    snapshot = poisoned_snapshot(plan)
    sk.perturb_(plan, problem.xs, [1.0] * len(problem.xs), snapshot=snapshot, backend=backend)
    report = sk.descent_(plan, problem.xs, base, snapshot=snapshot, backend=backend, **arguments)
    assert not snapshot.is_taken
    return report


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
@pytest.mark.parametrize("first", [False, True])
def test_descent_sgd(dtypes, options, first):
    problem = Problem.random(SIZES, *dtypes)
    assert_backends_agree(problem, lambda p, b: descent(p, p.sgd(first, **options), b))


@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
def test_descent_adam(dtypes, options):
    problem = Problem.random(SIZES, *dtypes)
    assert_backends_agree(problem, lambda p, b: descent(p, p.adam(**options), b))


@pytest.mark.parametrize("lists", [2, 3])
def test_descent_combines_lists_and_unscales(dtypes, lists):
    problem = Problem.random(SIZES, *dtypes, lists=lists)
    arguments = {"scale": SCALES[lists], "grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(0.0)}
    assert_backends_agree(problem, lambda p, b: descent(p, p.sgd(momentum=0.9), b, **arguments))
    assert_backends_agree(problem, lambda p, b: descent(p, p.adam(), b, **arguments))


@pytest.mark.parametrize("rule", [sk.Deflected(alpha=0.4), sk.NormMatched(), sk.Normalized()], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_descent_with_rule(dtypes, rule, weighted):
    problem = Problem.random(SIZES, *dtypes, lists=2, adaptive=True)

    def run(problem, backend):
        arguments = {"rule": rule, "weighted": weighted}
        assert descent(problem, problem.sgd(momentum=0.9), backend, **arguments).finite

    assert_backends_agree(problem, run)


def test_found_inf_restores_and_updates_nothing(dtypes):
    problem = Problem.random(SIZES, *dtypes)
    for base in ("sgd", "adam"):
        for backend in ("cpu", "reference"):
            own = problem.copy()
            settings = {"momentum": 0.9} if base == "sgd" else {}
            descent(own, getattr(own, base)(**settings), backend, found_inf=torch.tensor(1.0))
            for a, b in zip(own.tensors(), problem.tensors(), strict=True):
                assert same_bits(a, b)


@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=8),
    seed=st.integers(0, 2**16),
    adaptive=st.booleans(),
    absent=st.sets(st.integers(0, 7)),
)
def test_any_shapes_and_missing_gradients(dtypes, sizes, seed, adaptive, absent):
    problem = Problem.random(sizes, *dtypes, adaptive=adaptive, lists=2)
    for tensor in problem.params:
        tensor.mul_(1 + seed % 7)
    for index in absent:
        if index < len(sizes):
            problem.xs[index % 2][index] = None
            if index % 3 == 0:
                problem.xs[1 - index % 2][index] = None

    def run(problem, backend):
        plan = problem.plan()
        snapshot = poisoned_snapshot(plan)
        sk.ascent_(plan, problem.xs, scale=SCALES[2], snapshot=snapshot, backend=backend)
        sk.descent_(plan, problem.xs, problem.sgd(momentum=0.9), snapshot=snapshot, backend=backend)

    assert_backends_agree(problem, run)


LOOK_AHEAD_OPTIONS = [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, "adam"]


def look_ahead(problem, options, backend):
    """Weights go where the descent would lead; state and copies stay. Returns plan, snapshot and base."""
    before = problem.copy()
    plan = problem.plan()
    snapshot = poisoned_snapshot(plan)
    problem.xs[0][-1] = None
    sk.ascent_(plan, problem.xs, scale=0.3, snapshot=snapshot, backend=backend)
    # Perturbed, then without a gradient: restored. Never perturbed: left alone, though it has a gradient.
    problem.xs[0][3] = None
    problem.xs[0][-1] = torch.ones_like(problem.params[-1])
    base = problem.adam(amsgrad=True) if options == "adam" else problem.sgd(**options)
    sk.look_ahead_(plan, problem.xs, base, snapshot=snapshot, backend=backend)
    assert same_bits(problem.params[3], before.params[3])
    assert same_bits(problem.params[-1], before.params[-1])
    for a, b in zip(problem.tensors()[len(plan) :], before.tensors()[len(plan) :], strict=True):
        assert same_bits(a, b)
    return plan, snapshot, base


@pytest.mark.parametrize("options", LOOK_AHEAD_OPTIONS, ids=str)
def test_look_ahead(dtypes, options):
    def run(problem, backend):
        before = problem.copy()
        plan, snapshot, base = look_ahead(problem, options, backend)
        ahead = [p.clone() for p in problem.params]
        sk.restore_(plan, snapshot, backend=backend)
        for a, b in zip(problem.params, before.params, strict=True):
            assert same_bits(a, b)
        problem.xs[0][-1] = None
        sk.descent_(plan, problem.xs, base, backend=backend)
        for a, b in zip(problem.params, ahead, strict=True):
            assert same_bits(a, b)

    assert_backends_agree(Problem.random(SIZES, *dtypes), run)
