"""What is Triton's own: what compiles for GPUs that are not there, when it compiles anew, rules of a user's own."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import sam_kernels as sk
from sam_kernels.backends.binding import NOTHING
from sam_kernels.registry import backend_for
from sam_kernels.snapshot import MASTER
from sam_kernels.triton import TritonRule, Tuning, layout
from sam_kernels.triton import backend as triton_backend
from sam_kernels.triton.pointers import PointerTable

from ..kernels.cases import Problem, assert_backends_agree, at_a_low_address, poisoned_snapshot
from ..targets import TRITON_SIZES, TRITON_TUNING

ROOT = Path(__file__).resolve().parents[2]


@cache
def output_of(module: str) -> Any:
    """What a program prints, as JSON; in a process where Triton compiles."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-m", module], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def rows_of(target: str) -> list[dict[str, Any]]:
    return [row for row in output_of("tests.triton.compiled")["rows"] if row["target"] == target]


def test_kernels_for_nvidia():
    """16 bytes at a time, no local memory, no spills, nothing contracted."""
    rows = rows_of("sm_90")
    assert len(rows) > 30
    is_old = output_of("tests.triton.compiled")["triton"].startswith(("3.6.", "3.7."))
    for row in rows:
        # Some on 16-bit types keep numbers on the stack: Adam with a maximum, its form 1, which is short of registers,
        # and RMSprop, though there are registers left. The compiler that comes with Triton 3.6 does so with more.
        allowed = 64 if "adam 1 bf16" in row["name"] else 16 if re.search(r"rmsprop \d bf16", row["name"]) else 0
        allowed = max(allowed, 8) if is_old else allowed
        assert not row["local"] and row["spills"] == 0 and row["stack"] <= allowed, row
        assert row["fused"] == 0, row
        assert row["registers"] <= 224, row  # three lists in one launch; two programs to a multiprocessor otherwise
        found = re.search(r" x(\d)", row["name"])
        lists = int(found[1]) if found else 0
        assert row["wide_loads"] >= lists + ("gram" not in row["name"] and "combine" not in row["name"]), row
        assert "gram" in row["name"] or row["wide_stores"] >= 1, row


def test_kernels_for_amd():
    rows = rows_of("gfx942")
    assert len(rows) > 30
    for row in rows:
        assert row["spills"] == 0 and row["stack"] == 0, row
        assert row["wide_loads"] >= 1, row
        assert "gram" in row["name"] or row["wide_stores"] >= 1, row


def test_nothing_is_compiled_anew_for_other_tensors():
    """Addresses, sizes, numbers of tensors and groups, scales and settings are data."""
    result = output_of("tests.triton.launching")
    assert result["compiled"] == ["gram_kernel", "perturb_kernel", "descent_kernel"]
    assert result["compiled again"] == []
    assert len(result["compiled for another type"]) == 3
    assert result["compiled for a low address"] == ["perturb_kernel"]


def test_addresses_that_fit_in_31_bits(interpreter):
    """As those of a Python that is linked to fixed addresses do, and then Triton takes them for short numbers."""
    coefficients = at_a_low_address(torch.tensor([0.5], dtype=torch.float64))

    def perturb(problem: Problem, backend: str) -> None:
        sk.perturb_(problem.plan(), problem.xs, coefficients, backend=backend)

    assert_backends_agree(Problem.random([100]), perturb, "triton")


def test_launches():
    result = output_of("tests.triton.launching")
    chunks = 1 + 1 + 2 + 33
    steps = [["gram_kernel", chunks, False], ["perturb_kernel", chunks, False], ["descent_kernel", chunks, False]]
    assert result["launched"] == steps
    assert [name for name, *_ in result["launched for two types"]] == [name for name, *_ in steps for _ in range(2)]
    (name, programs, is_cooperative), descent = result["launched together"]
    assert (name, is_cooperative) == ("ascent_kernel", True) and programs <= chunks
    assert descent == steps[2]


def test_importing_the_package_does_not_import_triton():
    program = "import sys, sam_kernels, sam_optim; assert 'triton' not in sys.modules"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-W", "error", "-c", program], env=environment, check=True)


def test_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch, sam_kernels as sk
torch.cuda.is_available = lambda: True
assert "cannot be imported" in sk.backends()["triton"].detail, sk.backends()
sk.ascent_([torch.ones(3)], [[torch.ones(3)]])
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_it_is_not_chosen_by_itself_in_the_interpreter(interpreter):
    assert sk.backends()["triton"].available
    assert "interpreter" in sk.backends()["triton"].detail
    assert backend_for(torch.device("cpu")).name == "cpu"


