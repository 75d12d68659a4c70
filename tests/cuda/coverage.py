"""Which lines of the kernels a program runs, on the stand-in for CUDA: python -m tests.cuda.coverage

Prints the lines of ``csrc/cuda`` that were compiled into some kernel, and that nothing has reached. A template counts
for each of its instances, as it does in the machine code.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from .shim import ROOT, library

KERNELS = ROOT / "csrc/cuda"
# Host code, which is tested for itself.
HOST = ("launch.cu", "launch.h", "packing.cpp", "packing.h")

# Instance and place.
Line = tuple[str, str, int]


def count_lines(module: str) -> dict[Line, int]:
    """How often each line of the kernels ran in a program, which uses the stand-in that counts lines."""
    library(counts_lines=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "GCOV_PREFIX": folder, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", module], cwd=ROOT, env=environment, check=True)
        counts: dict[Line, int] = defaultdict(int)
        for data in Path(folder).rglob("*.gcda"):
            for line, count in _counts_in(data):
                counts[line] += count
    return counts


def _counts_in(data: Path) -> Iterator[tuple[Line, int]]:
    notes = library(counts_lines=True).parent / f"{data.stem}.gcno"
    shutil.copy(notes, data.parent)
    report = subprocess.run(
        ["gcov", "--json-format", "--stdout", str(data)], cwd=data.parent, capture_output=True, text=True, check=True
    )
    for file in json.loads(report.stdout)["files"]:
        path = Path(file["file"]).resolve()
        if path.parent != KERNELS or path.name in HOST:
            continue
        for line in file["lines"]:
            yield (line.get("function_name", ""), path.name, line["line_number"]), line["count"]


def unreached(counts: dict[Line, int]) -> list[Line]:
    return sorted((line for line, count in counts.items() if count == 0), key=lambda line: (line[1], line[2], line[0]))


def main() -> None:
    found = unreached(count_lines("tests.cuda.covered"))
    mangled = "\n".join(line[0] for line in found)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    for name, (_, file, number) in zip(names, found, strict=True):
        print(f"{file}:{number} {name}")


if __name__ == "__main__":
    main()
