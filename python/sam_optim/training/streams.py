"""Gradient passes that run side by side: each with leaves and statistics of its own, on a CUDA stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from sam_kernels.sharding import is_distributed

from ..core.errors import InvalidSettingError
from ..core.passes import Gradients

Call = Callable[[], Any]


class Lanes(Protocol):
    """Where calls run that do not depend on each other."""

    def run(self, calls: Sequence[Call]) -> list[Any]:
        """The results of all calls, ready for whatever the caller does next."""


class OneLane:
    """One call after the other."""

    def run(self, calls: Sequence[Call]) -> list[Any]:
        return [call() for call in calls]


class StreamLanes:
    """Each call on a CUDA stream of its own.

    The streams wait for what the caller has queued, and the caller's stream waits for them, so before and after nothing
    is different. Within a captured graph they become branches of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: list[torch.cuda.Stream] = []

    def run(self, calls: Sequence[Call]) -> list[Any]:
        current = torch.cuda.current_stream(self._device)
        while len(self._streams) < len(calls):
            self._streams.append(torch.cuda.Stream(self._device))
        streams = self._streams[: len(calls)]
        results = []
        try:
            for stream in streams:
                stream.wait_stream(current)
            for stream, call in zip(streams, calls, strict=True):
                with torch.cuda.stream(stream):
                    results.append(call())
        finally:
            for stream in streams:
                current.wait_stream(stream)
        # What was allocated on a stream is given to others by that stream's order alone, unless it hears of more users.
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(current)
        return results


class Isolated:
    """Evaluates gradients of a model with leaf tensors of their own, so that several evaluations share nothing.

    Args:
        model: whose parameters the others are among.
        params: of which gradients are wanted, in this order.
        modules: the model, or a list of it and others that evaluations use.

    Raises:
        InvalidSettingError: if the model does not hold one of them, or is wrapped for parallel training.
    """

    def __init__(self, model: nn.Module, params: Sequence[Tensor], modules: nn.Module | None = None) -> None:
        is_wrapped = hasattr(model, "no_sync") or any(isinstance(m, nn.DataParallel) for m in model.modules())
        if is_wrapped or any(is_distributed(p) for p in params):
            raise InvalidSettingError(
                f"passes cannot run side by side in a {type(model).__name__}, whose gradients are reduced by hooks; "
                "use passes='sequential'"
            )
        self._params = list(params)
        self._model = _Holder(model if modules is None else modules)
        names: dict[int, str] = {id(p): name for name, p in self._model.named_parameters()}
        strangers = [index for index, p in enumerate(self._params) if id(p) not in names]
        if strangers:
            raise InvalidSettingError(
                f"parameters {strangers} of the optimizer are not the model's; passes that run side by side evaluate "
                "the model with other tensors, and could not reach these"
            )
        self._names = [names[id(p)] for p in self._params]

    def gradients(self, evaluate: Callable[[], Any], weights: Sequence[Tensor] | None) -> Gradients:
        """The gradients that a call leaves behind.

        Args:
            evaluate: runs forward and backward, through the model.
            weights: to evaluate at; by default those that the model holds.
        """
        values: dict[str, Tensor] = dict(zip(self._names, weights or self._params, strict=True))
        # Also those that the optimizer does not hold: two passes must not add to one gradient.
        leaves = {
            name: values.get(name, param).detach().requires_grad_(param.requires_grad)
            for name, param in self._model.named_parameters()
        }
        # Backward runs in here too: a checkpointed forward pass that it repeats must find the same tensors.
        functional_call(self._model, leaves, (evaluate,))
        return [leaves[name].grad for name in self._names]


class _Holder(nn.Module):
    """A module around the model, so that whatever calls the model can be called by :func:`functional_call`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, evaluate: Callable[[], Any]) -> Any:
        return evaluate()
