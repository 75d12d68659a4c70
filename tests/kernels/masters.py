"""Weights of low precision with float32 masters, as tests of kernels have them."""

from __future__ import annotations

import torch

import sam_kernels as sk
from sam_kernels.snapshot import MASTER

from .cases import Problem

LOW = [torch.bfloat16, torch.float16]
CLOSE = {"rtol": 2e-6, "atol": 1e-6}


class Trained(Problem):
    """Weights with masters that they are the roundings of, and state in float32."""

    @staticmethod
    def random(sizes, dtype, **settings):
        wide = Problem.random(sizes, torch.float32, dtype, **settings)
        own = Trained(**vars(wide))
        own.masters = [t.clone() for t in wide.params]
        own.params = [t.to(dtype) for t in wide.params]
        # Every third tensor is of float32 and has no master, as normalisation layers often are.
        for i in range(2, len(own.params), 3):
            own.params[i] = wide.params[i].clone()
            for x in own.xs:
                x[i] = x[i].float()
        return own

    def to(self, device):
        own = Trained(**vars(Problem.to(self.plain(), device)))
        own.masters = [t.to(device, copy=True) for t in self.masters]
        return own

    def plain(self):
        return Problem(self.params, self.xs, self.geometry, self.groups, self.states, self.steps)

    def snapshot(self, plan):
        snapshot = sk.Snapshot(plan, masters=True)
        snapshot.adopt(plan, self.masters)
        return snapshot


def both(target, problem, run):
    """Runs on the reference and on the target; weights, masters, state and flags must agree."""
    results = []
    for device, backend in (("cpu", "reference"), (target.device, target.name)):
        own = problem.to(device)
        plan = own.plan()
        snapshot = own.snapshot(plan)
        run(own, plan, snapshot, backend)
        results.append((own, snapshot))
    (wanted, wanted_masters), (got, got_masters) = results
    assert got_masters.taken == wanted_masters.taken
    for i, (a, b) in enumerate(zip(got_masters.tensors, wanted_masters.tensors, strict=True)):
        if wanted_masters.taken[i] & MASTER:
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.cpu(), b, **CLOSE)
    for a, b in zip(got.tensors(), wanted.tensors(), strict=True):
        near = CLOSE if a.dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(a.cpu(), b, **near)
    return got, got_masters
