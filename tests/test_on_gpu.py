"""What tests ask of a GPU, without one: a warning that torch gives once must not reach the tests after it."""

from __future__ import annotations

import warnings

import pytest
import torch

from .on_gpu import no_waiting

# What torch 2.11 says once a process, each a UserWarning.
OF_TORCH = [
    "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
    "Warning: Profiler clears events at the end of each cycle.Only events from the current cycle will be reported.",
    "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary context...",
]


@pytest.mark.parametrize("text", OF_TORCH)
def test_warnings_that_torch_gives_once_are_no_errors(text):
    warnings.warn(text, UserWarning, stacklevel=1)


def test_other_warnings_are_errors():
    with pytest.raises(UserWarning):
        warnings.warn("something else", UserWarning, stacklevel=1)


@pytest.fixture
def modes(monkeypatch):
    """Those that were set, the last one is on. Setting one may raise when it has been set, as a warning does."""
    found = []

    def set_mode(mode):
        found.append(mode)
        if mode == "error":
            warnings.warn("said once", UserWarning, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    return found


def test_nobody_waits_forever_after(modes):
    with pytest.raises(UserWarning, match="said once"), no_waiting():
        pass
    assert modes == ["error", "default"]
