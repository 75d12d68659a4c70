"""A table of all comparisons at the end of a run."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import sam_kernels

from .interleaved import Processes

RESULTS: dict[tuple[str, str, str], dict[str, Any]] = defaultdict(dict)


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    running = Processes()
    yield running
    running.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not RESULTS:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Optimizer side of a step: medians, and times slower than sam-kernels in the same run")
    for column in ("shapes", "method", "base", "contender"):
        table.add_column(column)
    for column in ("first + second", "GB/s of floor", "of copy", "memory", "ratio"):
        table.add_column(column, justify="right")
    for (shapes, method, base), result in RESULTS.items():
        ours = statistics.median(result["times"]["sam-kernels"])
        for name, times in result["times"].items():
            seconds = statistics.median(times)
            ratio = seconds / ours
            bandwidth = result["bytes"] / seconds / 1e9
            large = result["bytes"] > 1e8
            table.add_row(
                shapes,
                method,
                base,
                name,
                f"{1e3 * seconds:.2f} ms" if large else f"{1e6 * seconds:.0f} µs",
                f"{bandwidth:.0f}" if large else "",
                f"{100 * bandwidth / result['copy bandwidth']:.0f} %" if large else "",
                f"{result['memory'][name] / 1e6:.0f} MB" if large else "",
                "" if seconds == ours else f"{ratio:.1f}",
            )
    terminalreporter.write_line("")
    Console(width=140).print(table)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Says what the numbers depend on, and nothing that names a host."""
    cpu = machine_info.get("cpu", {})
    described = {
        "cpu": {key: cpu.get(key) for key in ("brand_raw", "arch", "count", "l2_cache_size", "l3_cache_size")},
        "system": machine_info.get("system"),
        "python": machine_info.get("python_version"),
        "torch": torch.__version__,
        "sam_kernels": {name: status.detail for name, status in sam_kernels.backends().items()},
    }
    machine_info.clear()
    machine_info.update(described)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Adds the command, and leaves out the single durations: the statistics stay."""
    output_json["command"] = "make bench"
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
