"""What the CUDA tests run with: the kernels on the CPU, by the shim, and on a GPU where there is one."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from sam_kernels.backends import _BACKENDS, _DEVICES
from sam_kernels.cuda import CudaBackend, Tuning
from sam_kernels.cuda import backend as cuda_backend

from .shim import TUNING, ShimBackend


class Target(NamedTuple):
    """A backend that runs the CUDA kernels, and where its tensors are."""

    backend: CudaBackend
    device: torch.device

    @property
    def name(self) -> str:
        return self.backend.name


@pytest.fixture(scope="session")
def shim_backend() -> ShimBackend:
    return ShimBackend()


@pytest.fixture
def shim(shim_backend: ShimBackend, monkeypatch: pytest.MonkeyPatch) -> ShimBackend:
    """The backend "cuda-shim", for tensors on the CPU."""
    monkeypatch.setitem(_BACKENDS, "cuda-shim", shim_backend)
    monkeypatch.setitem(_DEVICES, "cuda-shim", ("cpu",))
    monkeypatch.setattr(shim_backend, "tuning", TUNING)
    return shim_backend


@pytest.fixture(
    params=["shim", pytest.param("small", marks=pytest.mark.gpu), pytest.param("default", marks=pytest.mark.gpu)]
)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """The shim; a GPU with the shim's small blocks and chunks; a GPU as users have it."""
    if request.param == "shim":
        return Target(request.getfixturevalue("shim"), torch.device("cpu"))
    monkeypatch.setattr(cuda_backend, "tuning", TUNING if request.param == "small" else Tuning())
    return Target(cuda_backend, torch.device("cuda", torch.cuda.current_device()))
