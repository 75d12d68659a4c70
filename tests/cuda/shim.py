"""Builds and loads the CUDA kernels for the CPU, with the stand-in for CUDA in ``tests/cuda_shim``."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sam_kernels.cuda import CudaBackend, Tuning

ROOT = Path(__file__).resolve().parents[2]
HOST_SOURCES = [
    ROOT / "csrc/cuda/packing.cpp",
    *(ROOT / "csrc/python" / name for name in ("cuda_module.cpp", "table_binding.cpp", "tensor_reader.cpp")),
    ROOT / "tests/cuda_shim/shim.cpp",
]
COMPILER = os.environ.get("CXX", "c++")
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-w",
    "-DSAMK_CUDA_MODULE=_cuda_shim",
]

# Few threads and small chunks, so that small tensors already make many blocks, many chunks and every kind of tail.
TUNING = Tuning(chunk_size=512, threads=64)


@cache
def build_cuda() -> Any:
    """The module that knows what is to be compiled; it is not part of the package."""
    path = ROOT / "csrc/build_cuda.py"
    if not path.exists():
        pytest.skip("the sources of the kernels are not here")
    return _module(path)


@cache
def native(counts_lines: bool = False) -> Any:
    """The extension module. A process can have one."""
    return _module(library(counts_lines))


@cache
def library(counts_lines: bool = False) -> Path:
    """The extension module's file, compiled once for each state of the sources.

    Args:
        counts_lines: writes down which lines have run when the process ends, for gcov, where ``GCOV_PREFIX`` says.
    """
    build = build_cuda()
    if shutil.which(COMPILER.split()[0]) is None:
        pytest.skip("there is no C++ compiler")
    pybind11 = pytest.importorskip("pybind11")
    flags = [
        *FLAGS,
        *(["--coverage", "-O0"] if counts_lines else []),
        f'-DSAMK_CUDA_SHIM="{ROOT / "tests/cuda_shim/shim.h"}"',
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_paths()['include']}",
    ]
    identity = hashlib.sha256(repr((flags, COMPILER)).encode())
    for path in sorted((*(ROOT / "csrc").rglob("*"), *(ROOT / "tests/cuda_shim").rglob("*"))):
        if path.suffix in (".h", ".cuh", ".inl", ".cu", ".cpp"):
            identity.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / f"cuda-shim-{identity.hexdigest()[:16]}"
    built_library = folder / "_cuda_shim.so"
    if not built_library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:

            def compile_one(unit: Any) -> str:
                built = f"{scratch}/{unit.name}.o"
                _run([*COMPILER.split(), *flags, *unit.flags, "-x", "c++", "-c", str(unit.source), "-o", built])
                return built

            units = [*(u for u in build.units() if u.name != "launch"), *map(build.Unit, HOST_SOURCES)]
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                objects = list(pool.map(compile_one, units))
            linked = ["--coverage"] if counts_lines else []
            _run([*COMPILER.split(), "-shared", *linked, *objects, "-o", f"{scratch}/library.so"])
            for notes in Path(scratch).glob("*.gcno"):
                notes.rename(folder / notes.name)
            Path(f"{scratch}/library.so").rename(built_library)
    return built_library


def _module(path: Path) -> Any:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


class ShimBackend(CudaBackend):
    """The CUDA backend on tensors of the CPU."""

    def __init__(self, counts_lines: bool = False) -> None:
        module = native(counts_lines)
        super().__init__(module, "cuda-shim")
        self.tuning = TUNING
        self._library = ctypes.CDLL(module.__file__)
        self._library.shim_barriers.restype = ctypes.c_char_p

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def unavailable_reason(self) -> str | None:
        return None

    def describe(self) -> str:
        return "CUDA kernels run by fibers"

    def barriers(self) -> list[str]:
        """Names of the barriers that kernels have reached so far."""
        return str(self._library.shim_barriers().decode()).split()

    @contextmanager
    def schedule(self, blocks: int = 3, order: str = "forward", seed: int = 0, skipped: str = "") -> Iterator[None]:
        """Runs kernels with another grid, in another order of threads, or without one of their barriers."""
        number = ["forward", "reverse", "random", "uneven"].index(order)
        self._library.shim_configure(blocks, number, seed, skipped.encode())
        try:
            yield
        finally:
            self._library.shim_configure(3, 0, 0, b"")
