"""The optimizer side of a step of SAM's family, against pytorch-optimizer's classes.

A step of LookSAM is here one of those that take two passes; pytorch-optimizer's asks for two in every step.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from .contenders import make_parameters, make_variant, variant_call
from .recording import CLOCK, record
from .shapes import MODELS

METHODS = ["GSAM", "WSAM", "FriendlySAM", "LookSAM"]
CONTENDERS = ["sam-kernels", "pytorch-optimizer"]
BASE, MODEL, ROUNDS = "SGD momentum", "resnet50", 15
_TIMES: dict[str, dict[str, list[float]]] = {}


def verify(method: str) -> None:
    """Both make the same step from the same two gradients."""
    results = []
    for name in CONTENDERS:
        parameters = make_parameters(MODELS[MODEL][:20])
        generator = torch.Generator().manual_seed(1)
        optimizer = make_variant(name, parameters, method, BASE, lr=0.1)
        optimizer.first_step()
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.second_step()
        results.append([p.detach().clone() for p in parameters])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text: f"{method}: {text}")


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.benchmark(timer=CLOCK, disable_gc=True)
def test_variant(benchmark, processes, method, contender):
    if method not in _TIMES:
        verify(method)
        time.sleep(1.0)  # until this process's threads sleep, which wait for work by looking for it
        calls: dict[str, Any] = {name: (variant_call, (name, MODELS[MODEL], method, BASE)) for name in CONTENDERS}
        _TIMES[method] = processes.interleaved(calls, ROUNDS)
    record(benchmark, _TIMES[method], contender, f"{MODEL}, {method}, {BASE}", variant=method)
