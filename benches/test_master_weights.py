"""The optimizer side of a SAM step of a model in bfloat16: with float32 masters, ours and by hand, and without."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

from .contenders import (
    IN_BFLOAT16,
    MASTERS_FLOOR_BYTES,
    copy_call,
    in_bfloat16_call,
    make_in_bfloat16,
    make_parameters,
    step_of,
)
from .memory import peak_bytes
from .recording import CLOCK, record
from .shapes import MODELS

MODEL, ROUNDS = "resnet50", 15
COUNT = sum(torch.Size(shape).numel() for shape in MODELS[MODEL])
_MEASURED: dict[str, dict[str, Any]] = {}


def verify(base: str) -> None:
    """Masters by hand and ours make the same steps, to a rounding of the weights."""
    results = []
    for name in IN_BFLOAT16[:2]:
        parameters = make_parameters(MODELS[MODEL][:20], torch.bfloat16)
        optimizer = make_in_bfloat16(name, parameters, base, lr=0.01)
        for _ in range(3):
            optimizer.first_step()
            perturbed = [p.detach().clone() for p in parameters]
            optimizer.second_step()
        results.append([*perturbed, *(p.detach() for p in parameters)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2.0**-8, atol=1e-5)


def measure(processes: Any, base: str) -> dict[str, Any]:
    verify(base)
    parameters = make_parameters(MODELS[MODEL], torch.bfloat16)
    memory = {
        name: peak_bytes(lambda name=name: step_of(make_in_bfloat16(name, parameters, base))) for name in IN_BFLOAT16
    }
    time.sleep(1.0)  # until this process's threads sleep, which wait for work by looking for it
    calls: dict[str, Any] = {name: (in_bfloat16_call, (name, MODELS[MODEL], base)) for name in IN_BFLOAT16}
    times = processes.interleaved({**calls, "copy": (copy_call, (COUNT,))}, ROUNDS)
    return {"times": times, "copy": 8 * COUNT / statistics.median(times.pop("copy")) / 1e9, "memory": memory}


@pytest.mark.parametrize("contender", IN_BFLOAT16)
@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
@pytest.mark.benchmark(timer=CLOCK, disable_gc=True)
def test_step(benchmark, processes, base, contender):
    if base not in _MEASURED:
        _MEASURED[base] = measure(processes, base)
    result = _MEASURED[base]
    record(
        benchmark,
        result["times"],
        contender,
        f"{MODEL} in bfloat16, {base}",
        in_bfloat16=base,
        floor_bytes=MASTERS_FLOOR_BYTES[base] * COUNT,
        copy_gb_per_second=result["copy"],
        peak_bytes=result["memory"][contender],
        parameters=COUNT,
    )
