"""The optimizer side of a SAM step, first_step() + second_step(), against its floor and its peers.

Contenders are verified against each other, then timed in turn. pytest-benchmark shows the recorded times; `extra_info`
holds the floor and the copy bandwidth of the same run.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

from .conftest import RESULTS
from .contenders import CONTENDERS, FLOOR_BYTES, copy_call, make_optimizer, make_parameters, step_call, step_of
from .interleaved import Processes
from .memory import peak_bytes
from .recording import CLOCK, record
from .shapes import MODELS, Shape

ROUNDS = 25


def verify(shapes: list[Shape], method: str, base: str) -> None:
    """All contenders make the same step."""
    results = {}
    for name in CONTENDERS:
        parameters = make_parameters(shapes)
        optimizer = make_optimizer(name, parameters, method, base, lr=0.1)
        optimizer.first_step()
        perturbed = [p.detach().clone() for p in parameters]
        optimizer.second_step()
        results[name] = [*perturbed, *(p.detach() for p in parameters)]
    for name, tensors in results.items():
        for a, b in zip(tensors, results["sam-kernels"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def measure(processes: Processes, model: str, method: str, base: str) -> dict[str, Any]:
    shapes = MODELS[model]
    verify(shapes[:20], method, base)
    parameters = make_parameters(shapes)
    memory = {
        name: peak_bytes(lambda name=name: step_of(make_optimizer(name, parameters, method, base)))
        for name in CONTENDERS
    }
    time.sleep(1.0)  # until this process's threads sleep, which wait for work by looking for it
    count = sum(torch.Size(shape).numel() for shape in shapes)
    calls: dict[str, Any] = {name: (step_call, (name, shapes, method, base)) for name in CONTENDERS}
    times = processes.interleaved({**calls, "copy": (copy_call, (count,))}, ROUNDS)
    copy = statistics.median(times.pop("copy"))
    floor = FLOOR_BYTES[method, base] * count
    return {"times": times, "bytes": floor, "copy bandwidth": 8 * count / copy / 1e9, "memory": memory}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
@pytest.mark.parametrize("method", ["SAM", "ASAM"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.benchmark(timer=CLOCK, disable_gc=True)
def test_step(benchmark, processes, model, method, base, contender):
    result = RESULTS[model, method, base]
    if not result:
        result.update(measure(processes, model, method, base))
    record(
        benchmark,
        result["times"],
        contender,
        f"{model}, {method}, {base}",
        floor_bytes=result["bytes"],
        copy_gb_per_second=result["copy bandwidth"],
        peak_bytes=result["memory"][contender],
        parameters=sum(torch.Size(shape).numel() for shape in MODELS[model]),
    )
