"""The program that compute-sanitizer runs on a GPU reaches every line of every kernel."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from .coverage import KERNELS, count_lines, unreached
from .shim import COMPILER

# Of a column that is not there, which no launch asks for.
DEAD = {"case DType::None: break;", "return {T(0)};"}


@pytest.fixture(scope="module")
def counts():
    if shutil.which("gcov") is None or shutil.which(COMPILER.split()[0]) is None:
        pytest.skip("there is no gcov, or no compiler")
    version = subprocess.run([*COMPILER.split(), "--version"], capture_output=True, text=True, check=True).stdout
    if "clang" in version:
        pytest.skip("gcov is GCC's")
    return count_lines("tests.cuda.covered")


def test_every_line_of_the_kernels_is_reached(counts):
    sources = {name: (KERNELS / name).read_text().splitlines() for name in {line[1] for line in counts}}
    assert {"access.cuh", "phases.cuh", "work.cuh"} <= set(sources)
    missed = [line for line in unreached(counts) if sources[line[1]][line[2] - 1].strip() not in DEAD]
    assert not missed


def test_so_are_the_loops_with_several_vectors_ahead(counts):
    """For each type that is read in vectors; with the chunks of other tests they end before they begin."""
    ahead = {}
    for (name, _, _), count in counts.items():
        if "GramBodyILi1" in name and "4walk" in name and "Lb0ELi4E" in name:
            ahead[name] = ahead.get(name, 0) + count
    assert len(ahead) == 3 and all(ahead.values())
