"""Launches Triton kernels on a driver that does nothing, and prints as JSON what was compiled, launched and how long
the host took.

    python -m tests.triton.launching

In a process of its own: one whose kernels run in the interpreter cannot compile them.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget

import sam_kernels as sk
from sam_kernels.backends.contract import AscentArguments, CombinationArguments, DescentArguments
from sam_kernels.triton import Tuning, backend
from tests.kernels.cases import Problem, at_a_low_address, poisoned_snapshot

compiled: list[str] = []
launched: list[tuple[str, int, bool]] = []  # name, programs, whether cooperatively


def load(name: str, *_: Any) -> tuple[object, int, int, int, int]:
    compiled.append(name)
    return object(), 0, 64, 0, 1024


class IdleDriver:
    """What Triton asks of the driver of an H200 in order to compile for it, and launches that are only written down."""

    utils = SimpleNamespace(
        load_binary=load,
        get_device_properties=lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 132},
    )

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def get_current_stream(device: int) -> int:
        return 0

    @staticmethod
    def get_current_target() -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        def launch(grid: int, *_: Any) -> None:
            launched.append((metadata.name, grid, metadata.launch_cooperative_grid))

        return launch


def steps(problem: Problem, base: str, count: int, rule: Any = None) -> Callable[[], None]:
    plan = problem.plan()
    snapshot = poisoned_snapshot(plan)
    own = problem.sgd(momentum=0.9) if base == "sgd" else problem.adam(decoupled=True)
    lists = len(problem.xs)

    def step() -> None:
        backend.ascent(AscentArguments(plan, problem.xs, rule or sk.Normalized(), [0.1] * lists * 2, snapshot))
        backend.descent(DescentArguments(plan, problem.xs, own, snapshot, sk.Fixed(), [1.0] * lists * 2))

    for _ in range(count):
        step()
    return step


def main() -> None:
    triton.runtime.driver.set_active(IdleDriver())
    backend.tuning = Tuning()
    result: dict[str, Any] = {"triton": triton.__version__}

    sizes = [1, 700, 4096, 65_537, 0]
    first = Problem.random(sizes)
    steps(first, "sgd", 1)
    result["compiled"], result["launched"] = list(compiled), list(launched)
    compiled.clear()
    # Other addresses, numbers of elements, chunks, tensors, groups, scales, settings: nothing that code depends on.
    steps(first.copy(), "sgd", 2)
    for other in ([16], [100_000] * 300, [1], [2048] * 16):
        problem = Problem.random(other, group_count=2)
        steps(problem, "sgd", 1)
    result["compiled again"] = list(compiled)
    compiled.clear()
    launched.clear()
    steps(Problem.random(sizes, torch.bfloat16), "sgd", 1)
    result["compiled for another type"] = list(compiled)

    # An address is one, however small: 64 bits of it are handed over in every launch.
    compiled.clear()
    plan = first.copy().plan()
    numbers = torch.ones(1, dtype=torch.float64)
    for coefficients in (at_a_low_address(numbers), numbers):
        backend.perturb(CombinationArguments(plan, first.xs, coefficients, [0.1] * 2))
    result["compiled for a low address"] = list(compiled)

    # A mixture of types takes a set of launches for each.
    launched.clear()
    mixed = Problem.random(sizes)
    for column in (mixed.params, *mixed.xs, *mixed.states):
        column[1] = column[1].bfloat16()
    steps(mixed, "sgd", 1)
    result["launched for two types"] = list(launched)

    backend.tuning = Tuning(one_launch=True)
    launched.clear()
    steps(Problem.random(sizes), "adam", 1)
    result["launched together"] = list(launched)
    backend.tuning = Tuning()

    many = Problem.random([1000] * 161, group_count=1)
    for base in ("sgd", "adam"):
        step = steps(many, base, 3)
        times = []
        for _ in range(100):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        result[f"host us of a step, {base}"] = 1e6 * statistics.median(times)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
