"""Every operation of every native backend against the reference: all dtypes, sizes, options, paths and tails."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sam_kernels as sk
from sam_kernels.backends.contract import AscentArguments

from ..targets import target_named
from .agreement import SCALES, agree, by_dtypes, descent
from .cases import ALL_FORMS, Problem, poisoned_snapshot, same_bits


@by_dtypes
@pytest.mark.parametrize("lists", [1, 2, 3])
@pytest.mark.parametrize("adaptive", [False, True])
def test_gram(target, dtypes, lists, adaptive):
    problem = Problem.random(target.sizes, *dtypes, adaptive=adaptive, lists=lists)
    matrices = [
        sk.gram(own.xs, own.plan(), backend=name).cpu()
        for own, name in ((problem.to(target.device), target.name), (problem, "reference"))
    ]
    assert matrices[0].shape == (lists, lists)
    torch.testing.assert_close(*matrices, **of_gram(target, adaptive))


def of_gram(target, adaptive):
    """Sums are those of float64 numbers everywhere, but `foreach` rounds T x to the weights' type before."""
    return {"rtol": 1e-6, "atol": 1e-3} if adaptive and target.name == "foreach" else {"rtol": 1e-11, "atol": 1e-9}


def ascend(problem, backend, lists):
    plan = problem.plan()
    snapshot = poisoned_snapshot(plan)
    before = [p.clone() for p in problem.params]
    report = sk.ascent_(plan, problem.xs, scale=SCALES[lists], snapshot=snapshot, backend=backend)
    assert report.finite
    for copy, original in zip(snapshot.tensors, before, strict=True):
        assert same_bits(copy, original)
    return plan


@by_dtypes
@pytest.mark.parametrize("lists", [1, 2, 3])
@pytest.mark.parametrize("adaptive", [False, True])
def test_ascent(target, dtypes, lists, adaptive):
    problem = Problem.random(target.sizes, *dtypes, adaptive=adaptive, lists=lists)
    agree(target, problem, lambda p, b: ascend(p, b, lists))


@by_dtypes
@pytest.mark.parametrize("lists", [1, 3])
def test_ascent_in_one_launch_and_in_two(gpu_target, launches, dtypes, lists):
    def run(problem, backend):
        plan = ascend(problem, backend, lists)
        if backend == gpu_target.name:
            assert gpu_target.backend.launches(plan) == launches

    agree(gpu_target, Problem.random(gpu_target.sizes, *dtypes, adaptive=True, lists=lists), run)


@by_dtypes
@pytest.mark.parametrize("lists", [1, 2, 3])
def test_perturb_combine_restore(target, dtypes, lists):
    coefficients = [0.5, -2.0, 0.25][:lists]

    def perturb(problem, backend):
        plan = problem.plan()
        snapshot = poisoned_snapshot(plan)
        before = [p.clone() for p in problem.params]
        sk.perturb_(plan, problem.xs, coefficients, scale=SCALES[lists], snapshot=snapshot, backend=backend)
        perturbed = [p.clone() for p in problem.params]
        sk.restore_(plan, snapshot, backend=backend)
        assert all(same_bits(a, b) for a, b in zip(problem.params, before, strict=True))
        for p, value in zip(problem.params, perturbed, strict=True):
            p.copy_(value)

    def combine(problem, backend):
        sk.combine_(problem.plan(), problem.xs, torch.tensor(coefficients), scale=SCALES[lists], backend=backend)

    agree(target, Problem.random(target.sizes, *dtypes, adaptive=True, lists=lists), perturb)
    agree(target, Problem.random(target.sizes, *dtypes, lists=lists), combine)


@by_dtypes
@pytest.mark.parametrize(("base", "settings"), ALL_FORMS, ids=str)
def test_descent(target, dtypes, base, settings):
    for first in (False, True) if base.marks_first else (False,):
        agree(
            target,
            Problem.random(target.sizes, *dtypes),
            lambda p, b, first=first: descent(p, p.base(base, settings, first), b),
        )


@pytest.mark.parametrize(("base", "settings"), ALL_FORMS, ids=str)
def test_updates_have_the_same_bits_on_every_backend(shim, interpreter, base, settings):
    """Nothing is contracted, and divisions and roots are rounded correctly; so only sums may differ: here are none."""
    for dtype in (torch.float32, torch.float64):
        results = []
        for backend in ("cpu", shim.name, interpreter.name):
            problem = Problem.random([1, 33, 700], dtype, adaptive=True, lists=2)
            descent(problem, problem.base(base, settings), backend, scale=SCALES[2], grad_scale=3.0)
            results.append(problem.tensors())
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(other, results[0], strict=True))


