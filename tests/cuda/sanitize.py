"""A small program that runs every kernel, and compares it with the definition: python -m tests.cuda.sanitize

For a first look at a GPU, and for compute-sanitizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

import sam_kernels as sk
from sam_kernels.backends.cpu import backend as cpu
from sam_kernels.bases import Base
from sam_kernels.cuda import Tuning
from sam_kernels.cuda import backend as cuda

from ..kernels.cases import DTYPE_PAIRS, DTYPES, FORMS, Problem, assert_backends_agree, poisoned_snapshot, tolerance
from ..kernels.masters import LOW, Trained, both
from ..targets import Target

SIZES = [0, 1, 7, 700, 2049, 40_000]
FEW = [0, 9, 40]
# Small chunks for few tensors to make many blocks.
SMALL = Tuning(512, 64)
TWO_LAUNCHES = replace(SMALL, one_launch=False)
# For which norms are read several vectors ahead.
AHEAD = Tuning(4096, 64)
# More chunks than virtual blocks.
MANY_CHUNKS, MANY = Tuning(8, 32), [8200]
# Of each base some settings for each form of its update.
SETTINGS = {(cls, cls.variant(own)): own for cls, forms in FORMS.items() for own in forms if own.lr}


def rule_for(lists: int) -> Any:
    return (sk.Normalized(), sk.Deflected(alpha=0.3), sk.NormalizedSum())[lists - 1]


def bases_of(problem: Problem, **changes: Any) -> Iterator[Base]:
    for (cls, _), settings in SETTINGS.items():
        base = problem.base(cls, settings)
        base.settings = [own._replace(**changes) for own in base.settings]
        yield base


def step(problem: Problem, backend: str) -> None:
    """All operations on gradients of one to three lists, one after the other."""
    lists = len(problem.xs)
    plan = problem.plan()
    snapshot = poisoned_snapshot(plan)
    for base in bases_of(problem):
        sk.ascent_(plan, problem.xs, rule=rule_for(lists), scale=0.1, snapshot=snapshot, backend=backend)
        sk.descent_(plan, problem.xs, base, rule=rule_for(lists), weighted=True, snapshot=snapshot, backend=backend)
        sk.descent_(plan, problem.xs, base, scale=0.1, backend=backend)
    sk.perturb_(plan, problem.xs, [0.5] * lists, snapshot=snapshot, backend=backend)
    sk.restore_(plan, snapshot, backend=backend)
    sk.combine_(plan, problem.xs, [0.5] * lists, backend=backend)


def sums_alone(problem: Problem, backend: str) -> None:
    """One launch for a Gram matrix and what follows from it."""
    sk.ascent_(problem.plan(), problem.xs, rule=rule_for(len(problem.xs)), backend=backend)


def step_with_masters(problem: Trained, plan: sk.Plan, snapshot: sk.Snapshot, backend: str) -> None:
    """The same of weights in low precision that have masters. A perturbation by nothing restores."""
    for base in bases_of(problem):
        sk.ascent_(plan, problem.xs, scale=0.1, snapshot=snapshot, backend=backend)
        sk.descent_(plan, problem.xs, base, rule=sk.Normalized(), snapshot=snapshot, backend=backend)
    for coefficient in (0.5, 0.0):
        sk.perturb_(plan, problem.xs, [coefficient], snapshot=snapshot, backend=backend)
    sk.restore_(plan, snapshot, backend=backend)


def steps_that_do_not_happen(problem: Problem, backend: str) -> None:
    """Overflows, gradients that are not finite or not there, look-aheads; numbers that lie on the device."""
    plan = problem.plan()
    device = plan.device
    snapshot = poisoned_snapshot(plan)
    scale, lr = (torch.tensor(0.1, device=device, dtype=dtype) for dtype in (torch.float64, torch.float32))
    overflow, infinite = torch.ones((), device=device), [[x.clone() for x in problem.xs[0]]]
    infinite[0][-1].fill_(float("inf"))
    some = [[None if i == 1 else x for i, x in enumerate(problem.xs[0])]]
    for base in bases_of(problem, lr=lr):
        sk.ascent_(plan, problem.xs, scale=[[scale]] * 2, snapshot=snapshot, backend=backend)
        sk.look_ahead_(plan, some, base, snapshot=snapshot, backend=backend)
        sk.descent_(plan, problem.xs, base, snapshot=snapshot, found_inf=overflow, grad_scale=lr, backend=backend)
        sk.perturb_(plan, problem.xs, [0.5], snapshot=snapshot, backend=backend)
        sk.perturb_(plan, problem.xs, [0.0], snapshot=snapshot, backend=backend)
        sk.descent_(plan, infinite, base, rule=sk.Normalized(), snapshot=snapshot, backend=backend)
        sk.perturb_(plan, problem.xs, [0.5], snapshot=snapshot, backend=backend)
        sk.descent_(plan, some, base, grad_scale=scale, snapshot=snapshot, backend=backend)


def check_steps_on_host(problem: Problem, target: Target) -> None:
    """Step counts where torch keeps them, unless a group is capturable or fused."""

    def run(own: Problem, backend: str) -> None:
        own.steps = [count.cpu() for count in own.steps]
        step(own, backend)

    before = getattr(target.backend, "steps_on_host", None)
    if before is not None:
        target.backend.steps_on_host = True
    try:
        assert_backends_agree(problem, run, target.name, target.device)
    finally:
        if before is not None:
            target.backend.steps_on_host = before


def check_gram(problem: Problem, target: Target) -> None:
    """In the tensors' geometry, and without it."""
    for plan in (True, False):
        found, wanted = (
            sk.gram(own.xs, own.plan() if plan else None, backend=name).cpu()
            for own, name in ((problem.to(target.device), target.name), (problem, "reference"))
        )
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-9)


