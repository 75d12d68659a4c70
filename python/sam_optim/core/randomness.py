"""The same random draws in two passes, so that they do not differ by dropout or Mixup."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.compiling import untraced


class RandomState:
    """The state of the random generators that passes draw from, as it is now.

    They are torch's generators of the CPU and of the accelerators among ``devices``, Python's ``random``, and the
    global one of ``numpy.random`` if that has been imported. Generators that a program has made itself cannot be
    found: pass them.

    Args:
        devices: the accelerators that passes draw on; the CPU is always included.
        generators: made by the program: ``torch.Generator``, ``numpy.random.Generator``, ``numpy.random.RandomState``
            or ``random.Random``.

    Raises:
        TypeError: for a generator of another kind.
    """

    @untraced
    def __init__(self, devices: Iterable[torch.device] = (), generators: Iterable[Any] = ()) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = [(module, device, module.get_rng_state(device)) for module, device in _generators(devices)]
        self._python = random.getstate()
        self._numpy = _numpy.read()
        self._own = [(generator, _read(generator)) for generator in generators]

    @untraced
    def restore(self) -> None:
        """Puts the generators back."""
        torch.set_rng_state(self._cpu)
        for module, device, state in self._devices:
            module.set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            _numpy.set(self._numpy)
        for generator, state in self._own:
            _set(generator, state)

    def state_dict(self) -> dict[str, Any]:
        """As tensors and numbers, which ``torch.load(weights_only=True)`` reads."""
        state = {
            "cpu": self._cpu,
            "devices": {str(device): state for _, device, state in self._devices},
            "python": _as_tensors(self._python),
            "generators": [_as_tensors(state) for _, state in self._own],
        }
        if self._numpy is not None:
            state["numpy"] = _as_tensors(self._numpy.values)
        return state

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any], generators: Iterable[Any] = ()) -> RandomState:
        """The state that :meth:`state_dict` gave.

        The state of an accelerator that is not there now is left out, and numpy's where ``numpy.random`` has not been
        imported.

        Args:
            state_dict: on whatever device it was loaded to.
            generators: as many as were passed then, in the same order.

        Raises:
            ValueError: for another number of them.
        """
        found = cls()
        found._cpu = state_dict["cpu"].cpu()
        there = _generators(map(torch.device, state_dict["devices"]))
        found._devices = [(module, device, state_dict["devices"][str(device)].cpu()) for module, device in there]
        found._python = _from_tensors(state_dict["python"])
        if found._numpy is not None and "numpy" in state_dict:
            found._numpy = _NumpyState(None, _from_tensors(state_dict["numpy"]))
        else:
            found._numpy = None
        own, saved = list(generators), state_dict["generators"]
        if len(own) != len(saved):
            raise ValueError(f"{len(own)} generators were given for the saved states of {len(saved)}")
        found._own = list(zip(own, map(_from_tensors, saved), strict=True))
        return found


def _generators(devices: Iterable[torch.device]) -> Iterator[tuple[Any, torch.device]]:
    """The accelerators that are there and have a generator, with the modules of torch that have its functions."""
    for device in dict.fromkeys(devices):
        module = None if device.type == "cpu" else getattr(torch, device.type, None)
        if hasattr(module, "get_rng_state") and getattr(module, "is_available", lambda: True)():
            yield module, device


def _read(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    if hasattr(generator, "get_state"):
        return generator.get_state(legacy=False)
    raise TypeError(
        f"Invalid generator: {type(generator).__name__}; it must be a torch.Generator, a numpy.random.Generator or "
        "RandomState, or a random.Random"
    )


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _as_tensors(state: Any) -> Any:
    """A generator's state with tensors for what is long: Python's is a tuple, numpy's a dict with arrays."""
    if isinstance(state, tuple):
        version, words, gauss = state
        return {"version": version, "words": torch.tensor(words, device="cpu"), "gauss": gauss}
    if isinstance(state, dict):
        return {key: _as_tensors(value) for key, value in state.items()}
    if isinstance(state, (Tensor, str)):
        return state
    if getattr(state, "ndim", 0):
        return {"array": torch.from_numpy(state.copy())}
    return float(state) if isinstance(state, float) else int(state)


