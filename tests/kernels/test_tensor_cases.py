"""Strides, views, complex numbers, mixtures, and tensors that no kernel can work on."""

from __future__ import annotations

import weakref

import pytest
import torch

import sam_kernels as sk

from .cases import Problem, assert_backends_agree, poisoned_snapshot, random_tensors, same_bits


def whole_step(problem: Problem, backend: str) -> None:
    plan = problem.plan()
    before = [p.clone() for p in problem.params]
    snapshot = poisoned_snapshot(plan)
    sk.ascent_(plan, problem.xs, scale=0.5, snapshot=snapshot, backend=backend)
    for copy, original in zip(snapshot.tensors, before, strict=True):
        assert same_bits(copy, original)
    sk.descent_(plan, problem.xs, problem.sgd(momentum=0.9), snapshot=snapshot, backend=backend)


def test_unaligned_views():
    problem = Problem.random([40_000, 33, 1000])
    storage = [torch.randn(t.numel() + 7) for t in problem.params]

    def run(problem, backend):
        for index, offset in enumerate((1, 3, 5)):
            for column in (problem.params, problem.xs[0], problem.states[0]):
                view = storage[index].clone()[offset : offset + column[index].numel()]
                column[index] = view.copy_(column[index])
        whole_step(problem, backend)

    assert_backends_agree(problem, run)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every second": lambda t: torch.empty(*t.shape, 2).select(-1, 1).copy_(t),
    "contiguous": lambda t: t.contiguous(),
}


@pytest.mark.parametrize("weights", LAYOUTS)
@pytest.mark.parametrize("gradients", LAYOUTS)
@pytest.mark.parametrize("state", LAYOUTS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_strides(weights, gradients, state, adaptive):
    def run(problem, backend):
        for column, layout in ((problem.params, weights), (problem.xs[0], gradients), (problem.states[0], state)):
            column[0] = LAYOUTS[layout](column[0])
        whole_step(problem, backend)

    assert_backends_agree(Problem.random([(33, 65), 7], adaptive=adaptive), run)


@pytest.mark.parametrize("gradient_format", [torch.channels_last, torch.contiguous_format])
def test_channels_last(gradient_format):
    def run(problem, backend):
        for column, memory_format in (
            (problem.params, torch.channels_last),
            (problem.xs[0], gradient_format),
            (problem.states[0], torch.channels_last),
        ):
            for index in range(2):
                column[index] = column[index].contiguous(memory_format=memory_format)
        whole_step(problem, backend)

    assert_backends_agree(Problem.random([(8, 5, 3, 3), (16, 4, 1, 1), 9]), run)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("adaptive", [False, True])
def test_complex(dtype, adaptive):
    generator = torch.Generator().manual_seed(3)

    def tensors() -> list[torch.Tensor]:
        return [torch.randn(n, dtype=dtype, generator=generator) for n in (1, 17, 1000)]

    geometry = [0.1 if adaptive else None] * 3
    params, gradients, buffers = tensors(), tensors(), tensors()
    results = []
    for backend in ("cpu", "reference"):
        own = [t.clone() for t in params]
        momentum = [t.clone() for t in buffers]
        plan = sk.Plan(own, geometry=geometry)
        snapshot = poisoned_snapshot(plan)
        # A pending conjugation must be taken into account.
        xs = [[g.clone().conj() if index == 1 else g.clone() for index, g in enumerate(gradients)]]
        report = sk.ascent_(plan, xs, scale=0.5, snapshot=snapshot, backend=backend)
        base = sk.SGD([sk.SGDSettings(0.1, 0.9)], momentum, bytearray(3))
        sk.descent_(plan, xs, base, snapshot=snapshot, backend=backend)
        results.append([*own, *momentum, report.gram])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_pending_negation_of_a_single_element():
    # The imaginary part of a conjugated number: dense, and its memory holds the opposite of its value.
    value = torch.tensor([1 + 2j]).conj().imag
    assert value.is_neg()
    weight = torch.zeros(1)
    sk.perturb_([weight], [[value]], [1.0], backend="cpu")
    assert weight.item() == -2.0


def test_mixed_dtypes_in_one_launch():
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32]
    problem = Problem.random([1000] * 5)
    for index, dtype in enumerate(dtypes):
        problem.params[index] = problem.params[index].to(dtype)
        problem.xs[0][index] = problem.xs[0][index].to(dtype)
        problem.states[0][index] = problem.states[0][index].to(dtype)
    assert_backends_agree(problem, whole_step)


