"""Builds the native extensions. They include no torch header, so torch is not needed to build them."""

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

COMMON_FLAGS = [
    "-O3",
    "-Wall",
    "-Wextra",
    # The same bits whatever the instruction set: never contract a * b + c.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]


def openmp_flags() -> list[str]:
    """-fopenmp where the compiler has it; without it the kernels run on one thread."""
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*compiler.split(), "-fopenmp", str(source), "-o", str(source.with_suffix(""))]
        try:
            found = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            found = False
    if not found:
        print(f"sam-kernels: {compiler} has no OpenMP; the CPU kernels will use one thread", file=sys.stderr)
    return ["-fopenmp"] if found else []


def cpu_extension() -> Pybind11Extension:
    posix = platform.system() != "Windows"
    flags = [*COMMON_FLAGS, *openmp_flags()] if posix else ["/O2", "/openmp"]
    sources = sorted(str(path) for folder in ("csrc/cpu", "csrc/python") for path in Path(folder).glob("*.cpp"))
    headers = sorted(str(path) for pattern in ("*.h", "*.inl") for path in Path("csrc").rglob(pattern))
    return Pybind11Extension(
        "sam_kernels._cpu",
        sources,
        depends=headers,
        cxx_std=17,
        extra_compile_args=flags,
        extra_link_args=[flag for flag in flags if flag == "-fopenmp"],
    )


# Sources compile side by side.
ParallelCompile("SAM_KERNELS_BUILD_JOBS", default=os.cpu_count() or 1).install()

setup(ext_modules=[cpu_extension()], cmdclass={"build_ext": build_ext})
