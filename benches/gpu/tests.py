"""Runs tests, and writes down the outcome of each as it comes: python -m benches.gpu.tests --records FILE -- ..."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from . import records

SECONDS_FOR_ONE = 60


class Outcomes:
    """A plugin for pytest. Where tests run in several processes, their reports come together in the first."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.failed:
            row |= {"when": report.when, "error": str(report.longrepr)[-1500:]}
        records.append(self._path, row)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True, help="file that rows are added to")
    parser.add_argument("--in-parallel", action="store_true", help="in as many processes as there are cores, less two")
    parser.add_argument("pytest", nargs="+", help="what is said to pytest")
    arguments = parser.parse_args(words)
    options = ["-q", "--tb=short", "-p", "no:cacheprovider"]
    if arguments.in_parallel and importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(max(1, (os.cpu_count() or 1) - 2))]
    if importlib.util.find_spec("pytest_timeout") is not None:
        options += ["--timeout", str(SECONDS_FOR_ONE)]
    sys.exit(pytest.main([*options, *arguments.pytest], plugins=[Outcomes(arguments.records)]))


if __name__ == "__main__":
    main()
