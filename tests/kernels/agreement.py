"""What tests of one operation after the other have in common: scales, pairs of types, and a backend that must agree."""

from __future__ import annotations

import pytest

import sam_kernels as sk

from .cases import DTYPE_PAIRS, assert_backends_agree, poisoned_snapshot

SCALES = {k: [[0.05 * (g + 1) * (-1) ** i for i in range(k)] for g in range(2)] for k in (1, 2, 3)}

by_dtypes = pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)


def agree(target, problem, run):
    assert_backends_agree(problem, run, target.name, target.device)


def descent(problem, base, backend, **arguments):
    """Perturb with snapshot, then descend; both with the same backend."""
    plan = problem.plan()
    snapshot = poisoned_snapshot(plan)
    sk.perturb_(plan, problem.xs, [1.0] * len(problem.xs), snapshot=snapshot, backend=backend)
    report = sk.descent_(plan, problem.xs, base, snapshot=snapshot, backend=backend, **arguments)
    assert not snapshot.is_taken
    return report
