"""What forward passes change although no rule names it: every pass of a step then changes it, and the next one uses it.

Queues and momentum encoders, codebooks, observers, counters. They cannot be put aside without being named, since a copy
of everything that a model holds costs memory; but that they were written can be seen.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_KINDS = (Tensor, nn.Parameter, nn.Buffer)


class _Held(NamedTuple):
    module: nn.Module
    name: str
    tensor: Tensor
    version: int
    address: int


class UnnamedState:
    """Buffers and frozen parameters of a model, as they were before a pass that should leave them alone.

    Args:
        model: all its modules are looked at, but not where several processes train: their wrappers write into buffers
            and move parameters by themselves.
        rule: names the statistics, which are none of this.
    """

    def __init__(self, model: nn.Module, rule: Callable[[nn.Module], Iterable[str]]) -> None:
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._held = [] if is_distributed else list(_held_by(model, rule))

    def tell_what_was_written(self) -> None:
        """Warns of what somebody has written into since; not where the pass is left by an exception."""
        if sys.exc_info()[0] is not None:
            return
        written = [f"{type(held.module).__name__}.{held.name}" for held in self._held if _is_written(held)]
        if written:
            names = ", ".join(written[:3]) + (f" and {len(written) - 3} more" if len(written) > 3 else "")
            warnings.warn(
                f"a perturbed pass has written into {names}. Every pass of a step does so, and the next sees it. Name "
                "buffers that a module's own forward() updates by the rule for statistics, lambda module: "
                "(*running_statistics(module), 'queue'); update all else, as a momentum encoder, after the step.",
                stacklevel=2,
            )


def _held_by(model: nn.Module, rule: Callable[[nn.Module], Iterable[str]]) -> Iterator[_Held]:
    for module in model.modules():
        named = set(rule(module))
        frozen = [(name, p) for name, p in module.named_parameters(recurse=False) if not p.requires_grad]
        for name, tensor in [*module.named_buffers(recurse=False), *frozen]:
            is_plain = type(tensor) in _KINDS and tensor.layout == torch.strided and tensor.device.type != "meta"
            if name not in named and is_plain and not tensor.is_inference():
                yield _Held(module, name, tensor, tensor._version, tensor.data_ptr())


def _is_written(held: _Held) -> bool:
    now: Any = getattr(held.module, held.name, None)
    if now is not held.tensor:  # a cache that has grown is another thing
        return type(now) in _KINDS and bool(now.shape == held.tensor.shape and now.dtype == held.tensor.dtype)
    return bool(now._version != held.version or now.data_ptr() != held.address)