def test_the_table_is_copied_only_if_it_changed(interpreter):
    """Not in a training loop whose gradients keep their places, though every step has a report of its own."""
    problem = Problem.random([300, 9])
    plan, base = problem.plan(), problem.sgd(momentum=0.9)
    snapshot = sk.Snapshot(plan)
    reports = []

    def uploads_of_a_step():
        before = plan.bindings["triton"].table.uploads if reports else 0
        reports.append(sk.ascent_(plan, problem.xs, scale=0.1, snapshot=snapshot, backend="triton"))
        sk.descent_(plan, problem.xs, base, snapshot=snapshot, backend="triton")
        return plan.bindings["triton"].table.uploads - before

    # The second step's ascent finds the state's addresses, which the first one's did not know.
    assert [uploads_of_a_step() for _ in range(5)] == [2, 1, 0, 0, 0]
    problem.xs[0][1] = problem.xs[0][1].clone()
    assert [uploads_of_a_step() for _ in range(2)] == [2, 0]
    base.settings[0] = base.settings[0]._replace(lr=0.5)
    assert [uploads_of_a_step() for _ in range(2)] == [1, 0]
    assert len({report.gram.data_ptr() for report in reports}) == len(reports)


def test_more_chunks_than_virtual_blocks(interpreter, monkeypatch):
    """Some sum several chunks, and there are more partial sums than are summed at a time."""
    monkeypatch.setattr(triton_backend, "tuning", Tuning(block=128, threads=64))
    problem = Problem.random([128 * (layout.VIRTUAL_BLOCKS + 40) + 5], lists=1)
    matrices = [sk.gram(problem.xs, problem.plan(), backend=backend) for backend in ("triton", "reference")]
    torch.testing.assert_close(*matrices, rtol=1e-12, atol=0.0)


# ---------------------------------------------------------------- rules


def half_and_half(gram: torch.Tensor, parameters: tuple[float, ...]) -> torch.Tensor:
    return parameters[0] + (1.0 - parameters[0]) / gram.diagonal().sqrt()


def projected(gram: torch.Tensor, parameters: tuple[float, ...]) -> torch.Tensor:
    along = gram[0, 1] / gram[1, 1]
    return torch.stack([torch.ones_like(along), parameters[1] * along])


@pytest.fixture
def rules(interpreter):
    from . import rules

    return rules


@pytest.mark.parametrize("one_launch", [True, False])
@pytest.mark.parametrize("lists", [1, 2])
def test_a_rule_of_the_users_own(rules, monkeypatch, one_launch, lists):
    """The same as its definition in torch, and in as many launches as a rule of the package."""
    monkeypatch.setattr(triton_backend, "tuning", dataclasses.replace(TRITON_TUNING, one_launch=one_launch))
    ascent = TritonRule(rules.half_and_half, half_and_half, (0.25,))
    descent = ascent if lists == 1 else TritonRule(rules.projected, projected, (0.0, -0.5))

    def run(problem, backend):
        plan = problem.plan()
        snapshot = poisoned_snapshot(plan)
        report = sk.ascent_(plan, problem.xs, rule=ascent, scale=0.1, snapshot=snapshot, backend=backend)
        torch.testing.assert_close(report.coefficients, ascent(report.gram))
        if backend == "triton":
            assert triton_backend.launches(plan) == (1 if one_launch else 2)
        report = sk.descent_(plan, problem.xs, problem.adam(), rule=descent, snapshot=snapshot, backend=backend)
        torch.testing.assert_close(report.coefficients, descent(report.gram))
        if backend == "triton":
            assert triton_backend.launches(plan) == (1 if one_launch else 2)

    assert_backends_agree(Problem.random(TRITON_SIZES, lists=lists), run, "triton")


def test_a_rule_with_the_wrong_number_of_coefficients(rules):
    weight = torch.ones(3)
    rule = TritonRule(rules.projected, projected)
    with pytest.raises(Exception, match="one coefficient for each gradient list"):
        sk.ascent_([weight], [[torch.ones(3)]] * 3, rule=rule, backend="triton")
    assert torch.equal(weight, torch.ones(3))


def test_too_many_parameters():
    with pytest.raises(ValueError, match="at most 4"):
        TritonRule(None, half_and_half, (1, 2, 3, 4, 5))


@pytest.mark.parametrize("tuning", [Tuning(block=100), Tuning(threads=48), Tuning(programs_per_multiprocessor=0)])
def test_wrong_tuning(interpreter, monkeypatch, tuning):
    monkeypatch.setattr(triton_backend, "tuning", tuning)
    with pytest.raises(ValueError, match="Invalid"):
        sk.gram([[torch.ones(3)]], backend="triton")


# ---------------------------------------------------------------- the table of pointers


def native_and_python(plan: sk.Plan) -> tuple[Any, PointerTable]:
    pytest.importorskip("sam_kernels._cpu")
    return triton_backend._pointers_of(plan), PointerTable(plan)


def test_constants_are_those_of_the_native_table():
    native = pytest.importorskip("sam_kernels._cpu")
    for name in ("WEIGHT", "SNAPSHOT", "LIST", "STATE", "STEP", "MAX_LISTS"):
        assert getattr(layout, name) == getattr(native, name)
    for name in ("HELD", "FIRST", "HAS_GRADIENT", "STEP_ON_DEVICE", "STEP_IS_DOUBLE"):
        assert getattr(layout, name) == getattr(native.PointerTable, name)


