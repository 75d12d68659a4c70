"""Which backends there are, and which one serves a device."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from .backends import cpu, cuda, foreach, reference
from .backends.contract import Backend
from .errors import BackendUnavailableError
from .plan import Plan
from .triton.backend import backend as triton_backend

__all__ = ["BackendStatus", "backend_named", "backends", "has_updates"]

# In order of preference.
_BACKENDS: dict[str, Backend] = {
    "cuda": cuda.backend,
    "triton": triton_backend,
    "cpu": cpu.backend,
    "foreach": foreach.backend,
    "reference": reference.backend,
}
# Those that serve a type of device without being asked for by name, before `foreach`, which serves all.
_AUTOMATIC = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}

ENVIRONMENT_VARIABLE = "SAM_KERNELS_BACKEND"

_graph = torch.autograd.graph


class BackendStatus(NamedTuple):
    """Whether a backend can be used, and what it is or why it cannot."""

    available: bool
    detail: str


def backends() -> dict[str, BackendStatus]:
    """All backends by name, in order of preference, with what they are or why they are missing."""
    status = {}
    for name, backend in _BACKENDS.items():
        reason = backend.unavailable_reason()
        status[name] = BackendStatus(reason is None, backend.describe() if reason is None else reason)
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
    if _copies_what_is_written():
        return foreach.backend
    wanted = wanted or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if wanted is None:
        if device.type not in _chosen:
            _chosen[device.type] = _first_for(device)
        return _chosen[device.type]
    found = backend_named(wanted)
    if not found.serves(device):
        raise BackendUnavailableError(f"backend {wanted!r} does not serve tensors on {device}")
    return found


def backend_of(plan: Plan, wanted: str | None = None) -> Backend:
    """As :func:`backend_for`, for a plan's tensors: chosen once, as long as they stay on their device."""
    if _copies_what_is_written():
        return foreach.backend
    chosen: Backend | None = plan.backends.get(wanted)
    if chosen is None:
        chosen = plan.backends[wanted] = backend_for(plan.device, wanted)
    return chosen


def _copies_what_is_written() -> bool:
    """Within ``allow_mutation_on_saved_tensors()`` torch copies tensors before its own operations write into them."""
    return getattr(_graph, "_allow_mutation_on_saved_tensors_enabled", False)


def backend_named(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: if there is none.
        BackendUnavailableError: if it is missing here.
    """
    if name not in _BACKENDS:
        raise ValueError(f"Invalid backend: {name!r}; there are {', '.join(_BACKENDS)}")
    reason = _BACKENDS[name].unavailable_reason()
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} is unavailable: {reason}")
    return _BACKENDS[name]


# The first available backend by type of device: what is there once stays.
_chosen: dict[str, Backend] = {}


def _first_for(device: torch.device) -> Backend:
    names = (*_AUTOMATIC.get(device.type, ()), "foreach")
    return next(_BACKENDS[name] for name in names if _BACKENDS[name].unavailable_reason() is None)


def has_updates(plan: Plan, wanted: str | None = None) -> bool:
    """Whether updates by a base optimizer are worth making here: on all devices by kernels, or by the definition."""
    if plan.bindings:  # of a native backend
        return True
    parts = [part for part, _ in plan.parts] or [plan]
    return all(backend_of(part, wanted) is not foreach.backend for part in parts)
