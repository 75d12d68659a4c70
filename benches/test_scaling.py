"""The optimizer side of a step against the number of parameters, and against the number of tensors."""

from __future__ import annotations

from typing import Any

import pytest

from .contenders import CONTENDERS, step_call
from .recording import CLOCK, record
from .shapes import equal

PARAMETERS = [100_000, 1_000_000, 10_000_000, 100_000_000]
TENSORS = [1, 10, 100, 1000, 10_000]
ELEMENTS_OF_A_TENSOR = 100
METHOD, BASE = "SAM", "SGD momentum"
_TIMES: dict[tuple[int, int], dict[str, list[float]]] = {}


def measure(processes: Any, tensors: int, elements: int) -> dict[str, list[float]]:
    shapes = equal(tensors, elements)
    rounds = 8 if elements <= 10_000_000 else 4
    calls: dict[str, Any] = {name: (step_call, (name, shapes, METHOD, BASE)) for name in CONTENDERS}
    return processes.interleaved(calls, rounds)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(
    ("tensors", "elements"),
    [*((64, count) for count in PARAMETERS), *((count, count * ELEMENTS_OF_A_TENSOR) for count in TENSORS)],
)
@pytest.mark.benchmark(timer=CLOCK, disable_gc=True)
def test_scaling(benchmark, processes, tensors, elements, contender):
    key = (tensors, elements)
    if key not in _TIMES:
        _TIMES[key] = measure(processes, tensors, elements)
    by_parameters = tensors == 64
    record(
        benchmark,
        _TIMES[key],
        contender,
        f"{elements:,} parameters in 64 tensors" if by_parameters else f"{tensors:,} tensors of 100",
        scaling="parameters" if by_parameters else "tensors",
        x=elements if by_parameters else tensors,
    )
