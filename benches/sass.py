"""Predicts how fast the CUDA kernels are, from their machine code: python -m benches.sass

Compiles the kernels for an H100's and an H200's instruction set, looks at each loop over vectors, and prints a table
for docs/cuda.md. Nothing is measured. What limits a loop is the smallest of these rates, in bytes a clock of a
multiprocessor, with soft corners (a norm of order 4):

* the memory's own;
* latency: bytes that all threads have under way, over the time for them to come and be worked on;
* instructions, of which 4 x 32 lanes are issued a clock;
* conversions to float64, of which 16 lanes are.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .tables import table

ROOT = Path(__file__).resolve().parents[1]

# Of both: multiprocessors, clocks a second; and the bandwidth of a copy, which others have measured.
MULTIPROCESSORS, CLOCK = 132, 1.755e9
COPY = {"H100": 3.0e12, "H200": 4.3e12}
# Assumed, in clocks: until a load has come, for an instruction of a thread among its neighbours, for the first warp to
# prepare a chunk, and for a barrier of the block.
LATENCY, CLOCKS_PER_INSTRUCTION, PREPARE, BARRIER = 1300, 2.2, 700, 50
THREADS, CHUNK, REGISTERS = 512, 16384, 65536
LANES, CONVERSION_LANES = 128, 16

_PATHS = {
    "Path::Float32": "float32",
    "Path::BFloat16": "bfloat16",
    "Path::Float16": "float16",
    "Path::Float32BFloat16": "float32, bfloat16 gradients",
}
_ELEMENTS = {"float32": 4, "bfloat16": 8, "float16": 8, "float32, bfloat16 gradients": 4}
_SIZES = {"128": 16, "64": 8, "U16": 2, "U8": 1}


@dataclass
class Instruction:
    """One of the machine's, and the lines that it comes from, innermost first."""

    address: int
    text: str
    lines: list[str]

    @property
    def name(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def size(self) -> int:
        """Bytes of a memory access."""
        return next((_SIZES[part] for part in self.name.split(".") if part in _SIZES), 4)

    @property
    def registers(self) -> list[str]:
        return re.findall(r"\bR\d+\b", self.text)


@dataclass
class Loop:
    """A loop over vectors."""

    kernel: str
    what: str
    path: str
    vectors: int  # of each column, under way at a time
    registers: int
    body: list[Instruction] = field(repr=False)

    def count(self, name: str) -> int:
        return sum(own.name.startswith(name) for own in self.body)

    @property
    def loads(self) -> list[Instruction]:
        return [own for own in self.body if own.name.startswith("LDG")]

    @property
    def bytes_read(self) -> int:
        """By a thread in one turn."""
        return sum(own.size for own in self.loads)

    @property
    def states(self) -> int:
        """State tensors of a descent: what is read besides weights and gradients."""
        return (self.bytes_read - (24 if "gradients" in self.path else 32)) // 16

    @property
    def bytes(self) -> int:
        """Read and written by a thread in one turn, with the stores of a row without masters."""
        written = 0
        if self.kernel == "combine_kernel":
            written = 1
        elif self.what.startswith(("perturb", "ascent")):
            written = 2
        elif "descent" in self.what:
            written = 1 + self.states
        return self.bytes_read + 16 * written

    @property
    def bytes_ahead(self) -> int:
        """Read before the first of them is used."""
        awaited: set[str] = set()
        total = 0
        for own in self.body:
            if own.name.startswith("LDG"):
                total += own.size
                first = int(own.registers[0][1:])
                awaited |= {f"R{first + i}" for i in range(max(1, own.size // 4))}
            elif awaited.intersection(own.registers):
                break
        return total

    @property
    def blocks(self) -> int:
        """That a multiprocessor holds at a time."""
        return min(2048 // THREADS, REGISTERS // (-(-self.registers // 8) * 8 * THREADS))

    def rates(self) -> dict[str, float]:
        """Bytes a clock of a multiprocessor."""
        elements = _ELEMENTS[self.path] * self.vectors
        turns = CHUNK / (THREADS * elements)
        trips = max(1, round(self.bytes_read / max(1, self.bytes_ahead)))
        clocks = turns * (trips * LATENCY + CLOCKS_PER_INSTRUCTION * len(self.body)) + PREPARE + BARRIER
        rates = {
            "latency": self.blocks * CHUNK * (self.bytes / elements) / clocks,
            "instructions": LANES * self.bytes / len(self.body),
        }
        conversions = self.count("F2F.F64")
        if conversions:
            rates["conversions"] = CONVERSION_LANES * self.bytes / conversions
        return rates

    def share_of_copy(self, device: str) -> float:
        """Predicted."""
        memory = COPY[device] / (MULTIPROCESSORS * CLOCK)
        return float((1.0 + sum((memory / rate) ** 4 for rate in self.rates().values())) ** -0.25)


def instructions_of(listing: str) -> Iterator[tuple[str, list[Instruction], dict[str, int]]]:
    """Of each kernel its name, its instructions and the addresses of its labels."""
    for part in re.split(r"^\.text\.", listing, flags=re.MULTILINE)[1:]:
        name = part.split(":", 1)[0]
        found: list[Instruction] = []
        labels: dict[str, int] = {}
        waiting: list[str] = []
        lines: list[str] = []
        fresh = True
        for line in part.splitlines():
            place = re.match(r'\s*//## File "(.*?)", line (\d+)', line)
            label = re.match(r"(\.L\w+):", line)
            code = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?) ;", line)
            if place:
                lines = [] if fresh else lines
                fresh = False
                lines.append(f"{place[1]}:{place[2]}")
            elif label:
                waiting.append(label[1])
            elif code:
                fresh = True
                address = int(code[1], 16)
                labels |= dict.fromkeys(waiting, address)
                waiting = []
                found.append(Instruction(address, code[2], lines))
        yield name, found, labels


class Sources:
    """Lines by place."""

    def __init__(self) -> None:
        self._files: dict[str, list[str]] = {}

    def __getitem__(self, place: str) -> str:
        path, _, number = place.rpartition(":")
        if path not in self._files:
            self._files[path] = Path(path).read_text().splitlines() if Path(path).exists() else []
        lines = self._files[path]
        return lines[int(number) - 1].strip() if int(number) <= len(lines) else ""


def what_of(texts: list[str]) -> tuple[str, int]:
    """What a loop does, by the lines that it was inlined from, and how many vectors of a column it has under way."""
    joined = "\n".join(texts)
    lists = re.search(r"gram_phase_of<(\d)>", joined)
    if lists:
        weighted = "<A, true" in joined
        ahead = 1
        if "kPairsAhead>" in joined:
            ahead = 4 if lists[1] == "1" and not weighted else 2
        count = "1 list" if lists[1] == "1" else f"{lists[1]} lists"
        return f"Gram matrix, {count}{', weighted' if weighted else ''}", ahead
    return "", 1


def loops_of(unit: Any, nvcc: str, nvdisasm: str, folder: Path) -> Iterator[Loop]:
    """The loops over vectors in the kernels of one object file."""
    cubin, said = folder / f"{unit.name}.cubin", folder / f"{unit.name}.txt"
    if not said.exists():
        command = [nvcc, "-std=c++17", "-O3", "-fmad=false", "-arch=sm_90", "-lineinfo", "-cubin", "--resource-usage"]
        command += [*unit.flags, str(unit.source), "-o", str(cubin)]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
        said.write_text(run.stdout)
    registers = dict(re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", said.read_text(), re.DOTALL))
    listing = subprocess.run([nvdisasm, "-c", "-gi", str(cubin)], capture_output=True, text=True, check=True).stdout
    sources = Sources()
    for name, instructions, labels in instructions_of(listing):
        kernel = re.sub(r"^_ZN4samk4cuda\d+(\w+?_kernel).*", r"\1", name)
        if unit.base is not None:  # with a Gram matrix before it or without
            kernel = f"descent, {unit.base}"
        spans = []
        for own in instructions:
            target = re.search(r"BRA.*?`\((\.L\w+)\)", own.text)
            if target and labels.get(target[1], own.address + 1) <= own.address:
                spans.append((labels[target[1]], own))
        for begin, branch in spans:
            inner = [(b, e) for b, e in spans if begin < b and e.address < branch.address]
            body = [own for own in instructions if begin <= own.address <= branch.address]
            body = [own for own in body if not any(b <= own.address <= e.address for b, e in inner)]
            loads = [own for own in body if own.name.startswith("LDG")]
            texts = [[sources[line] for line in own.lines] for own in loads]
            path = _path_of(texts)
            # Others walk over elements one at a time, or over chunks.
            if path is None or "share.stride" not in sources[branch.lines[0]]:
                continue
            what, vectors = what_of(texts[0])
            if what.startswith("Gram") and "weighted" not in what:
                # All loops over gradients alone are attributed to the first path. Each element is converted once.
                converted = sum(own.name.startswith("F2F.F64") for own in body)
                path = {4: "float32", 8: "bfloat16"}.get(converted // len(loads))
                if path is None:
                    continue
            yield Loop(kernel, what or kernel, path, vectors, int(registers[name]), body)


def _path_of(texts: list[list[str]]) -> str | None:
    """The path that most of a loop's loads are on; None for single elements."""
    found = [m[1] for lines in texts for text in lines if (m := re.match(r"case (Path::\w+): run_range", text))]
    return _PATHS.get(max(set(found), key=found.count)) if len(found) == len(texts) > 0 else None


def tool(name: str) -> str | None:
    """On the PATH, or among what Triton brings along."""
    found = shutil.which(name)
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        own = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        found = str(own) if own.exists() else None
    return found


def all_loops() -> list[Loop]:
    """Of all kernels.

    Raises:
        SystemExit: if there is no nvcc, or no nvdisasm.
    """
    sys.path.insert(0, str(ROOT / "csrc"))
    import build_cuda

    try:
        toolkit = build_cuda.find_toolkit()
    except build_cuda.NoCudaError as reason:
        raise SystemExit(str(reason)) from None
    nvdisasm = tool("nvdisasm")
    if nvdisasm is None:
        raise SystemExit("there is no nvdisasm, which the CUDA toolkit and Triton bring along")
    sources = sorted(
        path for part in ("common", "cuda") for path in (ROOT / "csrc" / part).rglob("*") if path.is_file()
    )
    identity = hashlib.sha256(b"".join([*(path.read_bytes() for path in sources), repr(toolkit.version).encode()]))
    folder = ROOT / f"build/sass-{identity.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    units = [unit for unit in build_cuda.units() if unit.name != "launch"]
    return [loop for unit in units for loop in loops_of(unit, toolkit.nvcc, nvdisasm, folder)]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    seen: dict[tuple[Any, ...], Loop] = {}
    for loop in all_loops():
        # Alike in several kernels. What remains of a chunk is read by loops without vectors ahead, and float16 as
        # bfloat16 is.
        key = (loop.what, loop.path, loop.bytes_read if "descent" in loop.what else 0)
        if loop.path != "float16" and (key not in seen or seen[key].vectors < loop.vectors):
            seen[key] = loop
    rows = [
        [
            f"{loop.what}, {loop.states} state tensors" if "descent" in loop.what else loop.what.replace("_kernel", ""),
            loop.path,
            f"{loop.blocks} x {THREADS}",
            str(loop.bytes),
            f"{loop.bytes_ahead * loop.blocks * THREADS / 1024:.0f} KB",
            f"{16 * len(loop.body) / loop.bytes:.1f}",
            ", ".join(f"{name} {rate:.0f}" for name, rate in loop.rates().items()),
            *(f"{100 * loop.share_of_copy(device):.0f} %" for device in COPY),
        ]
        for loop in seen.values()
    ]
    head = ["loop", "types", "threads", "bytes", "in flight", "instructions for 16 bytes", "bytes a clock", *COPY]
    print(table(head, rows))


if __name__ == "__main__":
    main()