def test_noncontiguous_weights_keep_their_memory():
    storage = torch.randn(20)
    weight = storage[::2]
    sk.perturb_([weight], [[torch.ones(10)]], [1.0], backend="cpu")
    assert weight.data_ptr() == storage.data_ptr()
    assert not torch.equal(storage, torch.zeros(20))


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize(
    ("gradient", "error", "message"),
    [
        (torch.eye(3, 2).to_sparse(), sk.UnsupportedTensorError, "sparse"),
        (torch.zeros(3, 2, dtype=torch.int32), sk.UnsupportedTensorError, "int32"),
        (torch.zeros(3, 2, device="meta"), sk.UnsupportedTensorError, "no memory"),
        (torch.zeros(2, 3), ValueError, "shape"),
        (torch.zeros(3, 2, dtype=torch.complex64), ValueError, "complex"),
    ],
)
def test_unsuitable_gradients_change_nothing(backend, gradient, error, message):
    params = random_tensors([5, (3, 2)], torch.float32, 0)
    before = [p.clone() for p in params]
    plan = sk.Plan(params, names=["a", "b"])
    snapshot = sk.Snapshot(plan)
    with pytest.raises(error, match=message):
        sk.ascent_(plan, [[torch.ones(5), gradient]], snapshot=snapshot, backend=backend)
    assert not snapshot.is_taken
    for a, b in zip(params, before, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("param", [torch.zeros(2, dtype=torch.int64), torch.zeros(2, device="meta")])
def test_unsuitable_weights(param):
    with pytest.raises(sk.UnsupportedTensorError):
        sk.perturb_([param], [[torch.ones(2)]], [1.0])


class OwnParameter(torch.nn.Parameter):
    """A subclass with memory of its own."""


def test_subclasses():
    weight = OwnParameter(torch.ones(5))
    sk.perturb_([weight], [[torch.ones(5).as_subclass(OwnParameter)]], [1.0], backend="cpu")
    assert torch.equal(weight.detach(), torch.full((5,), 2.0))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(5)
    with pytest.raises(sk.UnsupportedTensorError, match="FakeTensor"):
        sk.perturb_([weight], [[fake]], [1.0], backend="cpu")


def test_lists_that_do_not_fit():
    a = torch.ones(2)
    with pytest.raises(ValueError, match="2 entries for 1 tensors"):
        sk.ascent_([a], [[a, a]])
    with pytest.raises(ValueError, match="1 to 3"):
        sk.gram([[a]] * 4)
    with pytest.raises(ValueError, match="coefficients"):
        sk.perturb_([a], [[a]], [1.0, 2.0])
    with pytest.raises(ValueError, match="scale"):
        sk.perturb_([a], [[a]], [1.0], scale=[[1.0, 2.0]])
    with pytest.raises(ValueError, match="eta"):
        sk.Plan([a], geometry=[-1.0])
    with pytest.raises(ValueError, match="groups"):
        sk.Plan([a], groups=[-1])


def test_moved_and_converted_weights_are_noticed():
    weight = torch.nn.Parameter(torch.ones(100))
    plan = sk.Plan([weight])
    snapshot = sk.Snapshot(plan)
    sk.ascent_(plan, [[torch.ones(100)]], scale=10.0, snapshot=snapshot)
    torch.testing.assert_close(weight.detach(), torch.full((100,), 2.0))
    sk.restore_(plan, snapshot)
    for replacement in (torch.ones(100), torch.ones(100, dtype=torch.float64), torch.ones(36, dtype=torch.bfloat16)):
        weight.data = replacement
        gradient = torch.ones_like(replacement)
        sk.ascent_(plan, [[gradient]], scale=10.0 * replacement.numel() ** 0.5 / 10.0, snapshot=snapshot)
        torch.testing.assert_close(weight.detach(), torch.full_like(replacement, 2.0))
        sk.restore_(plan, snapshot)
        assert torch.equal(weight.detach(), torch.ones_like(replacement))


@pytest.mark.parametrize("backend", ["reference", "foreach", "cpu"])
def test_replaced_weights_are_noticed_where_they_are_not_read(backend):
    """The Gram matrix of plain gradients reads no weights, but gradients must be of their shapes."""
    weights = [torch.randn(3, 2), torch.randn(4)]
    plan = sk.Plan(weights)
    assert sk.gram([[torch.ones(3, 2), torch.ones(4)]], plan, backend=backend).item() == pytest.approx(10.0)
    weights[0].data = torch.randn(5, 2)
    assert sk.gram([[torch.ones(5, 2), torch.ones(4)]], plan, backend=backend).item() == pytest.approx(14.0)
    with pytest.raises(ValueError, match=r"shape \(3, 2\), expected \(5, 2\)"):
        sk.gram([[torch.ones(3, 2), torch.ones(4)]], plan, backend=backend)


def test_weights_converted_while_perturbed_are_refused():
    weight = torch.nn.Parameter(torch.ones(10))
    plan = sk.Plan([weight])
    snapshot = sk.Snapshot(plan)
    sk.ascent_(plan, [[torch.ones(10)]], snapshot=snapshot)
    weight.data = weight.data.double()
    with pytest.raises(RuntimeError, match="while they were perturbed"):
        sk.restore_(plan, snapshot)
    snapshot.put_back(plan)
    assert torch.equal(weight, torch.ones(10, dtype=torch.float64))
    sk.restore_(plan, snapshot)


def test_writing_bumps_version_counters():
    weight = torch.ones(4, requires_grad=True)
    output = (weight * weight).sum()
    sk.perturb_([weight], [[torch.ones(4)]], [1.0], backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_what_was_saved_before_writing():
    weight = torch.tensor([3.0], requires_grad=True)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        output = weight * weight
        snapshot = sk.Snapshot(plan := sk.Plan([weight]))
        sk.ascent_(plan, [[torch.ones(1)]], snapshot=snapshot, backend="cpu")
        assert weight.item() == 4.0
        output.backward()
        sk.restore_(plan, snapshot)
    assert weight.grad.item() == 6.0
    assert weight.item() == 3.0


def test_version_counters_of_untouched_tensors_stay():
    touched, untouched = torch.ones(4), torch.ones(4)
    sk.perturb_([touched, untouched], [[torch.ones(4), None]], [1.0], backend="cpu")
    assert touched._version == 1
    assert untouched._version == 0


def test_inputs_are_not_kept_alive():

    weight = torch.ones(4)
    plan = sk.Plan([weight])
    gradient = torch.ones(4)
    alive = weakref.ref(gradient)
    sk.ascent_(plan, [[gradient]], backend="cpu")
    del gradient
    assert alive() is None


@pytest.mark.parametrize("backend", ["reference", "foreach", "cpu"])
def test_zeros_without_memory(backend):
    """Autograd has tensors of zeros that it has not written down."""
    weight, before = torch.randn(40, 3), torch.randn(40, 3)
    weight.copy_(before)
    zeros = torch._efficientzerotensor(40, 3)
    assert sk.gram([[zeros]], [weight], backend=backend).item() == 0.0
    sk.perturb_([weight], [[zeros], [torch.ones(40, 3)]], [1.0, 0.5], backend=backend)
    torch.testing.assert_close(weight, before + 0.5)


def test_out_may_be_one_of_the_lists():
    a, b = torch.randn(1000), torch.randn(1000)
    wanted = 2 * a - b
    sk.combine_([a], [[a], [b]], [2.0, -1.0], backend="cpu")
    torch.testing.assert_close(a, wanted)


# Launches that move more than 32 MiB write past the cache; sizes that are no multiple of anything, and a tiny one whose
# neighbour in memory must not be touched.
LARGE = [1_300_001, 17, 777_779]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_larger_than_the_cache(dtype):
    problem = Problem.random(LARGE, dtype, lists=2)
    scale = [[0.05, -0.1], [0.1, 0.2]]

    def step(problem, backend):
        plan = problem.plan()
        snapshot = poisoned_snapshot(plan)
        sk.ascent_(plan, problem.xs, scale=scale, snapshot=snapshot, backend=backend)
        sk.descent_(plan, problem.xs, problem.sgd(momentum=0.9), snapshot=snapshot, scale=scale, backend=backend)

    def restore(problem, backend):
        before = [p.clone() for p in problem.params]
        plan = problem.plan()
        snapshot = poisoned_snapshot(plan)
        sk.ascent_(plan, problem.xs, scale=scale, snapshot=snapshot, backend=backend)
        assert not torch.equal(problem.params[0], before[0])
        sk.restore_(plan, snapshot, backend=backend)
        assert all(same_bits(a, b) for a, b in zip(problem.params, before, strict=True))

    def combine_into_unaligned_views(problem, backend):
        out = [torch.full((p.numel() + 3,), 7.0).to(p.dtype) for p in problem.params]
        sk.combine_([t[1:-2] for t in out], problem.xs, [0.5, -2.0], backend=backend)
        assert all(t[0] == 7.0 and torch.equal(t[-2:], torch.full((2,), 7.0).to(t.dtype)) for t in out)
        problem.params = [t[1:-2] for t in out]

    assert_backends_agree(problem, step)
    assert_backends_agree(problem, restore)
    assert_backends_agree(problem, combine_into_unaligned_views)
