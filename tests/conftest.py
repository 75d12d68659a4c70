"""Shared set-up: two threads, fixed seeds, and hypothesis without deadlines (machines differ)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Threads that spin while they wait take the cores from each other's processes; asked for when OpenMP is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from hypothesis import settings

# Triton asks when it is imported. Without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from .targets import gpu_target, interpreter, launches, shim, shim_backend, target  # noqa: F401

settings.register_profile("tests", deadline=None, print_blob=True)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _fixed_conditions() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # keywords hold names of folders, too
            item.add_marker(skip)