@by_dtypes
@pytest.mark.parametrize("lists", [2, 3])
def test_descent_combines_lists_and_unscales(target, dtypes, lists):
    problem = Problem.random(target.sizes, *dtypes, lists=lists)

    def run(base, problem, backend):
        device = problem.params[0].device
        scale, found_inf = torch.tensor(4.0, device=device), torch.tensor(0.0, device=device)
        descent(problem, base, backend, scale=SCALES[lists], grad_scale=scale, found_inf=found_inf)

    agree(target, problem, lambda p, b: run(p.sgd(momentum=0.9), p, b))
    agree(target, problem, lambda p, b: run(p.adam(), p, b))


RULES = [sk.Deflected(alpha=0.4), sk.NormMatched(), sk.Normalized(), sk.NormalizedSum()]


@by_dtypes
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_descent_with_rule(target, dtypes, rule, weighted):
    def run(problem, backend):
        assert descent(problem, problem.sgd(momentum=0.9), backend, rule=rule, weighted=weighted).finite

    agree(target, Problem.random(target.sizes, *dtypes, lists=2, adaptive=True), run)


@by_dtypes
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_descent_with_rule_in_one_launch_and_in_two(gpu_target, launches, dtypes, base):
    def run(problem, backend):
        own = problem.sgd(momentum=0.9) if base == "sgd" else problem.adam()
        assert descent(problem, own, backend, rule=RULES[0]).finite

    agree(gpu_target, Problem.random(gpu_target.sizes, *dtypes, lists=2, adaptive=True), run)


@by_dtypes
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_found_inf_restores_and_updates_nothing(target, dtypes, base):
    problem = Problem.random(target.sizes, *dtypes)
    for device, backend in ((target.device, target.name), ("cpu", "reference")):
        own = problem.to(device)
        update = own.sgd(momentum=0.9) if base == "sgd" else own.adam()
        descent(own, update, backend, found_inf=torch.tensor(1.0, device=device))
        for a, b in zip(own.tensors(), problem.tensors(), strict=True):
            assert same_bits(a.cpu(), b)


@pytest.mark.parametrize("name", ["cpu", "triton interpreter"])
@by_dtypes
def test_any_shapes_and_missing_gradients(request, monkeypatch, name, dtypes):
    target = target_named(name, request, monkeypatch)
    examples, largest = (100, 3000) if name == "cpu" else (4, 700)

    @settings(max_examples=examples, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        sizes=st.lists(st.integers(0, largest), min_size=1, max_size=8),
        seed=st.integers(0, 2**16),
        adaptive=st.booleans(),
        absent=st.sets(st.integers(0, 7)),
    )
    def check(sizes, seed, adaptive, absent):
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

        agree(target, problem, run)

    check()


