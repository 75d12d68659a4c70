"""Builds the native extensions. They include no torch header, so torch is not needed to build them."""

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import BaseError, CCompilerError

sys.path.insert(0, "csrc")
import build_cuda

COMMON_FLAGS = [
    "-O3",
    "-Wall",
    "-Wextra",
    # The same bits whatever the instruction set: never contract a * b + c.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
POSIX = platform.system() != "Windows"
HEADERS = sorted(str(path) for pattern in ("*.h", "*.inl") for path in Path("csrc").rglob(pattern))
BINDING = ["csrc/python/table_binding.cpp", "csrc/python/tensor_reader.cpp"]


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
    flags = [*COMMON_FLAGS, *openmp_flags()] if POSIX else ["/O2", "/openmp"]
    kernels = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
    return Pybind11Extension(
        "sam_kernels._cpu",
        [*kernels, "csrc/python/cpu_module.cpp", *BINDING],
        depends=HEADERS,
        cxx_std=17,
        extra_compile_args=flags,
        extra_link_args=[flag for flag in flags if flag == "-fopenmp"],
    )


class CudaExtension(Pybind11Extension):
    """Host code by the ordinary compiler, kernels by nvcc; the CUDA runtime is linked in, so that it loads anywhere."""

    def __init__(self, toolkit: build_cuda.Toolkit, archs: list[str]) -> None:
        self.toolkit, self.archs = toolkit, archs
        super().__init__(
            "sam_kernels._cuda",
            ["csrc/cuda/packing.cpp", "csrc/python/cuda_module.cpp", *BINDING],
            depends=[*HEADERS, *sorted(str(path) for path in Path("csrc/cuda").glob("*.cu*"))],
            cxx_std=17,
            extra_compile_args=COMMON_FLAGS,
            library_dirs=[str(toolkit.library)],
            libraries=["cudart_static", "dl", "pthread", "rt"],
        )


def cuda_extensions() -> tuple[list[Pybind11Extension], str | None]:
    """The CUDA extension where there is nvcc, whether or not there is a GPU; and why there is none."""
    try:
        if platform.system() != "Linux":
            raise build_cuda.NoCudaError("the CUDA kernels are built on Linux only")
        toolkit = build_cuda.find_toolkit()
        return [CudaExtension(toolkit, build_cuda.wanted_archs(toolkit))], None
    except build_cuda.NoCudaError as reason:
        print(f"sam-kernels: building without the CUDA kernels: {reason}", file=sys.stderr)
        return [], str(reason)


class BuildExtensions(build_ext):
    why_no_cuda: str | None = None

    def run(self) -> None:
        super().run()
        # pip shows nothing of a build that succeeds; `sam_kernels.backends()` repeats this.
        said = Path(self.get_ext_fullpath("sam_kernels._cuda")).with_name("_cuda_missing.txt")
        if self.why_no_cuda is None:
            said.unlink(missing_ok=True)
        else:
            said.write_text(self.why_no_cuda + "\n")

    def build_extension(self, ext: Pybind11Extension) -> None:
        try:
            if isinstance(ext, CudaExtension):
                ext.extra_objects = build_cuda.compile_kernels(ext.toolkit, ext.archs, Path("build")).objects
            super().build_extension(ext)
        except build_cuda.CommandError as error:
            raise SystemExit(
                f"sam-kernels: {ext.name} could not be built: {error}\n"
                "With SAM_KERNELS_CUDA_ARCHS=none in the environment the package is built without the CUDA kernels; "
                "Triton's remain on GPUs."
            ) from error
        except (BaseError, CCompilerError) as error:
            raise SystemExit(
                f"sam-kernels: {ext.name} could not be built: {error}\n"
                "It needs GCC or Clang. With SAM_KERNELS_NO_EXTENSIONS=1 in the environment the package is installed "
                "without the C++ and the CUDA kernels; Triton's remain on GPUs, and elsewhere PyTorch's own functions."
            ) from error


# Sources compile side by side.
ParallelCompile("SAM_KERNELS_BUILD_JOBS", default=os.cpu_count() or 1).install()

if os.environ.get("SAM_KERNELS_NO_EXTENSIONS") == "1":
    setup()
else:
    found, BuildExtensions.why_no_cuda = cuda_extensions()
    setup(ext_modules=[cpu_extension(), *found], cmdclass={"build_ext": BuildExtensions})
