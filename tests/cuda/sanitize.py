"""A small program that runs every CUDA kernel, for compute-sanitizer: python -m tests.cuda.sanitize"""

from __future__ import annotations

import torch

import sam_kernels as sk
from sam_kernels.cuda import Tuning
from sam_kernels.cuda import backend as cuda

from ..kernels.cases import DTYPE_PAIRS, Problem

SIZES = [0, 1, 7, 700, 2049, 40_000]


def main() -> None:
    for one_launch in (True, False):
        cuda.tuning = Tuning(chunk_size=512, threads=64, one_launch=one_launch)
        for dtypes in DTYPE_PAIRS:
            for lists in (1, 3):
                problem = Problem.random(SIZES, *dtypes, adaptive=True, lists=lists).to("cuda")
                plan = problem.plan()
                snapshot = sk.Snapshot(plan)
                rule = sk.Deflected(alpha=0.3) if lists > 1 else sk.Normalized()
                for base in (problem.sgd(momentum=0.9), problem.adam(amsgrad=True)):
                    sk.ascent_(plan, problem.xs, scale=0.1, snapshot=snapshot)
                    sk.descent_(plan, problem.xs, base, rule=rule, weighted=True, snapshot=snapshot)
                sk.perturb_(plan, problem.xs, [0.5] * lists, snapshot=snapshot)
                sk.restore_(plan, snapshot)
                sk.combine_(plan, problem.xs, [0.5] * lists)
    torch.cuda.synchronize()
    print("ran all kernels")


if __name__ == "__main__":
    main()
