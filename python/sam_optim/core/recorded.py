"""Records what an object holds, to put it back after something was tried."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Recorded:
    """What an optimizer holds besides weights: state, groups, counts, and the like of optimizers that it wraps.

    Some keep their counts in the groups or in themselves, and wrappers have state of their own, so everything is
    recorded that can be reached through lists, dicts and attributes. All objects stay the same: only
    values of tensors and contents of containers are put back.

    Args:
        owner: the optimizer.
        leave: tensors that do not belong to it: the weights.

    Attributes:
        generators: random generators that were found.
    """

    def __init__(self, owner: Any, leave: Iterable[Tensor]) -> None:
        self.generators: list[Any] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._undo: list[Callable[[], object]] = []
        self._seen = {id(tensor) for tensor in leave}
        self._held: list[Any] = []  # so that no id is used again
        self._visit(owner)

    @torch.no_grad()
    def put_back(self) -> None:
        for undo in self._undo:
            undo()
        for tensor, value in self._tensors:
            tensor.copy_(value)

    @torch.no_grad()
    def _visit(self, value: Any) -> None:
        if value is None or isinstance(value, (bool, int, float, str, bytes, type, nn.Module, nn.Parameter)):
            return
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._held.append(value)
        if is_traceable_wrapper_subclass(value):  # states in 8 bits know no clone(), their parts do
            for name in value.__tensor_flatten__()[0]:
                self._visit(getattr(value, name))
        elif isinstance(value, Tensor):
            self._tensors.append((value, value.clone()))
        elif isinstance(value, dict):
            self._contents(value, dict(value), list(value.values()))
        elif isinstance(value, (list, deque, set)):
            self._contents(value, list(value), list(value))
        elif isinstance(value, tuple):
            for entry in value:
                self._visit(entry)
        elif isinstance(value, (torch.Generator, random.Random)) or _is_numpys(type(value)):
            self.generators.append(value)
        elif not callable(value) and hasattr(value, "__dict__"):
            self._visit(vars(value))

    def _contents(self, container: Any, before: Any, entries: list[Any]) -> None:
        def undo() -> None:
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(before)

        self._undo.append(undo)
        for entry in entries:
            self._visit(entry)


def _is_numpys(cls: type) -> bool:
    return cls.__module__.startswith("numpy.random") and cls.__name__ in ("Generator", "RandomState")
