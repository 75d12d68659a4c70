"""Runs a function on several ranks, processes of this machine that talk by gloo."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls ``function(rank, *arguments)`` on every rank; it must be importable. Raises what any of them raises."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        torch.multiprocessing.spawn(_run, (count, meeting, function, arguments), nprocs=count)


def _run(rank: int, count: int, meeting: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    function(rank, *arguments)
    torch.distributed.barrier()
    # Taking gloo's threads down sometimes aborts the process, at no fault of what ran before.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
