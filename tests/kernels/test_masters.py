"""Float32 masters of weights in bfloat16 and float16: every backend against the reference, and what they promise."""

from __future__ import annotations

import pytest
import torch

import sam_kernels as sk
from sam_kernels.snapshot import TAKEN

from .agreement import SCALES
from .cases import ALL_FORMS, random_tensors, same_bits
from .masters import LOW, Trained, both

by_dtype = pytest.mark.parametrize("dtype", LOW, ids=str)


def cuts_off(target, dtype):
    """Triton's interpreter does not round to bfloat16, as compiled code does, but drops the bits that are too many."""
    return dtype == torch.bfloat16 and getattr(target.backend, "is_interpreted", False)


def assert_rounded(target, problem, snapshot):
    """Every weight that has a master is its rounding."""
    for i in snapshot.with_master:
        weight, rounded = problem.params[i], snapshot.tensors[i].to(problem.params[i].dtype)
        if cuts_off(target, weight.dtype):
            torch.testing.assert_close(weight, rounded, rtol=2.0**-7, atol=0.0)
        else:
            assert same_bits(weight, rounded)


def test_which_tensors_have_masters():
    params = [torch.randn(5, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.complex64)]
    plan = sk.Plan(params)
    snapshot = sk.Snapshot(plan, masters=True)
    assert snapshot.with_master == [0, 2] and not snapshot.is_taken
    assert [t.dtype for t in snapshot.tensors] == [torch.float32, torch.float32, torch.float32, torch.complex64]
    for i in snapshot.with_master:
        assert torch.equal(snapshot.tensors[i], params[i].float())
    assert sk.Snapshot(plan).with_master == []


@by_dtype
@pytest.mark.parametrize("lists", [1, 3])
@pytest.mark.parametrize("adaptive", [False, True])
def test_ascent(target, dtype, lists, adaptive):
    def run(problem, plan, snapshot, backend):
        before = [t.clone() for t in snapshot.tensors]
        sk.ascent_(plan, problem.xs, scale=SCALES[lists], snapshot=snapshot, backend=backend)
        assert snapshot.is_taken
        for i in snapshot.with_master:
            assert same_bits(snapshot.tensors[i], before[i]), "a perturbation changed a master"

    problem = Trained.random(target.sizes, dtype, adaptive=adaptive, lists=lists)
    got, snapshot = both(target, problem, run)
    # A perturbation of the masters, not of their roundings.
    assert any(not torch.equal(p, m.to(p)) for p, m in zip(got.params, snapshot.tensors, strict=True))
    sk.restore_(got.plan(), snapshot, backend=target.name)
    assert_rounded(target, got, snapshot)
    assert not snapshot.is_taken


@by_dtype
def test_in_one_launch_and_in_two(gpu_target, launches, dtype):
    """Also a launch over nothing but masters, which the kernels of one launch need."""

    def run(problem, plan, snapshot, backend):
        sk.ascent_(plan, problem.xs, scale=SCALES[2], snapshot=snapshot, backend=backend)
        has_one_type = len({p.dtype for p in problem.params}) == 1
        if backend == gpu_target.name and (has_one_type or backend != "triton"):
            assert gpu_target.backend.launches(plan) == launches, "masters take more launches than copies"
        sk.descent_(plan, problem.xs, problem.adam(), rule=sk.Deflected(0.4), snapshot=snapshot, backend=backend)

    problem = Trained.random(gpu_target.sizes, dtype, adaptive=True, lists=2)
    low = [i for i, p in enumerate(problem.params) if p.dtype == dtype]
    alone = Trained(
        [problem.params[i] for i in low],
        [[x[i] for i in low] for x in problem.xs],
        [problem.geometry[i] for i in low],
        [problem.groups[i] for i in low],
        [[column[i] for i in low] for column in problem.states],
        [problem.steps[i] for i in low],
    )
    alone.masters = [problem.masters[i] for i in low]
    for own in (problem, alone):
        got, snapshot = both(gpu_target, own, run)
        assert_rounded(gpu_target, got, snapshot)


@by_dtype
@pytest.mark.parametrize(("base", "settings"), ALL_FORMS, ids=str)
def test_descent(target, dtype, base, settings):
    def run(problem, plan, snapshot, backend):
        sk.perturb_(plan, problem.xs, [1.0], snapshot=snapshot, backend=backend)
        update = problem.base(base, settings)
        sk.descent_(plan, problem.xs, update, snapshot=snapshot, grad_scale=2.0, backend=backend)
        assert not snapshot.is_taken

    got, snapshot = both(target, Trained.random(target.sizes, dtype), run)
    assert_rounded(target, got, snapshot)


@by_dtype
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_look_ahead(target, dtype, base):
    """Previews round to the weights and leave masters and state."""

    def run(problem, plan, snapshot, backend):
        before = [t.clone() for t in snapshot.tensors]
        update = problem.sgd(momentum=0.9) if base == "sgd" else problem.adam()
        copies = [t if snapshot.taken[i] else problem.params[i] for i, t in enumerate(snapshot.tensors)]
        view = sk.Snapshot.of(plan, [t.clone() for t in copies])
        sk.look_ahead_(plan, problem.xs, update, snapshot=view, backend=backend)
        points = [
            sk.Plan([torch.empty_like(p) for p in problem.params], problem.groups, problem.geometry) for _ in "ab"
        ]
        sk.ascent_(points[0], problem.xs[:1], snapshot=view, scale=0.1, backend=backend)
        sk.look_ahead_(points[1], problem.xs[:1], update, snapshot=view, backend=backend)
        assert all(same_bits(a, b) for a, b in zip(points[1].params, problem.params, strict=True))
        problem.states.append(points[0].params)
        for i in snapshot.with_master:
            assert same_bits(snapshot.tensors[i], before[i])

    both(target, Trained.random(target.sizes, dtype, adaptive=True), run)


