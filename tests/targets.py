"""The backends that tests run on, and where their tensors are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy
import pytest
import torch

import sam_kernels.triton
from sam_kernels.backends import cpu, foreach
from sam_kernels.cuda import backend as cuda_backend
from sam_kernels.registry import _BACKENDS
from sam_kernels.triton import backend as triton_backend

from .cuda.shim import TUNING, ShimBackend

# Odd sizes around every boundary of the CPU kernels: lanes (16), tiles (512), chunks (16,384), several chunks.
CPU_SIZES = [0, 1, 3, 15, 16, 17, 129, 511, 512, 513, 1151, 16383, 16384, 16385, 65537]
# The same for the CUDA kernels, tuned for small tensors: vectors (2, 4, 8), warps (32), blocks (64), chunks (512).
CUDA_SIZES = [0, 1, 3, 7, 8, 9, 31, 33, 255, 511, 512, 513, 1024, 1100, 2049]
# And for the Triton kernels, whose interpreter is slow: chunks of 256.
TRITON_TUNING = sam_kernels.triton.Tuning(block=256, threads=64)
TRITON_SIZES = [0, 1, 9, 255, 256, 257, 700]


class Target(NamedTuple):
    """A backend, and where its tensors are.

    Attributes:
        backend: with the operations.
        sizes: of tensors around all of its boundaries.
    """

    backend: Any
    device: torch.device
    sizes: Sequence[int]

    @property
    def name(self) -> str:
        return str(self.backend.name)

    @property
    def has_launches(self) -> bool:
        """Whether it can tell how many launches an operation took, and take norm and perturbation in one."""
        return hasattr(self.backend, "launches")


def _on_gpu(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.gpu)


# With the tuning that users have, and the CUDA kernels also with that of the tests without a GPU.
ON_GPU = [_on_gpu(name) for name in ("cuda default", "cuda small", "triton default")]


def target_named(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """A target by its name in :data:`TARGETS`, ready to be used in one test."""
    on_cpu = torch.device("cpu")
    if name == "cpu":
        return Target(cpu.backend, on_cpu, CPU_SIZES)
    if name == "foreach":
        return Target(foreach.backend, on_cpu, TRITON_SIZES)
    if name == "cuda shim":
        return Target(request.getfixturevalue("shim"), on_cpu, CUDA_SIZES)
    if name == "triton interpreter":
        return Target(request.getfixturevalue("interpreter"), on_cpu, TRITON_SIZES)
    gpu = torch.device("cuda", torch.cuda.current_device())
    if name == "foreach on a GPU":
        return Target(foreach.backend, gpu, TRITON_SIZES)
    backend, small = (cuda_backend, TUNING) if name.startswith("cuda") else (triton_backend, TRITON_TUNING)
    monkeypatch.setattr(backend, "tuning", small if name.endswith("small") else type(small)())
    return Target(backend, gpu, CUDA_SIZES)


TARGETS = ["cpu", "cuda shim", "triton interpreter", *ON_GPU, "foreach", _on_gpu("foreach on a GPU")]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """Every backend but the definition: as it is, by a stand-in without a GPU, and on a GPU where there is one."""
    return target_named(request.param, request, monkeypatch)


@pytest.fixture(params=TARGETS[1:-2])
def gpu_target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """The same without the backends that are for the CPU and for any device."""
    return target_named(request.param, request, monkeypatch)


@pytest.fixture(params=[True, False], ids=["one launch", "two launches"])
def launches(request: pytest.FixtureRequest, gpu_target: Target, monkeypatch: pytest.MonkeyPatch) -> int:
    """Takes Gram matrix and what follows in one launch or in two; how many these are."""
    monkeypatch.setattr(gpu_target.backend, "tuning", replace(gpu_target.backend.tuning, one_launch=request.param))
    return 1 if request.param else 2


@pytest.fixture(scope="session")
def shim_backend() -> ShimBackend:
    return ShimBackend()


@pytest.fixture
def shim(shim_backend: ShimBackend, monkeypatch: pytest.MonkeyPatch) -> ShimBackend:
    """The backend "cuda-shim": the CUDA kernels run by the CPU."""
    monkeypatch.setitem(_BACKENDS, "cuda-shim", shim_backend)
    monkeypatch.setattr(shim_backend, "tuning", TUNING)
    return shim_backend


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[sam_kernels.triton.TritonBackend]:
    """The backend "triton" in Triton's interpreter."""
    pytest.importorskip("triton")
    if not triton_backend.is_interpreted:
        pytest.skip("Triton compiles for a GPU in this process")
    monkeypatch.setattr(triton_backend, "tuning", TRITON_TUNING)
    # The interpreter computes with numpy, which warns of infinities.
    before = numpy.seterr(all="ignore")
    yield triton_backend
    numpy.seterr(**before)
