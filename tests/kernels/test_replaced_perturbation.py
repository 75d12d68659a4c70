"""A second perturbation while copies are held: it starts from the copies."""

from __future__ import annotations

import pytest
import torch

import sam_kernels as sk

from ..targets import CPU_SIZES as SIZES
from .cases import DTYPES, Problem, assert_backends_agree, poisoned_snapshot, same_bits


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_it_equals_a_first_one(backend, dtype, adaptive):
    problem = Problem.random([*SIZES, 1_300_001], dtype, lists=2, adaptive=adaptive)
    scale = [[0.3, -0.2], [0.1, 0.4]]
    direct, replaced = problem.copy(), problem.copy()
    direct_plan, plan = direct.plan(), replaced.plan()
    wanted = sk.ascent_(direct_plan, direct.xs, scale=scale, snapshot=sk.Snapshot(direct_plan), backend=backend)
    snapshot = poisoned_snapshot(plan)
    sk.ascent_(plan, replaced.xs[1:], scale=5.0, snapshot=snapshot, backend=backend)
    report = sk.ascent_(plan, replaced.xs, scale=scale, snapshot=snapshot, backend=backend)
    assert same_bits(report.gram, wanted.gram)
    for a, b in zip(replaced.params, direct.params, strict=True):
        assert same_bits(a, b)
    sk.restore_(plan, snapshot, backend=backend)
    for a, b in zip(replaced.params, problem.params, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("rule", [sk.Normalized(), lambda gram: 1 / gram.diagonal().sqrt()])
@pytest.mark.parametrize("finite", [False, True])
def test_tensors_that_drop_out_are_restored(rule, finite):
    def run(problem, backend):
        plan = problem.plan()
        before = [p.clone() for p in problem.params]
        snapshot = poisoned_snapshot(plan)
        sk.ascent_(plan, problem.xs, rule=rule, scale=0.5, snapshot=snapshot, backend=backend)
        problem.xs[0][1] = None
        if not finite:
            problem.xs[0][0][0] = float("inf")
        report = sk.ascent_(plan, problem.xs, rule=rule, scale=0.1, snapshot=snapshot, backend=backend)
        assert report.finite == finite
        assert list(snapshot.taken) == [1, 1, 1]
        assert same_bits(problem.params[1], before[1])
        assert same_bits(problem.params[0], before[0]) != finite
        base = problem.sgd(momentum=0.9)
        problem.xs[0][0] = torch.ones_like(problem.params[0])
        sk.descent_(plan, problem.xs, base, snapshot=snapshot, backend=backend)

    assert_backends_agree(Problem.random([600, 17, 40_000], adaptive=True), run)
