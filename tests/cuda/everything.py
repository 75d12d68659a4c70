"""Every kernel once."""

from __future__ import annotations

import torch
from torch import Tensor

import sam_kernels as sk
from sam_kernels.backends.contract import (
    AscentArguments,
    CombinationArguments,
    DescentArguments,
    GramArguments,
    RestoreArguments,
)
from sam_kernels.cuda import CudaBackend, Tuning

from ..kernels.cases import FULLEST_FORMS, Problem, poisoned_snapshot, same_bits

SIZES = [1, 700, 33, 2049, 8]


def everything(backend: CudaBackend) -> list[Tensor]:
    """All that the kernels write, on a small problem."""
    results: list[Tensor] = []
    for one_launch in (True, False):
        backend.tuning = Tuning(512, 64, one_launch=one_launch)
        for lists in (1, 3):
            problem = Problem.random(SIZES, adaptive=True, lists=lists)
            problem.steps = [torch.tensor(float(i)) for i in range(len(SIZES))]
            plan = problem.plan()
            snapshot = poisoned_snapshot(plan)
            scale = [0.1] * lists * 2
            report = backend.ascent(AscentArguments(plan, problem.xs, sk.Normalized(), scale, snapshot))
            results += [report.gram.clone(), report.coefficients.clone(), *(p.clone() for p in problem.params)]
            rule = sk.Deflected(alpha=0.3) if lists > 1 else sk.Normalized()
            states = problem.copy().states
            for base, settings in FULLEST_FORMS:
                for state, value in zip(problem.states, states, strict=True):
                    torch._foreach_copy_(state, value)
                update = problem.base(base, settings)
                report = backend.descent(DescentArguments(plan, problem.xs, update, snapshot, rule, scale, True))
                results += [report.gram.clone(), *(t.clone() for t in problem.tensors())]
            ones = torch.ones(lists, dtype=torch.float64)
            backend.perturb(CombinationArguments(plan, problem.xs, ones, scale, snapshot))
            backend.restore(RestoreArguments(plan, snapshot))
            backend.combine(CombinationArguments(plan, problem.xs, ones, scale))
            results += [t.clone() for t in problem.tensors()]
    # More chunks than virtual blocks: some of those sum several chunks.
    backend.tuning = Tuning(8, 64)
    problem = Problem.random([9000])
    results.append(backend.gram(GramArguments(problem.plan(), problem.xs, False)).clone())
    return results


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))
