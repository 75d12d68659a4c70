"""SAM in every k-th step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sam_kernels.rules import NORM_EPSILON

from ..core.checks import as_whole, check_number, whole_number
from ..core.closures import ClosureRuns
from ..core.construction import BaseOptimizer
from ..core.errors import InvalidSettingError
from ..core.settings import Adaptive, Whole, handed_on
from .intermittent import ScheduledSAM


class IntervalSAM(ScheduledSAM):
    """SAM in every k-th step from a given one on; the steps between are the base optimizer's, bit for bit.

    Args:
        every: k, at least 1.
        start: number of the first SAM step, counted from 0; or, with ``total_steps``, a share of these, a float from 0
            to below 1. In some settings SAM only late in training does nearly as well as SAM throughout (Zhou et al.
            2024, arXiv 2410.10373).
        total_steps: number of steps of the whole training. ``start=0.8, total_steps=10_000`` is ``start=8_000``.
        all others: as for :class:`SAM`.
    """

    every = Whole(at_least=1)
    start = Whole(at_least=0)

    def __init__(
        self,
        params: Any,
        base_optimizer: BaseOptimizer,
        rho: float | Tensor = 0.05,
        every: int = 2,
        start: float = 0,
        total_steps: int | None = None,
        *,
        adaptive: Adaptive = False,
        eta: float | None = None,
        perturb_eps: float = NORM_EPSILON,
        closure_runs: ClosureRuns = "every_pass",
        backend: str | None = None,
        master_weights: bool = False,
        process_group: Any = None,
        counts_in_norm: Callable[[Tensor], bool] | None = None,
        **base_kwargs: Any,
    ) -> None:
        start = _first_step(start, total_steps)
        super().__init__(**handed_on(locals(), leave_out="total_steps"))

    def is_sharpness_aware(self, step: int) -> bool:
        start = self.start
        return step >= start and (step - start) % self.every == 0


def _first_step(start: float, total_steps: int | None) -> int:
    """``start`` as the number of a step; it may be given as a share of all steps."""
    number = as_whole(start)
    if total_steps is None:
        if number is None:
            raise InvalidSettingError(
                f"Invalid start: {start!r}; it is a step's number. For a share of the training give total_steps as well"
            )
        return whole_number("start", start, 0)
    total_steps = whole_number("total_steps", total_steps, 1)
    if number is None:
        check_number("start", start, 0, below=1)
        number = round(float(start) * total_steps)
    if number >= total_steps:
        raise InvalidSettingError(f"Invalid start: {start}; of {total_steps} steps none would be SAM's")
    return whole_number("start", number, 0)