def test_mixed_types_and_alignments(target):
    """Weights, gradients and state of different types; views that start between the 16-byte boundaries."""

    def build():
        problem = Problem.random([600] * 8, torch.float32, lists=2)
        types = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
        for index in range(8):
            weight_type, other_type = types[index % 4], types[(index + index // 4) % 4]
            problem.params[index] = problem.params[index].to(weight_type)
            problem.xs[0][index] = problem.xs[0][index].to(other_type)
            problem.states[0][index] = problem.states[0][index].to(other_type)
            problem.xs[1][index] = torch.cat([torch.zeros(index), problem.xs[1][index].float()])[index:]
        return problem

    def run(problem, backend):
        plan = problem.plan()
        snapshot = poisoned_snapshot(plan)
        report = sk.ascent_(plan, problem.xs, scale=SCALES[2], snapshot=snapshot, backend=backend)
        sk.descent_(plan, problem.xs, problem.sgd(momentum=0.9), snapshot=snapshot, backend=backend)
        assert report.finite

    wanted, got = build(), build().to(target.device)
    run(wanted, "reference")
    run(got, target.name)
    for a, b in zip(got.tensors(), wanted.tensors(), strict=True):
        tolerance = 1e-2 if a.dtype in (torch.bfloat16, torch.float16) else 1e-5
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=1e-3)


def test_norm_over_tensors_of_several_types(target):
    """Of one chunk and of several each: all of them count, and the perturbation is scaled by all of them."""

    def run(problem, backend):
        types = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
        for column in (problem.params, *problem.xs):
            column[:] = [tensor.to(types[index % 4]) for index, tensor in enumerate(column)]
        report = sk.ascent_(problem.plan(), problem.xs, scale=3.0, backend=backend)
        problem.steps[:1] = [report.gram.clone()]

    agree(target, Problem.random([700, 9, 5, 600, 300], lists=2), run)


def test_gram_of_an_own_rule_ignores_the_perturbation(target):
    """The geometry is that of the copies where they are held, also if the Gram matrix is a launch by itself."""

    def run(problem, backend):
        plan = problem.plan()
        snapshot = poisoned_snapshot(plan)
        sk.perturb_(plan, problem.xs, [5.0], snapshot=snapshot, backend=backend)
        rule = lambda gram: gram.diagonal().rsqrt()  # noqa: E731
        report = sk.ascent_(plan, problem.xs, rule=rule, scale=0.1, snapshot=snapshot, backend=backend)
        problem.steps[:1] = [report.gram.to(torch.float32 if target.name == "foreach" else torch.float64)]

    agree(target, Problem.random([600, 9, 300], adaptive=True), run)


@by_dtypes
@pytest.mark.parametrize("moved", ["params", "xs", "states"])
def test_views_between_the_vectors(target, dtypes, moved):
    """Tensors of one type whose addresses are not multiples of 16 bytes."""

    def shifted(tensor):
        buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
        buffer[1:] = tensor
        return buffer[1:]

    def run(problem, backend):
        column = {"params": problem.params, "xs": problem.xs[0], "states": problem.states[0]}[moved]
        column[:] = [shifted(tensor) for tensor in column]
        plan = problem.plan()
        snapshot = poisoned_snapshot(plan)
        sk.ascent_(plan, problem.xs, scale=0.5, snapshot=snapshot, backend=backend)
        sk.descent_(plan, problem.xs, problem.sgd(momentum=0.9), snapshot=snapshot, backend=backend)
        sk.perturb_(plan, problem.xs, [0.5], snapshot=snapshot, backend=backend)
        sk.restore_(plan, snapshot, backend=backend)

    agree(target, Problem.random([600, 9, 513], *dtypes, adaptive=True), run)


def test_channels_last_complex_and_strided(target):
    def run(backend, device):
        generator = torch.Generator().manual_seed(0)
        weights = [
            torch.randn(4, 3, 5, 5, generator=generator).to(device, memory_format=torch.channels_last),
            torch.randn(20, 30, generator=generator).to(device)[:, ::2],
            torch.randn(70, dtype=torch.complex64, generator=generator).to(device),
        ]
        gradients = [torch.randn(w.shape, dtype=w.dtype, generator=generator).to(device) for w in weights]
        plan = sk.Plan(weights)
        snapshot = poisoned_snapshot(plan)
        sk.ascent_(plan, [gradients], scale=0.5, snapshot=snapshot, backend=backend)
        base = sk.SGD([sk.SGDSettings(0.1, 0.9)], [torch.zeros_like(w) for w in weights], bytearray(3))
        sk.descent_(plan, [gradients], base, snapshot=snapshot, backend=backend)
        return weights

    for a, b in zip(run(target.name, target.device), run("reference", "cpu"), strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_replaced_perturbation(gpu_target, launches):
    """Where a copy is held, the next perturbation starts from it; a tensor without an entry goes back to it."""

    def run(problem, backend):
        plan = problem.plan()
        snapshot = poisoned_snapshot(plan)
        sk.ascent_(plan, [problem.xs[0]], scale=3.0, snapshot=snapshot, backend=backend)
        problem.xs[1][2] = None
        sk.ascent_(plan, [problem.xs[1]], scale=0.5, snapshot=snapshot, backend=backend)

    agree(gpu_target, Problem.random([600, 5, 40, 1000], adaptive=True, lists=2), run)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_not_finite(gpu_target, launches, value):
    """Weights are those before, whatever they were perturbed to; no state and no step count moves."""
    problem = Problem.random([600, 5, 1000], lists=2).to(gpu_target.device)
    plan = problem.plan()
    before = problem.copy()
    problem.xs[0][2][700] = value
    for perturbed in (False, True):
        snapshot = poisoned_snapshot(plan)
        if perturbed:
            sk.perturb_(plan, [problem.xs[1]], [0.3], snapshot=snapshot, backend=gpu_target.name)
        report = sk.ascent_(plan, [problem.xs[0]], snapshot=snapshot, backend=gpu_target.name)
        assert not report.finite
        assert report.coefficients.tolist() == [0.0]
        assert all(same_bits(a, b) for a, b in zip(problem.params, before.params, strict=True))
        report = sk.ascent_(
            plan, problem.xs, rule=lambda gram: gram.diagonal(), snapshot=snapshot, backend=gpu_target.name
        )
        assert not report.finite
        assert all(same_bits(a, b) for a, b in zip(problem.params, before.params, strict=True))
    for base in (problem.adam(), problem.sgd(momentum=0.9)):
        for rule in (sk.Deflected(alpha=0.1), lambda gram: gram.diagonal()):
            report = sk.descent_(plan, problem.xs, base, rule=rule, snapshot=snapshot, backend=gpu_target.name)
            assert not report.finite
            assert all(same_bits(a, b) for a, b in zip(problem.tensors(), before.tensors(), strict=True))


def test_combine_without_entries(target):
    """Zeros, and none of them negative."""
    out = torch.full((300,), 7.0, device=target.device)
    sk.combine_([out], [[None], [None]], [1.0, 2.0], backend=target.name)
    assert same_bits(out.cpu(), torch.zeros(300))


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_learning_rate_zero_keeps_the_weights_bits(target, base):
    """Negative zeros too, and whatever the direction is."""
    problem = Problem.random([300])
    problem.params[0][::3] = -0.0
    before = problem.params[0].clone()
    problem.xs[0][0][5] = float("inf")
    own = problem.to(target.device)
    update = own.sgd(lr=0.0, momentum=0.9) if base == "sgd" else own.adam(lr=0.0, decoupled=True, weight_decay=0.1)
    sk.descent_(own.plan(), own.xs, update, backend=target.name)
    assert same_bits(own.params[0].cpu(), before)


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_a_nan_in_the_gradient_stays_where_it_is(target, base):
    """In one element of weight and state; in Adam's maximum for good, as in torch."""

    def run(problem, backend):
        update = problem.sgd(momentum=0.9) if base == "sgd" else problem.adam(amsgrad=True)
        problem.xs[0][0][5] = float("nan")
        sk.descent_(problem.plan(), problem.xs, update, backend=backend)
        problem.xs[0][0][5] = 1.0
        problem.states[0][0][5] = problem.states[1][0][5] = problem.params[0][5] = 2.0
        sk.descent_(problem.plan(), problem.xs, update, backend=backend)
        if base == "adam":
            assert problem.states[2][0].isnan().nonzero().tolist() == [[5]]

    agree(target, Problem.random([300, 9]), run)


# The interpreter of Triton rounds to bfloat16 in its own way; GPUs do as the others.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_same_bits_as_the_cpu_backend(gpu_target, dtype, base):
    """Given equal coefficients: the formulas are the same, rounded in the same places, and nothing is contracted."""
    problem = Problem.random(gpu_target.sizes, dtype, adaptive=True, lists=2)
    problem.steps = [torch.tensor(0.0) for _ in gpu_target.sizes]  # powers of larger ones are rounded differently
    results = []
    for own, name in ((problem.copy(), "cpu"), (problem.to(gpu_target.device), gpu_target.name)):
        plan = own.plan()
        snapshot = poisoned_snapshot(plan)
        sk.perturb_(plan, own.xs, [0.3, -0.1], snapshot=snapshot, backend=name)
        results.append([p.cpu().clone() for p in own.params])
        settings = {"momentum": 0.9, "nesterov": True} if base == "sgd" else {"amsgrad": True, "decoupled": True}
        update = getattr(own, base)(weight_decay=0.1, **settings)
        sk.descent_(plan, own.xs, update, scale=[[0.7, 0.2]] * 2, snapshot=snapshot, backend=name)
        results[-1] += [t.cpu() for t in own.tensors()]
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)


def test_infinite_entry_with_a_coefficient_of_zero(target):
    problem = Problem.random([600, 5], lists=2)
    problem.xs[1][0][3] = float("inf")

    def run(problem, backend):
        sk.perturb_(problem.plan(), problem.xs, [0.5, 0.0], backend=backend)

    agree(target, problem, run)


@pytest.mark.parametrize("base", ["sgd", "adam"])
@pytest.mark.parametrize("overflow", [0.0, 1.0])
@pytest.mark.parametrize("on_device", [True, False])
def test_grad_scale_found_inf_and_learning_rate_as_tensors(target, base, overflow, on_device):
    """On the device they are read when the kernels run."""

    def run(problem, backend):
        device = problem.params[0].device if on_device else "cpu"
        lr = torch.tensor(0.05, device=device)
        own = problem.sgd(momentum=0.9, lr=lr) if base == "sgd" else problem.adam(lr=lr, decoupled=True)
        scale, found = torch.tensor([8.0], device=device), torch.tensor(overflow, device=device)
        descent(problem, own, backend, grad_scale=scale, found_inf=found)

    agree(target, Problem.random([600, 5, 1000]), run)


def test_scales_on_the_device(target):
    problem = Problem.random([600, 5, 1000], lists=2, group_count=1)
    own = problem.to(target.device)
    scale = [torch.tensor(0.3, device=target.device), torch.tensor(-0.2, dtype=torch.float64, device=target.device)]
    plan = own.plan()
    target.backend.ascent(AscentArguments(plan, own.xs, sk.Normalized(), scale, poisoned_snapshot(plan)))
    sk.ascent_(problem.plan(), problem.xs, scale=[[0.3, -0.2]], backend="reference")
    for a, b in zip(own.params, problem.params, strict=True):
        torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("overflow", [0.0, 1.0])
def test_step_counts(gpu_target, launches, monkeypatch, on_host, overflow):
    """Each tensor has its own, on the device or on the host, as torch puts them."""
    problem = Problem.random([600, 5, 0, 1000], lists=2)
    problem.steps = [torch.tensor(3.0), torch.tensor(7.0, dtype=torch.float64), torch.tensor(0.0), torch.tensor(3.0)]
    own = problem.to(gpu_target.device)
    if on_host:
        own.steps = [step.cpu() for step in own.steps]
    # Where the device is the host, a test has to say which is meant.
    monkeypatch.setattr(gpu_target.backend, "steps_on_host", on_host)
    for backend, p in ((gpu_target.name, own), ("reference", problem)):
        for found_inf, rule in ((0.0, sk.Fixed()), (overflow, sk.Fixed()), (0.0, sk.Deflected(alpha=0.1))):
            flag = torch.tensor(found_inf, device=p.params[0].device)
            descent(p, p.adam(), backend, found_inf=flag, rule=rule)
    assert [float(s) for s in own.steps] == [step + 3 - overflow for step in (3.0, 7.0, 0.0, 3.0)]
    for a, b in zip(own.tensors(), problem.tensors(), strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_step_counts_of_tensors_of_two_types(gpu_target, launches):
    """However many launches they take, each step is counted once."""

    def run(problem, backend):
        for column in (problem.params, *problem.xs, *problem.states):
            column[1] = column[1].double()
        for rule in (sk.Fixed(), sk.Deflected(alpha=0.1)):
            descent(problem, problem.adam(), backend, rule=rule)
        assert [float(step) for step in problem.steps] == [2.0, 3.0, 4.0]

    agree(gpu_target, Problem.random([600, 300, 9], lists=2), run)


def test_coefficients_of_a_rule_of_the_users_own(target):
    """Three launches; the scalars stay where they are."""

    def rule(gram):
        return gram.diagonal().rsqrt() * 0.3

    def run(problem, backend):
        plan = problem.plan()
        snapshot = poisoned_snapshot(plan)
        report = sk.ascent_(plan, problem.xs, rule=rule, snapshot=snapshot, backend=backend)
        assert report.coefficients.device == problem.params[0].device
        sk.descent_(plan, problem.xs, problem.adam(), rule=rule, snapshot=snapshot, backend=backend)

    agree(target, Problem.random(target.sizes, lists=2), run)


def test_no_tensors_and_no_gradients(target):
    assert sk.gram([[]], [], backend="reference").tolist() == [[0.0]]
    for size in (3, 0):
        weight = torch.ones(size, device=target.device)
        for gradient in (None, torch.zeros_like(weight)):
            report = sk.ascent_([weight], [[gradient]], backend=target.name)
            assert report.finite and report.norms.tolist() == [0.0]


def test_unsupported_tensors(target):
    ones = torch.ones(3, device=target.device)
    with pytest.raises(ValueError, match="shape"):
        sk.ascent_([ones], [[torch.ones(4, device=target.device)]], backend=target.name)
    with pytest.raises(sk.UnsupportedTensorError, match="sparse"):
        sk.ascent_([ones], [[ones.to_sparse()]], backend=target.name)
    with pytest.raises(ValueError, match="step of tensor 0"):
        base = sk.Adam([sk.AdamSettings(0.1)], *([torch.zeros_like(ones)] for _ in range(2)), [], [torch.tensor(1)])
        sk.descent_([ones], [[ones]], base, backend=target.name)
