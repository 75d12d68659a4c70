"""A small program that runs every kernel, and compares it with the definition: python -m tests.cuda.sanitize

For a first look at a GPU, and for compute-sanitizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

import sam_kernels as sk
from sam_kernels.backends.cpu import backend as cpu
from sam_kernels.cuda import Tuning
from sam_kernels.cuda import backend as cuda

from ..kernels.cases import DTYPE_PAIRS, Problem, assert_backends_agree, poisoned_snapshot
from ..kernels.masters import LOW, Trained, both
from ..targets import Target

SIZES = [0, 1, 7, 700, 2049, 40_000]
# Small chunks for few tensors to make many blocks, and those for which norms are read several vectors ahead.
TUNINGS = [Tuning(512, 64), Tuning(512, 64, one_launch=False), Tuning(4096, 64)]
SGD_KINDS: list[dict[str, Any]] = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "maximize": True}]
ADAM_KINDS: list[dict[str, Any]] = [{"decoupled": True, "weight_decay": 0.1}, {"amsgrad": True}]


def rule_for(lists: int) -> Any:
    return (sk.Normalized(), sk.Deflected(alpha=0.3), sk.NormalizedSum())[lists - 1]


def bases_of(problem: Problem) -> Iterator[sk.SGD | sk.Adam]:
    yield from (problem.sgd(**kind) for kind in SGD_KINDS)
    yield from (problem.adam(**kind) for kind in ADAM_KINDS)


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


def step_with_masters(problem: Trained, plan: sk.Plan, snapshot: sk.Snapshot, backend: str) -> None:
    """The same of weights in low precision that have masters."""
    for base in bases_of(problem):
        sk.ascent_(plan, problem.xs, scale=0.1, snapshot=snapshot, backend=backend)
        sk.descent_(plan, problem.xs, base, rule=sk.Normalized(), snapshot=snapshot, backend=backend)
    sk.perturb_(plan, problem.xs, [0.5], snapshot=snapshot, backend=backend)
    sk.restore_(plan, snapshot, backend=backend)


def check_gram(problem: Problem, target: Target) -> None:
    """In the tensors' geometry, and without it."""
    for plan in (True, False):
        found, wanted = (
            sk.gram(own.xs, own.plan() if plan else None, backend=name).cpu()
            for own, name in ((problem.to(target.device), target.name), (problem, "reference"))
        )
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-9)


def checks(target: Target) -> Iterator[tuple[str, Callable[[], object]]]:
    """By what they are of: types of weights and gradients, and lists."""
    for dtypes in DTYPE_PAIRS:
        for lists in (1, 2, 3):
            name = f"{dtypes[0]}, {dtypes[1]}, {lists} lists".replace("torch.", "")
            problem = Problem.random(target.sizes, *dtypes, adaptive=True, lists=lists)
            yield f"gram: {name}", lambda p=problem: check_gram(p, target)
            yield f"step: {name}", lambda p=problem: assert_backends_agree(p, step, target.name, target.device)
    for dtype in LOW:
        trained = Trained.random(target.sizes, dtype, adaptive=True)
        yield f"masters: {dtype}".replace("torch.", ""), lambda p=trained: both(target, p, step_with_masters)


def run_all(target: Target) -> list[str]:
    """What went wrong, by name; in all of the backend's tunings."""
    failed = []
    own = getattr(target.backend, "tuning", None)
    for tuning in TUNINGS if own is not None else [None]:
        if tuning is not None:
            target.backend.tuning = replace(own, **vars(tuning))
        for name, check in checks(target):
            try:
                check()
            except Exception as error:
                failed.append(f"{name}, {tuning}: {error}")
                print("FAILED", failed[-1], flush=True)
    if own is not None:
        target.backend.tuning = own
    return failed


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: the kernels for it")
    device = torch.device(parser.parse_args(words).device)
    failed = run_all(Target(cuda if device.type == "cuda" else cpu, device, SIZES))
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("ran all kernels" if not failed else f"{len(failed)} checks failed")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
