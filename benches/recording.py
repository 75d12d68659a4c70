"""Handing durations that were measured in turn to pytest-benchmark."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from .contenders import THREADS
from .interleaved import Replay

CLOCK = Replay()
OURS = "sam-kernels"


def record(benchmark: Any, times: dict[str, list[float]], contender: str, group: str, **extra: Any) -> None:
    """Reports one contender's durations under a group, with what the report needs to know as ``extra_info``."""
    own = times[contender]
    benchmark.group = group
    benchmark.extra_info.update(
        contender=contender,
        ratio_to_sam_kernels=statistics.median(own) / statistics.median(times[OURS]) if OURS in times else None,
        threads=THREADS,
        torch=torch.__version__,
        **extra,
    )
    CLOCK.load(own)
    benchmark.pedantic(lambda: None, rounds=len(own), iterations=1)