@by_dtype
def test_overflow_and_missing_gradients_round_the_masters(target, dtype):
    def run(problem, plan, snapshot, backend):
        sk.perturb_(plan, problem.xs, [1.0], snapshot=snapshot, backend=backend)
        problem.xs[0][3] = problem.xs[0][4] = None
        update = problem.sgd(momentum=0.9)
        sk.descent_(plan, problem.xs, update, snapshot=snapshot, found_inf=True, backend=backend)
        sk.perturb_(plan, problem.xs, [1.0], snapshot=snapshot, backend=backend)
        sk.descent_(plan, problem.xs, update, snapshot=snapshot, backend=backend)

    problem = Trained.random(target.sizes, dtype)
    got, snapshot = both(target, problem, run)
    assert_rounded(target, got, snapshot)
    for i in (3, 4):
        torch.testing.assert_close(snapshot.tensors[i].cpu(), problem.masters[i], rtol=0.0, atol=0.0)


@by_dtype
def test_unaligned_and_strided_weights(target, dtype):
    """Weights that are no vectors, gradients one element off: the paths for single elements, and staging."""
    generator = torch.Generator().manual_seed(3)
    wide = [torch.randn(7, 33, generator=generator), torch.randn(4, 6, 5, generator=generator)]
    problem = Trained.random([(33, 7), (5, 6, 4), 40], dtype)
    problem.masters = [wide[0].t(), wide[1].permute(2, 1, 0), problem.masters[2]]
    problem.params[0] = wide[0].to(dtype).t()
    problem.params[1] = torch.zeros(5, 6, 8, dtype=dtype)[..., ::2].copy_(problem.masters[1])
    problem.xs[0][0] = torch.randn(232, generator=generator).to(dtype)[1:].view(33, 7)

    def run(problem, plan, snapshot, backend):
        sk.ascent_(plan, problem.xs, scale=0.1, snapshot=snapshot, backend=backend)
        sk.descent_(plan, problem.xs, problem.sgd(momentum=0.9), snapshot=snapshot, backend=backend)

    got, snapshot = both(target, problem, run)
    assert_rounded(target, got, snapshot)


@by_dtype
def test_small_updates_are_not_lost(target, dtype):
    """A thousand steps of a thousandth of a rounding each move the weight; without a master none does."""
    weight, gradient = torch.full((64,), 1.0, dtype=dtype, device=target.device), torch.ones(64, device=target.device)
    lost = weight.clone()
    steps, lr = (1000, 2.0**-18) if target.name == "cpu" else (8, 2.0**-11)
    base = sk.SGD([sk.SGDSettings(lr=lr)], [], bytearray(1))
    plan = sk.Plan([weight])
    snapshot = sk.Snapshot(plan, masters=True)
    for _ in range(steps):
        sk.descent_(plan, [[gradient]], base, snapshot=snapshot, backend=target.name)
        sk.descent_([lost], [[gradient / 4]], base, backend=target.name)
    assert torch.equal(snapshot.tensors[0].cpu(), torch.full((64,), 1.0 - steps * lr))
    assert weight[0] == torch.tensor(1.0 - steps * lr).to(dtype)
    if dtype == torch.bfloat16 and not cuts_off(target, dtype):
        assert torch.equal(lost.cpu(), torch.ones(64, dtype=dtype))


def test_masters_follow_weights_that_somebody_else_writes():
    weight = random_tensors([50], torch.bfloat16, 1)[0]
    plan = sk.Plan([weight])
    snapshot = sk.Snapshot(plan, masters=True)
    master = weight.float() * (1 + 2.0**-10)
    snapshot.adopt(plan, [master])
    kept = master.bfloat16() == weight
    assert kept.any()
    assert torch.equal(snapshot.tensors[0], torch.where(kept, master, weight.float()))

    before = snapshot.tensors[0].clone()
    weight[:10] = 7.0
    snapshot.adopt(plan, snapshot.tensors)
    assert torch.equal(snapshot.tensors[0][10:], before[10:]) and (snapshot.tensors[0][:10] == 7.0).all()


def test_masters_survive_a_change_of_strides():
    weight = torch.nn.Parameter(torch.randn(4, 6).bfloat16())
    plan = sk.Plan([weight])
    snapshot = sk.Snapshot(plan, masters=True)
    snapshot.tensors[0].mul_(1 + 2.0**-12)
    wanted = snapshot.tensors[0].clone()
    weight.data = weight.data.t().contiguous().t()
    plan.refresh()
    snapshot.fit(plan)
    assert torch.equal(snapshot.tensors[0], torch.where(wanted.bfloat16() == weight, wanted, weight.float()))
    assert snapshot.tensors[0].stride() == weight.stride()
    weight.data = weight.data.float()
    plan.refresh()
    snapshot.fit(plan)
    assert snapshot.with_master == [] and snapshot.tensors[0].dtype == torch.float32


def test_a_copy_of_another_type_without_the_flag_is_refused(target):
    weight = torch.randn(40, device=target.device).bfloat16()
    plan = sk.Plan([weight])
    snapshot = sk.Snapshot(plan, masters=True)
    snapshot.taken[0] = 0
    with pytest.raises(ValueError, match="no master"):
        sk.perturb_(plan, [[weight.clone()]], [1.0], snapshot=snapshot, backend=target.name)
    assert TAKEN == 1
