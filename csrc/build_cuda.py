"""Compiles the CUDA kernels with nvcc, for setup.py and for the test of what the compiler reports.

Environment:
    CUDA_HOME, CUDA_PATH: where the CUDA toolkit is; otherwise nvcc is looked for on the PATH.
    SAM_KERNELS_CUDA_ARCHS: compute capabilities, as in "80;90"; machine code is made for each, and PTX for the last.
        "none" builds without CUDA.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parent
DEFAULT_ARCHS = ("80", "90", "100")

# Launch parameters of 32,764 bytes.
OLDEST_CUDA = (12, 1)

FLAGS = [
    "-std=c++17",
    "-O3",
    # The same bits as the CPU kernels: never contract a * b + c.
    "-fmad=false",
    "--compiler-options=-fPIC,-fvisibility=hidden",
    "--threads=0",
    "--resource-usage",
]


class NoCudaError(Exception):
    """There is no usable nvcc; the message says why."""


class CommandError(Exception):
    """The message has the command and all that it said."""


class Toolkit(NamedTuple):
    """An installed CUDA toolkit."""

    nvcc: str
    version: tuple[int, int]
    codes: frozenset[str]  # compute capabilities that nvcc makes machine code for
    library: Path  # folder of libcudart_static.a


class Unit(NamedTuple):
    """What is compiled to one object file."""

    source: Path
    base: str | None = None  # the struct of a base optimizer that SAMK_BASE stands for

    @property
    def name(self) -> str:
        return self.source.stem if self.base is None else f"{self.source.stem}_{self.base.lower()}"

    @property
    def flags(self) -> list[str]:
        return [] if self.base is None else [f"-DSAMK_BASE={self.base}"]


def units() -> list[Unit]:
    """All that is to be compiled: descent.cu once for each base optimizer of the list in common/bases.h."""
    found = re.search(r"using Bases = BaseList<(.*?)>;", (SOURCES / "common/bases.h").read_text(), re.DOTALL)
    assert found is not None
    bases = re.findall(r"\w+", found[1])
    descent = SOURCES / "cuda/descent.cu"
    others = sorted(path for path in descent.parent.glob("*.cu") if path != descent)
    return [*(Unit(descent, base) for base in bases), *map(Unit, others)]


class Build(NamedTuple):
    """Compiled kernels."""

    objects: list[str]
    report: str  # registers, stack and spills of each kernel and capability, as ptxas prints them


def find_toolkit() -> Toolkit:
    """The toolkit to build with.

    Raises:
        NoCudaError: if there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if nvcc is None:
        raise NoCudaError("nvcc is not on the PATH, and CUDA_HOME is not set")
    try:
        text = _run([nvcc, "--version"])
        codes = frozenset(re.findall(r"sm_(\d+)", _run([nvcc, "--list-gpu-code"])))
        top = re.search(r"TOP=(\S+)", _run([nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull]))
    except (OSError, CommandError) as error:
        raise NoCudaError(f"{nvcc} does not run: {error}") from None
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None or top is None:
        raise NoCudaError(f"{nvcc} does not say its version and place")
    version = (int(release[1]), int(release[2]))
    if version < OLDEST_CUDA:
        raise NoCudaError(
            f"{nvcc} is of CUDA {version[0]}.{version[1]}; the kernels need {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}"
        )
    folders = [
        folder for pattern in ("targets/*/lib", "lib64", "lib") for folder in Path(top[1]).resolve().glob(pattern)
    ]
    library = next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)
    if library is None:
        raise NoCudaError(f"the toolkit of {nvcc} has no libcudart_static.a")
    return Toolkit(nvcc, version, codes, library)


def wanted_archs(toolkit: Toolkit) -> list[str]:
    """The compute capabilities to build for, lowest first.

    Raises:
        NoCudaError: if none are wanted.
        ValueError: for a capability that this nvcc does not know.
    """
    wanted = os.environ.get("SAM_KERNELS_CUDA_ARCHS", "").strip()
    if wanted.lower() == "none":
        raise NoCudaError("SAM_KERNELS_CUDA_ARCHS is none")
    archs = [re.sub(r"[.\s]|sm_", "", arch) for arch in re.split("[;,]", wanted) if arch.strip()]
    unknown = [arch for arch in archs if arch not in toolkit.codes]
    if unknown:
        known = ", ".join(sorted(toolkit.codes, key=int))
        raise ValueError(f"Invalid SAM_KERNELS_CUDA_ARCHS: {wanted!r}; this nvcc knows {known}")
    archs = archs or [arch for arch in DEFAULT_ARCHS if arch in toolkit.codes]
    return sorted(set(archs), key=int)


def compile_kernels(toolkit: Toolkit, archs: list[str], folder: Path, wanted: list[Unit] | None = None) -> Build:
    """Object files of all kernels. What has been compiled from the same files with the same flags is used again.

    Args:
        folder: for the results, which lie in a folder of their own in it.
        wanted: some of the :func:`units`; None for all.
    """
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    flags = [*FLAGS, *targets]
    files = sorted(path for part in ("common", "cuda") for path in (SOURCES / part).rglob("*") if path.is_file())
    identity = hashlib.sha256(repr((flags, toolkit.version)).encode())
    for path in files:
        identity.update(path.name.encode() + path.read_bytes())
    wanted = units() if wanted is None else wanted
    results = folder / f"cuda-{identity.hexdigest()[:16]}"
    results.mkdir(parents=True, exist_ok=True)

    def compile_one(unit: Unit) -> str:
        built, report = results / f"{unit.name}.o", results / f"{unit.name}.txt"
        if not (built.exists() and report.exists()):
            partial = results / f"{unit.name}.{os.getpid()}.o"
            report.write_text(_run([toolkit.nvcc, *flags, *unit.flags, "-c", str(unit.source), "-o", str(partial)]))
            partial.rename(built)
        return report.read_text()

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        reports = list(pool.map(compile_one, wanted))
    return Build([str(results / f"{unit.name}.o") for unit in wanted], "\n".join(reports))


def _run(command: list[str]) -> str:
    """Output and errors together."""
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode != 0:
        raise CommandError(f"{' '.join(command)}\n{run.stdout}")
    return run.stdout
