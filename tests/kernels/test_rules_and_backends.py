"""Rules of the caller's own, several devices in one list, and the choice of a backend."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import sam_kernels as sk
from sam_kernels.registry import backend_for

from .cases import Problem, assert_backends_agree, poisoned_snapshot


def usam(gram: torch.Tensor) -> torch.Tensor:
    """A rule that the kernels do not know: unified SAM with k = 0.5."""
    return (0.5 + 0.5 / gram.diagonal().sqrt()).reshape(-1)


@pytest.mark.parametrize("lists", [1, 2])
@pytest.mark.parametrize("adaptive", [False, True])
def test_own_rules(lists, adaptive):
    def run(problem, backend):
        plan = problem.plan()
        snapshot = poisoned_snapshot(plan)
        report = sk.ascent_(plan, problem.xs, rule=usam, scale=0.1, snapshot=snapshot, backend=backend)
        torch.testing.assert_close(report.coefficients, usam(report.gram))
        assert snapshot.is_taken
        sk.descent_(plan, problem.xs, problem.sgd(), rule=usam, snapshot=snapshot, backend=backend)
        assert not snapshot.is_taken

    assert_backends_agree(Problem.random([10, 600, 40_000], adaptive=adaptive, lists=lists), run)


def test_own_rule_equals_the_known_one():
    known, own = Problem.random([10, 40_000]), Problem.random([10, 40_000])
    sk.ascent_(known.plan(), known.xs, scale=0.1)
    sk.ascent_(own.plan(), own.xs, scale=0.1, rule=lambda gram: 1 / (gram.diagonal().sqrt() + 1e-12))
    for a, b in zip(known.params, own.params, strict=True):
        assert torch.equal(a, b)


class Doubled(sk.Normalized):
    """A subclass of a rule that the kernels know: it is a rule of the user's own, not that one."""

    def __call__(self, gram):
        return 2.0 * super().__call__(gram)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_subclasses_of_known_rules(backend):
    weight = torch.zeros(2)
    sk.ascent_([weight], [[torch.tensor([3.0, 4.0])]], rule=Doubled(), backend=backend)
    torch.testing.assert_close(weight, torch.tensor([1.2, 1.6]))


def test_own_rule_is_not_asked_about_infinities():
    weight = torch.ones(3)
    report = sk.ascent_([weight], [[torch.full((3,), float("inf"))]], rule=lambda gram: pytest.fail("asked"))
    assert not report.finite
    assert torch.equal(weight, torch.ones(3))


def test_own_rule_of_the_wrong_shape():
    with pytest.raises(ValueError, match="coefficients of shape"):
        sk.ascent_([torch.ones(3)], [[torch.ones(3)]], rule=lambda gram: torch.ones(2))


def split_in_parts(plan: sk.Plan) -> sk.Plan:
    """Treats every second tensor as if it were on a device of its own."""
    for start in (0, 1):
        index = list(range(start, len(plan), 2))
        plan.parts.append((plan.subset(index), index))
    return plan


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_parts_give_what_the_whole_gives(base):
    settings = {"momentum": 0.9} if base == "sgd" else {}
    results = []
    for parts in (False, True):
        problem = Problem.random([10, 600, 40_000, 5], adaptive=True, lists=2)
        problem.xs[0][1] = problem.xs[1][1] = None
        plan = split_in_parts(problem.plan()) if parts else problem.plan()
        snapshot = poisoned_snapshot(plan)
        ascent = sk.ascent_(plan, problem.xs, scale=[[0.1, -0.2], [0.3, 0.1]], snapshot=snapshot)
        assert list(snapshot.taken) == [1, 0, 1, 1]
        perturbed = [p.clone() for p in problem.params]
        sk.restore_(plan, snapshot)
        assert not snapshot.is_taken
        sk.ascent_(plan, problem.xs, scale=[[0.1, -0.2], [0.3, 0.1]], snapshot=snapshot)
        sk.descent_(
            plan,
            problem.xs,
            getattr(problem, base)(**settings),
            rule=sk.Deflected(alpha=0.3),
            snapshot=snapshot,
            grad_scale=2.0,
        )
        results.append([ascent.gram, *perturbed, *problem.tensors()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_status_of_backends():
    status = sk.backends()
    assert status["reference"].available
    assert status["cpu"].available, status["cpu"].detail
    assert list(status)[-1] == "reference"


def test_choice_of_backend(monkeypatch):
    cpu = torch.device("cpu")
    assert backend_for(cpu).name == "cpu"
    assert backend_for(torch.device("meta")).name == "foreach"
    monkeypatch.setenv("SAM_KERNELS_BACKEND", "reference")
    assert backend_for(cpu).name == "reference"
    assert backend_for(cpu, "cpu").name == "cpu"
    monkeypatch.setenv("SAM_KERNELS_BACKEND", "abacus")
    with pytest.raises(ValueError, match="abacus"):
        backend_for(cpu)
    with pytest.raises(sk.BackendUnavailableError, match="does not serve"):
        backend_for(torch.device("cuda"), "cpu")


_WITHOUT_EXTENSION = """
import sys
sys.modules["sam_kernels._cpu"] = None  # importing it raises ImportError
import torch, sam_kernels, sam_optim
status = sam_kernels.backends()
assert not status["cpu"].available and "reinstall" in status["cpu"].detail
assert sam_kernels.backends()["foreach"].available
weight = torch.nn.Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64))
optimizer = sam_optim.SAM([weight], torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
for move in (optimizer.first_step, optimizer.second_step):
    optimizer.zero_grad()
    (0.5 * torch.tensor([1.0, 4.0]) * weight**2).sum().backward()
    move()
torch.testing.assert_close(weight.detach(), torch.tensor([2.67, 0.44], dtype=torch.float64))
try:
    sam_kernels.perturb_([torch.ones(1)], [[torch.ones(1)]], [1.0], backend="cpu")
except sam_kernels.BackendUnavailableError as error:
    print(error)
"""


def test_everything_works_without_the_extension():
    run = subprocess.run([sys.executable, "-c", _WITHOUT_EXTENSION], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
    assert "unavailable" in run.stdout
