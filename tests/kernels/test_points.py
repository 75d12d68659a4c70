"""Look-aheads, and two points from one reading, on every native backend against the reference."""

from __future__ import annotations

import pytest
import torch

import sam_kernels as sk

from .cases import NAN, Problem, poisoned_snapshot, same_bits
from .test_parity import agree, by_dtypes

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


@by_dtypes
@pytest.mark.parametrize("options", LOOK_AHEAD_OPTIONS, ids=str)
def test_look_ahead(target, dtypes, options):
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

    agree(target, Problem.random(target.sizes, *dtypes), run)


def two_points(problem, options, backend, rule=None):
    """Checked against the two operations by themselves, bit for bit; returns the points and the plan of the second."""
    weights = [p.clone() for p in problem.params]
    base = problem.adam(amsgrad=True) if options == "adam" else problem.sgd(**options)
    before = [t.clone() for t in problem.tensors()]
    plans = [sk.Plan([torch.full_like(p, NAN) for p in weights], problem.groups, problem.geometry) for _ in range(4)]
    settings = {"rule": rule or sk.Normalized(), "scale": [[0.3], [0.0]], "backend": backend}
    x = problem.xs[0]

    def of(plan):
        return sk.Snapshot.of(plan, problem.params)

    report = sk.two_points_(plans[0], plans[1], x, base, snapshot=of(plans[1]), **settings)
    by_itself = sk.ascent_(plans[2], [x], snapshot=of(plans[2]), **settings)
    sk.look_ahead_(plans[3], [x], base, snapshot=of(plans[3]), backend=backend)
    assert report.finite == by_itself.finite
    assert torch.equal(report.gram, by_itself.gram)
    for one, other in ((0, 2), (1, 3)):
        for a, b in zip(plans[one].params, plans[other].params, strict=True):
            assert same_bits(a, b)
    for a, b in zip(problem.tensors(), before, strict=True):
        assert same_bits(a, b)
    for own, result in zip(problem.params, plans[0].params, strict=True):
        own.copy_(result)
    for own, result in zip(problem.states[2], plans[1].params, strict=True):
        own.copy_(result)
    return plans[1]


@by_dtypes
@pytest.mark.parametrize("options", LOOK_AHEAD_OPTIONS, ids=str)
@pytest.mark.parametrize("adaptive", [False, True])
def test_two_points(target, dtypes, options, adaptive):
    problem = Problem.random(target.sizes, *dtypes, adaptive=adaptive)
    problem.xs[0][2] = None
    agree(target, problem, lambda p, b: two_points(p, options, b))


def test_two_points_with_tensors_that_stay_out_of_the_ascent(target):
    def run(problem, backend):
        points = [sk.Plan([torch.full_like(p, NAN) for p in problem.params], problem.groups) for _ in range(2)]
        x = problem.xs[0]
        snapshot = sk.Snapshot.of(points[1], problem.params)
        sk.two_points_(*points, x, problem.sgd(), snapshot=snapshot, along=[x[0], None, x[2]], backend=backend)
        assert same_bits(points[0].params[1], problem.params[1])
        assert not torch.equal(points[1].params[1], problem.params[1])
        for own, result in zip(problem.params, points[0].params, strict=True):
            own.copy_(result)

    agree(target, Problem.random([40, 600, 1]), run)


@pytest.mark.parametrize("options", LOOK_AHEAD_OPTIONS, ids=str)
def test_two_points_in_one_launch_and_in_two(gpu_target, launches, options):
    def run(problem, backend):
        plan = two_points(problem, options, backend)
        if backend == gpu_target.name:
            assert gpu_target.backend.launches(plan) == launches

    agree(gpu_target, Problem.random(gpu_target.sizes, adaptive=True), run)


def test_two_points_of_a_gradient_that_is_not_finite(target):
    """Both stay where the copies are, bit for bit; so does a look-ahead that is told so."""
    problem = Problem.random([40, 600]).to(target.device)
    problem.xs[0][1][3] = float("inf")
    plans = [sk.Plan([torch.full_like(p, NAN) for p in problem.params], problem.groups) for _ in range(2)]
    snapshot = sk.Snapshot.of(plans[1], problem.params)
    report = sk.two_points_(*plans, problem.xs[0], problem.sgd(), snapshot=snapshot, backend=target.name)
    assert not report.finite
    other = sk.Plan([torch.full_like(p, NAN) for p in problem.params], problem.groups)
    copies = sk.Snapshot.of(other, problem.params)
    sk.look_ahead_(
        other, problem.xs[:1], problem.sgd(), snapshot=copies, found_inf=report.overflow, backend=target.name
    )
    for plan in (*plans, other):
        for point, weight in zip(plan.params, problem.params, strict=True):
            assert same_bits(point, weight)


def test_two_points_with_any_rule(target):
    """A rule that the kernels do not know takes the operations by themselves."""
    agree(target, Problem.random([40, 600, 1]), lambda p, b: two_points(p, {}, b, lambda gram: 1.0 / gram.diagonal()))


def test_two_points_refuses_what_does_not_fit(target):
    problem = Problem.random([40, 600]).to(target.device)
    plan = problem.plan()
    other = sk.Plan([p.double() for p in problem.params])
    snapshot = sk.Snapshot.of(plan, problem.params)
    with pytest.raises(ValueError, match="same shapes"):
        sk.two_points_(other, plan, problem.xs[0], problem.sgd(), snapshot=snapshot, backend=target.name)
    with pytest.raises(ValueError, match="copy of every weight"):
        sk.two_points_(plan, plan, problem.xs[0], problem.sgd(), snapshot=sk.Snapshot(plan), backend=target.name)
