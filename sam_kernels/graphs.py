"""CUDA graphs: what is launched while one is captured is not done, but recorded, to be done by each replay of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["owned_by"]

# Where the captures of a call of :func:`owned_by` leave what their graph reads.
_owner: list[Any] | None = None


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now on the device's current stream becomes part of a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, reason: str) -> None:
    """Raises an error while a graph is captured: what the host decides now would be repeated by every replay."""
    if is_capturing(device):
        raise RuntimeError(
            f"this step cannot be captured in a CUDA graph: {reason}. Make a few steps before capturing, and give Adam "
            "capturable=True."
        )


@contextmanager
def owned_by(kept: list[Any]) -> Iterator[None]:
    """Within it, what a captured graph reads is added to a list, to be kept as long as the graph is replayed.

    Elsewhere nobody knows how long that is, and it is kept as long as the plan.
    """
    global _owner
    before, _owner = _owner, kept
    try:
        yield
    finally:
        _owner = before


def keep(things: Any, by_plan: list[Any]) -> None:
    """Keeps what a graph that is being captured reads."""
    (by_plan if _owner is None else _owner).append(things)
