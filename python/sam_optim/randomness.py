"""The same random draws in two passes, so that dropout does not count as a difference between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class RandomState:
    """The state of torch's generators of the CPU and of the accelerators among ``devices``, as it is now."""

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._cpu = torch.get_rng_state()
        self._others = [(module, device, module.get_rng_state(device)) for module, device in _generators(devices)]

    def restore(self) -> None:
        """Puts the generators back."""
        torch.set_rng_state(self._cpu)
        for module, device, state in self._others:
            module.set_rng_state(state, device)


def _generators(devices: Iterable[torch.device]) -> Iterator[tuple[Any, torch.device]]:
    """The accelerators that have a generator, with the modules of torch that have its functions."""
    for device in dict.fromkeys(devices):  # as a set, but torch.compile understands it
        module = None if device.type == "cpu" else getattr(torch, device.type, None)
        if hasattr(module, "get_rng_state"):
            yield module, device


class Draws:
    """The random draws of one step's passes.

    Args:
        devices: that passes draw on.
        known: the generators' states that batches were first used with, by the batches' names.
    """

    def __init__(self, devices: Iterable[torch.device], known: dict[str, RandomState] | None = None) -> None:
        self._devices = list(devices)
        self._first = dict(known or {})

    @contextmanager
    def of(self, name: str, perturbed: bool) -> Iterator[None]:
        """For one pass on a batch: a perturbed one draws what the first pass on the same batch drew."""
        if perturbed and name in self._first:
            after = RandomState(self._devices)
            self._first[name].restore()
            yield
            after.restore()
            return
        self._first.setdefault(name, RandomState(self._devices))
        yield

    def begin_part(self) -> None:
        """The passes that follow are on other batches."""
        self._first.clear()

    def first_of(self, name: str) -> RandomState | None:
        """The state that a batch was first used with; None if it was not."""
        return self._first.get(name)
