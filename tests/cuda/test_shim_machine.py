"""What only parallel kernels have: grids, barriers, launch limits. Run on the CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import sam_kernels as sk
from sam_kernels.backends.contract import AscentArguments, GramArguments
from sam_kernels.cuda import Tuning

from ..kernels.agreement import descent
from ..kernels.cases import Problem, assert_backends_agree, poisoned_snapshot, same_bits
from .everything import everything, same
from .shim import ROOT, native

ORDERS = [("forward", 0), ("reverse", 0), ("random", 1), ("uneven", 1), ("uneven", 2)]


@pytest.fixture(scope="module")
def wanted(shim_backend):
    tuning = shim_backend.tuning
    with shim_backend.schedule():
        yield everything(shim_backend)
    shim_backend.tuning = tuning


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 64])
@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_same_bits_for_every_grid_and_order_of_threads(shim, wanted, blocks, order, seed):
    with shim.schedule(blocks, order, seed):
        assert same(everything(shim), wanted)


def test_the_same_norm_in_one_launch_and_in_two(shim, monkeypatch):
    norms = []
    for one_launch in (True, False):
        monkeypatch.setattr(shim, "tuning", Tuning(512, 64, one_launch=one_launch))
        problem = Problem.random([20_000, 3, 700], adaptive=True, lists=2)
        norms.append(shim.ascent(AscentArguments(problem.plan(), problem.xs, sk.Normalized(), [0.1] * 4)).gram)
    assert same_bits(*norms)


def test_more_chunks_than_virtual_blocks(shim, monkeypatch):
    """Each virtual block then sums several chunks."""
    monkeypatch.setattr(shim, "tuning", Tuning(8, 32))
    problem = Problem.random([20_000, 5, 3000])
    got = shim.gram(GramArguments(problem.plan(), problem.xs, False))
    torch.testing.assert_close(got, sk.gram(problem.xs, problem.plan(), backend="reference"), rtol=1e-12, atol=0)
    with shim.schedule(2, "random", 5):
        assert same_bits(shim.gram(GramArguments(problem.plan(), problem.xs, False)), got)


def test_no_barrier_can_be_left_out(shim):
    """Without any one of them, some order of the threads gives another result, a deadlock or a crash."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.cuda.break_barriers"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    count, *harmless = run.stdout.split()
    assert int(count) >= 8
    assert harmless == []


def rows_in_a_launch(columns):
    """A row is a word and one for each column; a class of rows takes 5 words, a group 10."""
    return (native().TABLE_WORDS - 5 - 10) // (1 + columns)


def launches_for(count, columns):
    return -(-count // rows_in_a_launch(columns))


@pytest.mark.parametrize("count", [161, 700, 5000])
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_launches_of_a_step(shim, monkeypatch, count, base):
    """One for the ascent where the table fits into the parameters of one launch, else those of both its phases."""
    monkeypatch.setattr(shim, "tuning", Tuning(512, 32))
    made = []

    def run(problem, backend):
        plan = problem.plan()
        snapshot = poisoned_snapshot(plan)
        report = sk.ascent_(plan, problem.xs, scale=0.3, snapshot=snapshot, backend=backend)
        assert report.finite
        made.append(shim.launches(plan) if backend == "cuda-shim" else None)
        own = problem.sgd(momentum=0.9) if base == "sgd" else problem.adam()
        sk.descent_(plan, problem.xs, own, snapshot=snapshot, backend=backend)
        made.append(shim.launches(plan) if backend == "cuda-shim" else None)

    assert_backends_agree(Problem.random([1 + 7 * i % 40 for i in range(count)], group_count=1), run, "cuda-shim")
    ascent = launches_for(count, 3)
    # Weights, copies, gradients and momentum; or three moments and, on the shim's device, the step counts.
    descent = launches_for(count, 4 if base == "sgd" else 7)
    assert made == [None, None, ascent if ascent == 1 else 2 * ascent, descent]


def test_launch_count(shim):
    """The parameters of a launch hold about as many tensors as 32,764 bytes have room for."""
    assert rows_in_a_launch(6) >= 575
    for columns in (1, 3, 4, 6):
        rows = rows_in_a_launch(columns)
        counts = [shim.launch_count(count, columns) for count in (0, 1, rows, rows + 1, 10 * rows, 10 * rows + 1)]
        assert counts == [0, 1, 1, 2, 10, 11]


def test_many_groups_split_a_launch_too(shim, monkeypatch):
    """Each group has settings of its own in the table."""
    monkeypatch.setattr(shim, "tuning", Tuning(512, 32))

    def run(problem, backend):
        descent(problem, problem.sgd(momentum=0.9), backend, rule=sk.Normalized())

    assert_backends_agree(Problem.random([5] * 600, group_count=400), run, "cuda-shim")


def test_a_tuning_out_of_range_is_refused(shim, monkeypatch):
    for tuning in (Tuning(chunk_size=12), Tuning(chunk_size=65544), Tuning(threads=48), Tuning(threads=1024)):
        monkeypatch.setattr(shim, "tuning", tuning)
        with pytest.raises(ValueError, match="must be a multiple"):
            sk.ascent_([torch.ones(3)], [[torch.ones(3)]], backend="cuda-shim")


def test_launches_on_host_counted_steps_know_the_outcome(shim):
    """With step counts on the host, an overflow on the device must not be counted."""
    problem = Problem.random([5, 9])
    before = problem.copy()
    descent(problem, problem.adam(), "cuda-shim", found_inf=torch.tensor(1.0))
    assert same(problem.tensors(), before.tensors())


def paths_of(backend, weights, gradients, state=None, masters=False, offset=0):
    """How each of an ascent's and of a descent's rows are read."""
    params = [torch.randn(40).to(weights) for _ in range(2)]
    xs = [[torch.randn(40 + offset)[offset:].to(gradients) for _ in params]]
    if offset:
        xs[0] = [torch.empty(48, dtype=gradients)[offset : 40 + offset].copy_(x) for x in xs[0]]
    buffers = [torch.zeros(40, dtype=state or weights) for _ in params]
    plan = sk.Plan(params)
    snapshot = sk.Snapshot(plan, masters)
    sk.ascent_(plan, xs, scale=0.1, snapshot=snapshot, backend=backend.name)
    table = plan.bindings[backend.name].table
    seen = list(table.paths)
    base = sk.SGD([sk.SGDSettings(0.1, 0.9)], buffers, bytearray(2))
    sk.descent_(plan, xs, base, snapshot=snapshot, backend=backend.name)
    return {*seen, *table.paths}


def test_paths(shim):
    """What is read 16 bytes at a time. Everything else is slower, and right as well: results alone do not tell."""
    fp32, bf16, fp16, fp64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    assert paths_of(shim, fp32, fp32) == {"float32"}
    assert paths_of(shim, bf16, bf16) == {"bfloat16"}
    assert paths_of(shim, fp16, fp16) == {"float16"}
    assert paths_of(shim, fp32, bf16) == {"float32, bfloat16"}
    assert paths_of(shim, bf16, bf16, state=fp32, masters=True) == {"float32, bfloat16"}
    assert paths_of(shim, fp16, fp16, state=fp32, masters=True) == {"single float"}
    assert paths_of(shim, bf16, fp32, state=fp32, masters=True) == {"single float"}
    assert paths_of(shim, bf16, bf16, state=bf16, masters=True) == {"float32, bfloat16", "single float"}
    assert paths_of(shim, fp64, fp64) == {"single double"}
    assert paths_of(shim, fp32, fp32, offset=1) == {"single float"}
