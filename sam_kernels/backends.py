"""Which backends there are, and which one serves a device."""

from __future__ import annotations

import os
from types import ModuleType
from typing import NamedTuple

import torch

from . import cpu, reference
from .errors import BackendUnavailableError

# In order of preference. A backend is a module with the operations of `reference`.
_MODULES: dict[str, ModuleType] = {"cpu": cpu, "reference": reference}
_DEVICES: dict[str, tuple[str, ...]] = {"cpu": ("cpu",)}

ENVIRONMENT_VARIABLE = "SAM_KERNELS_BACKEND"


class BackendStatus(NamedTuple):
    """Whether a backend can be used, and what it is or why it cannot."""

    available: bool
    detail: str


def backends() -> dict[str, BackendStatus]:
    """All backends by name, in order of preference, with what they are or why they are missing."""
    status = {}
    for name, module in _MODULES.items():
        reason = module.unavailable_reason()
        status[name] = BackendStatus(reason is None, module.describe() if reason is None else reason)
    return status


def backend_for(device: torch.device, wanted: str | None = None) -> ModuleType:
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
        for name, module in _MODULES.items():
            if _serves(name, device) and module.unavailable_reason() is None:
                return module
    if wanted not in _MODULES:
        raise ValueError(f"Invalid backend: {wanted!r}; there are {', '.join(_MODULES)}")
    reason = _MODULES[wanted].unavailable_reason()
    if reason is not None:
        raise BackendUnavailableError(f"backend {wanted!r} is unavailable: {reason}")
    if not _serves(wanted, device):
        raise BackendUnavailableError(f"backend {wanted!r} does not serve tensors on {device}")
    return _MODULES[wanted]


def _serves(name: str, device: torch.device) -> bool:
    return name not in _DEVICES or device.type in _DEVICES[name]
