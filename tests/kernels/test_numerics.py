"""Determinism, exact restoring, non-finite and zero gradients, and conversions of 16-bit types."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import sam_kernels as sk

from ..targets import CPU_SIZES as SIZES
from .cases import DTYPES, Problem, poisoned_snapshot, random_tensors, same_bits

BACKENDS = ["cpu", "reference"]


def test_same_bits_for_every_number_of_threads():
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        problem = Problem.random([*SIZES, 300_000], adaptive=True, lists=3)
        plan = problem.plan()
        snapshot = sk.Snapshot(plan)
        report = sk.ascent_(plan, problem.xs, scale=0.3, snapshot=snapshot, backend="cpu")
        sk.descent_(plan, problem.xs, problem.adam(), snapshot=snapshot, rule=sk.Normalized(), backend="cpu")
        results.append([report.gram, *problem.tensors()])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


_PRINT_DIGEST = """
import hashlib, torch
import sam_kernels as sk
from sam_kernels import _cpu
from tests.kernels.cases import DTYPE_PAIRS, Problem
from tests.targets import CPU_SIZES as SIZES
digest = hashlib.sha256()
for dtypes in DTYPE_PAIRS:
    for base in ("sgd", "adam"):
        problem = Problem.random(SIZES, *dtypes, adaptive=True, lists=2)
        plan = problem.plan()
        snapshot = sk.Snapshot(plan)
        settings = {"momentum": 0.9} if base == "sgd" else {"amsgrad": True}
        report = sk.ascent_(plan, problem.xs, scale=0.3, snapshot=snapshot)
        sk.descent_(plan, problem.xs, getattr(problem, base)(**settings), snapshot=snapshot)
        for tensor in [report.gram, *problem.tensors()]:
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
print(_cpu.instruction_set(), digest.hexdigest())
"""


def test_same_bits_for_every_instruction_set():
    digests = {}
    for wanted in ("baseline", ""):
        environment = {**os.environ, "SAM_KERNELS_CPU_ISA": wanted}
        run = subprocess.run(
            [sys.executable, "-c", _PRINT_DIGEST], env=environment, capture_output=True, text=True, check=True
        )
        name, digest = run.stdout.split()
        digests[name] = digest
    assert "baseline" in digests
    assert len(set(digests.values())) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_is_exact(backend, dtype):
    params = random_tensors(SIZES, dtype, 0)
    params[5][:3] = torch.tensor([-0.0, torch.finfo(dtype).tiny / 2, torch.finfo(dtype).max], dtype=dtype)
    before = [p.clone() for p in params]
    plan = sk.Plan(params)
    snapshot = poisoned_snapshot(plan)
    for _ in range(3):
        sk.ascent_(plan, [random_tensors(SIZES, dtype, 1)], scale=100.0, snapshot=snapshot, backend=backend)
        assert not same_bits(params[-1], before[-1])
        sk.restore_(plan, snapshot, backend=backend)
        assert all(same_bits(a, b) for a, b in zip(params, before, strict=True))
        assert not snapshot.is_taken


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients_change_nothing(backend, dtype, bad):
    problem = Problem.random(SIZES, dtype, lists=2)
    problem.xs[1][-1][-1] = bad
    before = problem.copy()
    plan = problem.plan()
    snapshot = sk.Snapshot(plan)
    report = sk.ascent_(plan, problem.xs, snapshot=snapshot, backend=backend)
    assert not report.finite
    assert report.coefficients.tolist() == [0.0, 0.0]
    report = sk.descent_(
        plan, problem.xs, problem.sgd(momentum=0.9), rule=sk.Normalized(), snapshot=snapshot, backend=backend
    )
    assert not report.finite
    assert all(same_bits(a, b) for a, b in zip(problem.tensors(), before.tensors(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_zero_gradients_perturb_by_nothing(backend, adaptive):
    problem = Problem.random(SIZES, adaptive=adaptive)
    zeros = [[torch.zeros_like(p) for p in problem.params]]
    before = [p.clone() for p in problem.params]
    report = sk.ascent_(problem.plan(), zeros, scale=0.05, backend=backend)
    assert report.finite
    for a, b in zip(problem.params, before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_squares_that_float32_cannot_hold(backend, magnitude):
    gradient = torch.full((1000,), magnitude)
    report = sk.ascent_([torch.zeros(1000)], [[gradient]], backend=backend)
    assert report.finite
    torch.testing.assert_close(
        report.norms, torch.tensor([magnitude * 1000**0.5], dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_norm_does_not_overflow(backend):
    gradient = torch.full((70_000,), 60_000.0, dtype=torch.float16)
    weight = torch.zeros(70_000, dtype=torch.float16)
    report = sk.ascent_([weight], [[gradient]], scale=100.0, backend=backend)
    assert report.finite
    torch.testing.assert_close(weight.float(), torch.full((70_000,), 100.0 / 70_000**0.5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_coefficient_leaves_infinities_out(backend):
    weight = torch.ones(20)
    sk.perturb_([weight], [[torch.full((20,), float("inf"))], [torch.ones(20)]], [0.0, 1.0], backend=backend)
    assert torch.equal(weight, torch.full((20,), 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", ["baseline", ""])
def test_conversions_of_all_16_bit_numbers(dtype, isa, tmp_path):
    # All 65,536 numbers to float64, and to the type and back with rounding of what lies between two of them.
    path = tmp_path / "result.pt"
    script = f"""
