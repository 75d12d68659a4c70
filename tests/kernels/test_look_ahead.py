"""Look-aheads, in place and into memory of their own, on every native backend against the reference."""

from __future__ import annotations

import pytest
import torch

import sam_kernels as sk

from .agreement import agree, by_dtypes
from .cases import ALL_FORMS, FULLEST_FORMS, NAN, Problem, poisoned_snapshot, same_bits

by_form = pytest.mark.parametrize("form", [ALL_FORMS[0], *FULLEST_FORMS], ids=str)


def look_ahead(problem, form, backend):
    """Weights go where the descent would lead; state and copies stay. Returns plan, snapshot and base."""
    before = problem.copy()
    plan = problem.plan()
    snapshot = poisoned_snapshot(plan)
    problem.xs[0][-1] = None
    sk.ascent_(plan, problem.xs, scale=0.3, snapshot=snapshot, backend=backend)
    # Perturbed, then without a gradient: restored. Never perturbed: left alone, though it has a gradient.
    problem.xs[0][3] = None
    problem.xs[0][-1] = torch.ones_like(problem.params[-1])
    base = problem.base(*form)
    sk.look_ahead_(plan, problem.xs, base, snapshot=snapshot, backend=backend)
    assert same_bits(problem.params[3], before.params[3])
    assert same_bits(problem.params[-1], before.params[-1])
    for a, b in zip(problem.tensors()[len(plan) :], before.tensors()[len(plan) :], strict=True):
        assert same_bits(a, b)
    return plan, snapshot, base


@by_dtypes
@by_form
def test_look_ahead(target, dtypes, form):
    def run(problem, backend):
        before = problem.copy()
        plan, snapshot, base = look_ahead(problem, form, backend)
        ahead = [p.clone() for p in problem.params]
        sk.restore_(plan, snapshot, backend=backend)
        for a, b in zip(problem.params, before.params, strict=True):
            assert same_bits(a, b)
        problem.xs[0][-1] = None
        sk.descent_(plan, problem.xs, base, backend=backend)
        for a, b in zip(problem.params, ahead, strict=True):
            assert same_bits(a, b)

    agree(target, Problem.random(target.sizes, *dtypes), run)


def elsewhere(problem):
    """A plan of memory of its own, and the problem's weights as what operations on it start from."""
    plan = sk.Plan([torch.full_like(p, NAN) for p in problem.params], problem.groups, problem.geometry)
    return plan, sk.Snapshot.of(plan, problem.params)


@by_dtypes
@by_form
@pytest.mark.parametrize("adaptive", [False, True])
def test_two_points_elsewhere(target, dtypes, form, adaptive):
    """SAMPa's: where an ascent and a look-ahead lead. They have the bits of both in place; nothing else is written."""
    scale = [[0.3], [0.0]]

    def run(problem, backend):
        before = [t.clone() for t in problem.tensors()]
        base = problem.base(*form)
        x = problem.xs[0]
        (ascended, weights), (ahead, same_weights) = elsewhere(problem), elsewhere(problem)
        report = sk.ascent_(ascended, [x], scale=scale, snapshot=weights, backend=backend)
        sk.look_ahead_(ahead, [x], base, snapshot=same_weights, found_inf=report.overflow, backend=backend)
        for a, b in zip(problem.tensors(), before, strict=True):
            assert same_bits(a, b)
        in_place = problem.copy()
        plan = in_place.plan()
        snapshot = poisoned_snapshot(plan)
        # Copies of all, as elsewhere: the norm's last bits depend on what a launch walks over.
        sk.perturb_(plan, [problem.params], [0.0], snapshot=snapshot, backend=backend)
        own = sk.ascent_(plan, [x], scale=scale, snapshot=snapshot, backend=backend)
        assert report.finite and torch.equal(report.gram, own.gram)
        for a, b in zip(ascended.params, in_place.params, strict=True):
            assert same_bits(a, b)
        own = in_place.base(*form)
        sk.descent_(plan, [x], own, snapshot=snapshot, backend=backend)
        for a, b in zip(ahead.params, in_place.params, strict=True):
            assert same_bits(a, b)
        for own, result in zip(problem.params, ascended.params, strict=True):
            own.copy_(result)
        for own, result in zip(problem.states[2], ahead.params, strict=True):
            own.copy_(result)

    problem = Problem.random(target.sizes, *dtypes, adaptive=adaptive)
    problem.xs[0][2] = None
    agree(target, problem, run)


def test_two_points_of_a_gradient_that_is_not_finite(target):
    """Both stay where the copies are, bit for bit."""
    problem = Problem.random([40, 600]).to(target.device)
    problem.xs[0][1][3] = float("inf")
    (ascended, weights), (ahead, same_weights) = elsewhere(problem), elsewhere(problem)
    report = sk.ascent_(ascended, problem.xs[:1], snapshot=weights, backend=target.name)
    assert not report.finite
    sk.look_ahead_(
        ahead,
        problem.xs[:1],
        problem.sgd(),
        snapshot=same_weights,
        found_inf=report.overflow,
        backend=target.name,
    )
    for plan in (ascended, ahead):
        for point, weight in zip(plan.params, problem.params, strict=True):
            assert same_bits(point, weight)