def check_state(problem: Problem, target: Target) -> None:
    """State of another type than the weights, which is what is computed in."""
    wanted, got = problem.copy(), problem.to(target.device)
    step(wanted, "reference")
    step(got, target.name)
    for a, b in zip(got.tensors(), wanted.tensors(), strict=True):
        near = max(tolerance(a.dtype)["rtol"], tolerance(problem.params[0].dtype)["rtol"])
        torch.testing.assert_close(a.cpu(), b, rtol=near, atol=near)


Check = tuple[str, Tuning, Callable[[], object]]


def checks(target: Target) -> Iterator[Check]:
    """By what they are of, with the tuning that they are made in."""

    def step_of(name: str, tuning: Tuning, problem: Problem, run: Callable[..., None] = step) -> Check:
        return name, tuning, lambda: assert_backends_agree(problem, run, target.name, target.device)

    for weights, gradients in product(DTYPES, DTYPES):
        name = f"{weights}, {gradients}".replace("torch.", "")
        if (weights, gradients) not in DTYPE_PAIRS:  # element by element
            yield step_of(f"step: {name}", SMALL, Problem.random(FEW, weights, gradients, adaptive=True))
            continue
        for lists in (1, 2, 3):
            problem = Problem.random(target.sizes, weights, gradients, adaptive=True, lists=lists)
            yield f"gram: {name}, {lists} lists", SMALL, lambda p=problem: check_gram(p, target)
            yield step_of(f"step: {name}, {lists} lists", SMALL, problem)
        problem = Problem.random(target.sizes, weights, gradients, adaptive=True)
        yield step_of(f"two launches: {name}", TWO_LAUNCHES, problem)
        for lists, adaptive in product((1, 2), (True, False)):
            problem = Problem.random(target.sizes, weights, gradients, adaptive=adaptive, lists=lists)
            yield step_of(f"several vectors ahead: {name}, {lists} lists, adaptive={adaptive}", AHEAD, problem)
        problem = Problem.random(target.sizes, weights, gradients)
        problem.steps = [s.double() for s in problem.steps]
        yield step_of(f"no steps: {name}", SMALL, problem, steps_that_do_not_happen)
    yield "step counts on the host", SMALL, lambda: check_steps_on_host(Problem.random(target.sizes), target)
    for dtype in LOW:
        for gradients in (dtype, torch.float64):
            trained = Trained.random(target.sizes, dtype, adaptive=True)
            trained.xs = [[x.to(gradients) for x in own] for own in trained.xs]
            name = f"masters: {dtype}, {gradients}".replace("torch.", "")
            yield name, SMALL, lambda p=trained: both(target, p, step_with_masters)
    for weights, state in product((torch.float32, torch.float64), DTYPES):
        problem = Problem.random(FEW, weights)
        problem.states = [[t.to(state) for t in column] for column in problem.states]
        yield f"state: {weights}, {state}".replace("torch.", ""), SMALL, lambda p=problem: check_state(p, target)
    for lists in (1, 2, 3):
        yield step_of(f"many chunks: {lists} lists", MANY_CHUNKS, Problem.random(MANY, lists=lists), sums_alone)


def run_all(target: Target) -> list[str]:
    """What went wrong, by name."""
    failed = []
    own = getattr(target.backend, "tuning", None)
    for name, tuning, check in checks(target):
        if own is not None:
            target.backend.tuning = tuning
        print(name, flush=True)  # for whoever looks at one that hung
        try:
            check()
        except Exception as error:
            failed.append(f"{name}: {error}")
            print("FAILED", failed[-1], flush=True)
    if own is not None:
        target.backend.tuning = own
    return failed


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: the kernels for it")
    device = torch.device(parser.parse_args(words).device)
    on_gpu = device.type == "cuda"
    failed = run_all(Target(cuda, device, SIZES) if on_gpu else Target(cpu, device, SIZES[:4]))
    if on_gpu:
        torch.cuda.synchronize()
    print("ran all kernels" if not failed else f"{len(failed)} checks failed")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