import torch, sam_kernels as sk
numbers = torch.arange(65536).to(torch.uint16).view({dtype})
wide = torch.zeros(65536, dtype=torch.float32)
sk.combine_([wide], [[numbers]], [1.0])
between = torch.nextafter(wide, torch.tensor(0.0))
above = torch.arange(1, 65537).to(torch.uint16).view({dtype}).float()
middle = wide + (above - wide) / 2  # exactly between two neighbours: ties go to the even one
narrow = [torch.zeros(65536, dtype={dtype}) for _ in range(3)]
sk.combine_(narrow, [[wide, between, middle]], [1.0])
torch.save((wide, between, middle, narrow), {str(path)!r})
"""
    subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "SAM_KERNELS_CPU_ISA": isa}, check=True, capture_output=True
    )
    numbers = torch.arange(65536).to(torch.uint16).view(dtype)
    wide, between, middle, narrow = torch.load(path)
    torch.testing.assert_close(wide, numbers.float(), rtol=0, atol=0, equal_nan=True)
    for got, source in zip(narrow, (wide, between, middle), strict=True):
        torch.testing.assert_close(got, source.to(dtype), rtol=0, atol=0, equal_nan=True)
        nonzero = ~got.isnan()
        assert torch.equal(torch.signbit(got[nonzero]), torch.signbit(source.to(dtype)[nonzero]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lr", [0.0])
def test_learning_rate_zero_keeps_negative_zeros(backend, lr):
    weight = torch.tensor([-0.0, 0.0, 1.0])
    before = weight.clone()
    gradient = torch.tensor([-1.0, -1.0, -1.0])
    base = sk.SGD([sk.SGDSettings(lr, 0.9)], [torch.zeros(3)], bytearray([1]))
    sk.descent_([weight], [[gradient]], base, backend=backend)
    assert same_bits(weight, before)


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


@pytest.mark.skipif(_free_memory() < 12 * 2**30, reason="needs 12 GiB of free memory")
def test_more_than_two_to_the_31_elements():
    count = 2**31 + 100
    weight = torch.zeros(count, dtype=torch.bfloat16)
    gradient = torch.zeros(count, dtype=torch.bfloat16)
    gradient[-1] = 3.0
    gradient[0] = 4.0
    report = sk.ascent_([weight], [[gradient]], scale=10.0, backend="cpu")
    assert report.norms.item() == 5.0
    assert weight[-1].item() == 6.0
    assert weight[0].item() == 8.0
    assert torch.count_nonzero(weight).item() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_nan_stays_one_when_it_is_rounded(target, dtype):
    """Also those whose bits a rounding would carry over into the sign; in whole vectors and in tails."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000, -0x3FFFFF], dtype=torch.int32)
    values = bits.repeat(8)[:37].contiguous().view(torch.float32).to(target.device)
    assert values.isnan().all()
    out = torch.zeros(37, dtype=dtype, device=target.device)
    sk.combine_([out], [[values]], [1.0], backend=target.name)
    assert out.isnan().all()
