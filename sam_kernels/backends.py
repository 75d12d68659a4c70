"""Which backends there are, and which one serves a device."""

from __future__ import annotations

import os
from types import ModuleType
from typing import NamedTuple

import torch

from . import cpu, reference
from .cuda import CudaBackend
from .cuda import backend as cuda
from .errors import BackendUnavailableError

# A backend is a module, or an object, with the operations of `reference`.
Backend = ModuleType | CudaBackend

# In order of preference.
_BACKENDS: dict[str, Backend] = {"cuda": cuda, "cpu": cpu, "reference": reference}
_DEVICES: dict[str, tuple[str, ...]] = {"cuda": ("cuda",), "cpu": ("cpu",)}

ENVIRONMENT_VARIABLE = "SAM_KERNELS_BACKEND"


class BackendStatus(NamedTuple):
    """Whether a backend can be used, and what it is or why it cannot."""

    available: bool
    detail: str


def backends() -> dict[str, BackendStatus]:
    """All backends by name, in order of preference, with what they are or why they are missing."""
    status = {}
    for name, module in _BACKENDS.items():
        reason = module.unavailable_reason()
        status[name] = BackendStatus(reason is None, module.describe() if reason is None else reason)
    return status


def backend_for(device: torch.device, wanted: str | None = None) -> Backend:
    """The backend for tensors on ``device``.

    Args:
        device: where the tensors are.
        wanted: a backend's name. Without one the environment variable ``SAM_KERNELS_BACKEND`` decides, and without
            that the first available backend that serves the device.

    Raises:
        ValueError: if there is no backend of that name.
        BackendUnavailableError: if the named backend is missing or does not serve the device.
    """
    wanted = wanted or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if wanted is None:
        if device.type not in _chosen:
            _chosen[device.type] = _first_for(device)
        return _chosen[device.type]
    if wanted not in _BACKENDS:
        raise ValueError(f"Invalid backend: {wanted!r}; there are {', '.join(_BACKENDS)}")
    reason = _BACKENDS[wanted].unavailable_reason()
    if reason is not None:
        raise BackendUnavailableError(f"backend {wanted!r} is unavailable: {reason}")
    if not _serves(wanted, device):
        raise BackendUnavailableError(f"backend {wanted!r} does not serve tensors on {device}")
    return _BACKENDS[wanted]


# The first available backend by type of device: what is there once stays.
_chosen: dict[str, Backend] = {}


def _first_for(device: torch.device) -> Backend:
    found = (b for name, b in _BACKENDS.items() if _serves(name, device) and b.unavailable_reason() is None)
    return next(found)  # the reference backend serves every device


def _serves(name: str, device: torch.device) -> bool:
    return name not in _DEVICES or device.type in _DEVICES[name]