def _from_tensors(state: Any) -> Any:
    if not isinstance(state, dict):
        return state.cpu() if isinstance(state, Tensor) else state
    if "array" in state:
        return state["array"].cpu().numpy()
    if "words" in state:
        return state["version"], tuple(state["words"].tolist()), state["gauss"]
    return {key: _from_tensors(value) for key, value in state.items()}


class _NumpyState(NamedTuple):
    """The memory of the generator, None if it cannot be read, and the state as numpy gives it."""

    memory: bytes | None
    values: dict[str, Any]


class _NumpyGenerator:
    """The global generator of ``numpy.random``.

    Reading its state takes 40 microseconds, and setting it takes as long; few programs draw from it within passes. So
    its memory, whose address numpy tells, is looked at first, and nothing is done if it has not changed.
    """

    # Of MT19937: 624 words and the position among them.
    _SIZE = 624 * 4 + 4

    def __init__(self) -> None:
        self._bits: Any = None  # the generator that this is known of:
        self._memory: Any = None
        self._last: _NumpyState | None = None

    def read(self) -> _NumpyState | None:
        """The present state; None if ``numpy.random`` has not been imported."""
        module: Any = sys.modules.get("numpy.random")
        if not hasattr(module, "get_bit_generator"):  # also while it is being imported
            return None
        if module.get_bit_generator() is not self._bits:
            self._find_memory(module)
        memory = None if self._memory is None else self._memory.raw
        if not self._is(memory, self._last):
            self._last = _NumpyState(memory, module.get_state(legacy=False))
        return self._last

    def set(self, state: _NumpyState) -> None:
        """Sets the generator to a state that was read."""
        now = self.read()
        if now is not None and not (self._is(now.memory, state)):
            sys.modules["numpy.random"].set_state(state.values)

    @staticmethod
    def _is(memory: bytes | None, state: _NumpyState | None) -> bool:
        # numpy keeps a second normal number for the next call elsewhere; taking it does not change this memory.
        return state is not None and memory is not None and memory == state.memory and not state.values["has_gauss"]

    def _find_memory(self, module: Any) -> None:
        self._bits, self._memory, self._last = module.get_bit_generator(), None, None
        values = module.get_state(legacy=False)
        if values["bit_generator"] == "MT19937":
            memory = (ctypes.c_char * self._SIZE).from_address(self._bits.ctypes.state_address)
            position = values["state"]["pos"].to_bytes(4, sys.byteorder)
            if memory.raw == values["state"]["key"].tobytes() + position:
                self._memory = memory


_numpy = _NumpyGenerator()


class Draws:
    """The random draws of one step's passes.

    Args:
        devices: the devices that passes draw on.
        known: the generators' states that batches were first used with, by the batches' names.
        generators: see :class:`RandomState`.
    """

    def __init__(
        self,
        devices: Iterable[torch.device],
        known: dict[str, RandomState] | None = None,
        generators: Sequence[Any] = (),
    ) -> None:
        self._devices, self._generators = list(devices), generators
        self._first = dict(known or {})

    @contextmanager
    def of(self, name: str, perturbed: bool) -> Iterator[None]:
        """For one pass on a batch: a perturbed one draws what the first pass on the same batch drew."""
        if perturbed and name in self._first:
            after = RandomState(self._devices, self._generators)
            self._first[name].restore()
            try:
                yield
            finally:
                after.restore()
            return
        if name not in self._first:
            self._first[name] = RandomState(self._devices, self._generators)
        yield

    def begin_part(self) -> None:
        """The passes that follow are on other batches."""
        self._first.clear()

    def first_of(self, name: str) -> RandomState | None:
        """The state that a batch was first used with; None if it was not."""
        return self._first.get(name)