def test_the_table_in_python_equals_the_native_one(interpreter):
    """The same words, rows and answers for tensors of every kind, bound in random order."""
    generator = random.Random(0)
    params = [
        torch.randn(6, 7),
        torch.randn(6, 7).t(),
        torch.randn(5, dtype=torch.complex64),
        torch.randn(4).bfloat16(),
        torch.randn(()).double(),
        torch.randn(0),
        torch.nn.Parameter(torch.randn(3)),
    ]
    plan = sk.Plan(params, groups=[0, 1, 0, 1, 0, 1, 0])
    tables = native_and_python(plan)

    def candidate(p):
        options = [
            None,
            p,
            p.detach().clone(),
            p.detach().contiguous(),
            torch.zeros(9),
            torch.zeros(p.shape, dtype=torch.int64),
        ]
        options += [p.detach().double() if not p.is_complex() else p.detach().real, p.detach().to_sparse()]
        return generator.choice(options)

    for _ in range(50):
        column = generator.randrange(layout.STEP)
        tensors = params if column == layout.WEIGHT else [candidate(p) for p in params]
        assert list(tables[0].bind(column, tensors)) == tables[1].bind(column, tensors)
        steps = [generator.choice([None, torch.tensor(2.0), torch.tensor(5.0, dtype=torch.float64)]) for _ in params]
        steps[0] = generator.choice([torch.tensor(1), torch.zeros(1), torch.tensor(7.0)])
        host_only = generator.random() < 0.5
        xs = [[candidate(p) for p in params] for _ in range(generator.randrange(4))]
        state = [generator.choice([[], [candidate(p) for p in params]]) for _ in range(generator.randrange(4))]
        weights = generator.choice([None, params])
        for table in tables:
            table.bind_launch(weights, xs, state, steps, host_only, NOTHING)
        assert tables[0].odd_cells() == tables[1].odd_cells()
        assert tables[0].has_host_step() == tables[1].has_host_step()
        assert tables[0].has_step_on_device() == tables[1].has_step_on_device()
        assert tables[0].dtypes() == tables[1].dtypes()

        lists = generator.randrange(1, 4)
        taken = bytearray(generator.randrange(4) for _ in params)
        refused = [refuses(table, lists, taken) for table in tables]
        assert refused[0] == refused[1]
        if refused[0]:  # a copy of another type that is no master
            taken = bytearray(flag | MASTER for flag in taken)
        first = generator.choice([None, bytearray(generator.randrange(2) for _ in params)])
        words = []
        for table, count_on in zip(tables, (steps, [None if s is None else s.clone() for s in steps]), strict=True):
            table.bind_launch(weights, xs, state, count_on, host_only, NOTHING)
            own = torch.zeros(len(params), layout.ROW_WORDS, dtype=torch.int64)
            table.select_gradients(lists, taken)
            table.fill(own.data_ptr(), layout.ROW_WORDS, layout.FLAGS, layout.POINTERS, lists, taken, first)
            own[:, layout.POINTERS + layout.STEP] = 0  # these are copies
            settings = [sk.AdamSettings(0.1, 0.9, 0.99), sk.AdamSettings(0.1, 0.5, 0.6)]
            table.fill_corrections(own.data_ptr(), layout.ROW_WORDS, layout.CORRECTIONS, lists, "adam", settings)
            table.count_steps()
            marked = bytearray(taken)
            table.mark_rows(marked, lists == 1)
            written = table.written_rows()
            words.append((own, marked, written if written is None else list(written), count_on))
        assert torch.equal(words[0][0], words[1][0])
        assert words[0][1:3] == words[1][1:3]
        assert [s if s is None else float(s) for s in words[0][3]] == [
            s if s is None else float(s) for s in words[1][3]
        ]


def refuses(table, lists, taken):
    try:
        table.select_gradients(lists, taken)
    except ValueError:
        return True
    return False


def test_without_the_native_table(interpreter, monkeypatch):
    monkeypatch.setattr(sys.modules["sam_kernels.triton.backend"], "_cpu", None)

    def run(problem, backend):
        plan = problem.plan()
        snapshot = poisoned_snapshot(plan)
        sk.ascent_(plan, problem.xs, scale=0.5, snapshot=snapshot, backend=backend)
        sk.descent_(plan, problem.xs, problem.adam(amsgrad=True), snapshot=snapshot, backend=backend)
        sk.perturb_(plan, problem.xs, [0.5], snapshot=snapshot, backend=backend)
        sk.descent_(plan, problem.xs, problem.sgd(momentum=0.9), snapshot=snapshot, backend=backend)

    assert_backends_agree(Problem.random(TRITON_SIZES, adaptive=True), run, "triton")


@pytest.mark.parametrize("is_native", [True, False])
def test_missing_state(interpreter, monkeypatch, is_native):
    if not is_native:
        monkeypatch.setattr(sys.modules["sam_kernels.triton.backend"], "_cpu", None)
    weight = torch.ones(3)
    for base in (sk.SGD([sk.SGDSettings(0.1, 0.9)], [None], bytearray(1)), sk.Adam([sk.AdamSettings(0.1)])):
        with pytest.raises(ValueError, match="no optimizer state"):
            sk.descent_([weight], [[torch.ones(3)]], base, backend="triton")
    assert torch.equal(weight, torch.ones(3))
